"""The command line: `gptjax prepare | train | generate | predict | inspect`.

The only file that reads arguments. JAX is imported by a verb, after its arguments have passed the
checks, so `--help` and refusals are quick.
"""

import dataclasses
import errno
import logging
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from gptjax.config import (
    Config,
    ConfigError,
    Count,
    Kind,
    MeshConfig,
    NotNegative,
    Probability,
    Whole,
    check,
    did_you_mean,
    field_problems,
    kind_of,
    load_experiment,
    refuse,
    to_json,
    violations,
)

if TYPE_CHECKING:
    from gptjax.config import DataConfig, GPTConfig
    from gptjax.model import Params
    from gptjax.store import Store
    from gptjax.tokenizer import Tokenizer

T = TypeVar("T")

# By name, because their files import JAX, and a bad argument is refused without it.
EXIT_CODES = {
    "ConfigError": 2,
    "DataError": 3,
    "CheckpointError": 4,
    "DivergenceError": 5,
    "OSError": 6,
    "Interrupted": 75,
    "KeyboardInterrupt": 130,
}
BUG = 1
STOPPED = (75, 130)  # these are no errors: the user, or the machine, asked for it

# What to do about a failure of the file system, where the operating system's words do not say it.
REMEDIES = {
    errno.ENOSPC: "free some space, or give another folder",
    errno.EDQUOT: "free some space, or give another folder",
    errno.EROFS: "give a folder that can be written",
    errno.EACCES: "give a folder that you may read and write",
    errno.EPERM: "give a folder that you may read and write",
    errno.EIO: "check the disk",
}

HUGE_PAGES = "glibc.malloc.hugetlb=1"  # as the variable GLIBC_TUNABLES takes it


@dataclass(frozen=True)
class Train:
    """Train the model of FILE.py (its `config()`) or FILE.py:function; go on if the run stopped."""

    run_dir: str | None = None  # where the run is kept; None: runs/NAME
    # HOST:PORT of process 0; None: as the cluster says, or a single process
    coordinator: str | None = None
    num_processes: Count | None = None  # of the run; with --coordinator
    process_id: Whole | None = None  # of this process, from 0; with --coordinator
    debug: bool = False  # show the traceback of an error
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


@dataclass(frozen=True)
class Prepare:
    """Turn the text of FILE.py or FILE.py:function into token stores, as `train` does at first."""

    # do the work in an Apache Beam pipeline; all that follows is for the pipeline
    beam: tuple[str, ...] | None = None
    debug: bool = False  # show the traceback of an error
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with the model of the run directory RUN, and print the text as it comes."""

    prompt: str = ""  # empty: the model begins a document
    max_tokens: Whole = 200  # of each sample
    temperature: NotNegative = 0.8  # 0: always the likeliest token
    top_k: Count | None = None  # choose among the k likeliest
    top_p: Probability | None = None  # among the likeliest that have this probability together
    seed: Whole = 0  # of the draws
    num_samples: Count = 1  # one after the other
    step: Whole | None = None  # of the checkpoint; None: the newest
    debug: bool = False  # show the traceback of an error


@dataclass(frozen=True)
class Predict:
    """Print the likeliest tokens after a text, by the model of the run directory RUN."""

    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")] = ""
    top: Count = 10  # tokens that are printed
    step: Whole | None = None  # of the checkpoint; None: the newest
    debug: bool = False  # show the traceback of an error


@dataclass(frozen=True)
class Inspect:
    """List the steps, the config and the parameters of the run directory RUN."""

    step: Whole | None = None  # of the checkpoint; None: the newest
    debug: bool = False  # show the traceback of an error


def main() -> int:
    """Run the command line; the exit code."""
    arguments = sys.argv[1:]
    sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal cannot show
    log = logging.getLogger("gptjax")
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    try:
        run_verb(arguments)
        return 0
    except BrokenPipeError:  # the reader of our output, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        code, message = explain(error)
        word = "stopped" if code in STOPPED else "error"
        print(f"gptjax: {word}[{code}]: {message}", file=sys.stderr)
        return code


def run_verb(arguments: Sequence[str]) -> None:
    """Parse the arguments and do what they say.

    Raises:
      ConfigError: for arguments that are refused; and whatever the verb raises.
      SystemExit: with code 0, after `--help`.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: gptjax VERB ...\n")
        for verb, (_, options) in VERBS.items():
            print(f"  {verb:10}{options.__doc__}")
        print("\n`gptjax VERB --help` lists the options of a verb.")
        return
    verb, *rest = arguments
    if verb not in VERBS:
        near = did_you_mean(verb, VERBS)
        raise ConfigError(f"{verb!r} is not a verb: give one of {', '.join(VERBS)}.{near}")
    run, options = VERBS[verb]
    target = rest.pop(0) if rest and not rest[0].startswith("-") else None
    default, placeholder = options(), "RUN"
    if hasattr(default, "config"):
        placeholder = "FILE"
        if target:
            default = dataclasses.replace(default, config=load_experiment(target))
    if options is Prepare and "--beam" in rest:
        place = rest.index("--beam")
        default = dataclasses.replace(default, beam=tuple(rest[place + 1 :]))
        del rest[place:]
    given, problems = parse(default, f"gptjax {verb} {target or placeholder}", rest)
    if target is None:
        raise ConfigError(
            f"{placeholder} is missing: give it first, as in `gptjax {verb} {placeholder}`"
        )
    refuse(problems)
    run(target, given)


def parse(default: T, prog: str, arguments: Sequence[str]) -> tuple[T, list[str]]:
    """Options with the values that arguments give them, and all violations.

    Those are unknown options, values of a wrong kind, and rules of the config that do not hold.

    Raises:
      SystemExit: with code 0, after `--help`.
    """
    given, unknown = tyro.cli(
        type(default),
        prog=prog,
        default=default,
        args=arguments,
        registry=_lenient(),
        return_unknown_args=True,
    )
    known = list(_options(type(default)))
    unknown = [token for token in unknown if token.startswith("-")] or unknown
    problems = [_unknown(token, known) for token in unknown]
    if not hasattr(given, "config"):
        return given, [*problems, *field_problems(given).values()]
    wrong = field_problems(dataclasses.replace(given, config=Config()))
    problems += wrong.values()
    if not wrong and isinstance(given, Train):
        problems += _launch_problems(given)
    return given, problems + violations(given.config)


def _lenient() -> tyro.constructors.ConstructorRegistry:
    """Rules by which a value that is not of its field's kind stays text.

    tyro would stop at the first such value. So they all reach the checks, which name them together.
    """
    registry = tyro.constructors.ConstructorRegistry()
    words = {int: "INT", float: "FLOAT", str: "TEXT", tuple: "[TEXT ...]"}

    @registry.primitive_rule
    def value(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec | None:
        kind = kind_of(info.type)
        if kind.base not in words:
            return None
        word = "|".join(kind.choices) or words[kind.base]
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1 if tyro.conf.Positional in info.markers else "*",
            metavar=f"{word}|None" if kind.optional else word,
            instance_from_str=lambda texts: _value(texts, kind),
            is_instance=kind.takes,
            str_from_instance=lambda given: [*given] if kind.base is tuple else [str(given)],
        )

    return registry


def _value(texts: list[str], kind: Kind) -> Any:
    """What texts stand for in a field of a kind; where that is nothing, the texts themselves."""
    if kind.base is tuple or len(texts) != 1:
        return tuple(texts)
    if kind.optional and texts == ["None"]:
        return None
    try:
        return kind.base(texts[0])
    except ValueError:
        return texts[0]


def _options(dataclass_type: type, prefix: str = "") -> Iterator[str]:
    """The options that tyro makes of a dataclass."""
    for field in dataclasses.fields(dataclass_type):
        base, name = kind_of(field.type).base, field.name.replace("_", "-")
        if dataclasses.is_dataclass(base):
            yield from _options(base, "" if base is Config else f"{prefix}{name}.")
        elif tyro.conf.Positional not in getattr(field.type, "__metadata__", ()):
            yield f"--{prefix}{name}"
            if base is bool:
                yield f"--{prefix}no-{name}"


def _unknown(token: str, options: list[str]) -> str:
    if not token.startswith("-"):
        return f"{token!r}: one argument too many"
    option = token.partition("=")[0]
    name = option.replace("_", "-")
    same = [known for known in options if known.endswith(f".{name.strip('-')}")]  # less its section
    return f"{option}: there is no such option.{did_you_mean(same[0] if same else name, options)}"


def _launch_problems(given: Train) -> Iterator[str]:
    """The violations of the rules between the options of `train` that are not of the config."""
    launch = (given.coordinator, given.num_processes, given.process_id)
    if launch == (None, None, None):
        return
    if None in launch:
        yield "--coordinator, --num-processes and --process-id: give all three of them, or none"
        return
    if given.process_id >= given.num_processes:
        last = given.num_processes - 1
        yield f"process_id = {given.process_id} of {last + 1} processes: give one from 0 to {last}"
    if not given.coordinator.rpartition(":")[2].isdecimal():
        yield f"coordinator = {given.coordinator!r}: give HOST:PORT, as in 10.0.0.1:1234"


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code of an error, and what the user reads: what failed, where, what to do."""
    names = (kind.__name__ for kind in type(error).__mro__)
    code = next((EXIT_CODES[name] for name in names if name in EXIT_CODES), BUG)
    if isinstance(error, KeyboardInterrupt):
        return code, "by the keyboard"
    if isinstance(error, OSError):
        where = f" -- {error.filename}" if error.filename else ""
        remedy = REMEDIES.get(error.errno, "check the path")
        return code, f"{error.strerror or error}{where} -- {remedy}"
    if code == BUG:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        where = f"{frame.filename}:{frame.lineno}"
        return code, f"{what} -- {where} -- run again with --debug and report the traceback"
    return code, str(error)


# --- verbs -------------------------------------------------------------------------------------


def train(experiment: str, given: Train) -> None:
    """Train, on all devices of all processes."""
    _use_huge_pages()
    import jax

    _join_processes(given)
    check(given.config, jax.device_count())
    from gptjax.train import fit

    fit(given.config, Path(given.run_dir or Path("runs", given.config.name)))


def _use_huge_pages() -> None:
    """Let large arrays lie in huge pages, where the C library is glibc.

    On a CPU, XLA gives a step's memory back after it, and the next step faults on every page of it
    anew: a tenth of the time of a step, which pages of 2 MiB save. glibc reads the setting only
    when a process starts, so this one starts again.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] == "glibc" and HUGE_PAGES.partition("=")[0] not in given:
        tunables = ":".join(filter(None, [given, HUGE_PAGES]))
        os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": tunables})


def _join_processes(given: Train) -> None:
    """Find the other processes of the run, if there are any.

    A process that dies is missed after 20 seconds instead of JAX's 100, and one that fails lets the
    others go after 10 instead of 300.
    """
    import jax

    try:
        jax.distributed.initialize(
            given.coordinator,
            given.num_processes,
            given.process_id,
            initialization_timeout=120,
            heartbeat_timeout_seconds=20,
            shutdown_timeout_seconds=10,
        )
    except ValueError as error:
        # JAX's words when it was given no address and sees no cluster: this is the only process.
        if "coordinator_address" not in str(error):
            raise ConfigError(
                f"the cluster does not say all that is needed ({error}): give --coordinator, "
                "--num-processes and --process-id"
            ) from error


class Interrupted(RuntimeError):
    """What was asked to stop has kept what is finished."""


def prepare(experiment: str, given: Prepare) -> None:
    """Build the stores that an experiment needs and that are not there; say what they hold."""
    from gptjax.corpus import is_built, load_corpus, store_folder
    from gptjax.data import check_rows
    from gptjax.tokenizer import make_tokenizer

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def accept(split: str, num_tokens: int) -> None:
        if not given.config.data.mixture:
            size = given.config.model.context_size
            check_rows(num_tokens, size, given.config.batch_size, split)

    signal.signal(signal.SIGTERM, stop)
    tokenizer = make_tokenizer(given.config.data)
    for data in _members(given.config.data):
        names = ["train", "valid"] if data.valid_path or data.holdout else ["train"]
        known = bool(data.path) and is_built(store_folder(data, tokenizer), names)
        began = time.perf_counter()
        try:
            stores = load_corpus(data, tokenizer, accept=accept, progress=True, beam=given.beam)
        except KeyboardInterrupt:
            raise Interrupted("the same command goes on with what is finished") from None
        seconds = time.perf_counter() - began
        for store in filter(None, stores):
            print(_store_table(store))
        size = sum(store.manifest.num_bytes for store in filter(None, stores))
        rate = f"{seconds:,.1f} s, {size / seconds / 1e6:,.1f} MB/s"
        print(f"time       {'built before' if known else rate}\n")
    same = given.config == load_experiment(experiment)
    print(f"next       gptjax train {experiment}{'' if same else ' and the same options'}")


def _members(data: "DataConfig") -> list["DataConfig"]:
    """The data of each store of a mixture; the data itself if it is none."""
    members = [
        {name: getattr(one, name) for name in ("path", "exclude", "valid_path", "holdout")}
        for one in data.mixture
    ]
    return [dataclasses.replace(data, mixture=(), **fields) for fields in members or [{}]]


def _store_table(store: "Store") -> str:
    """What a store holds, in a few lines."""
    manifest = store.manifest
    of_text = store.num_tokens - store.num_documents - 1
    per_token = f"{manifest.num_bytes / of_text:.3f} per token"
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in manifest.dropped.items())
    lines = {
        "store": store.folder,
        "documents": f"{store.num_documents:,}",
        "tokens": f"{store.num_tokens:,}",
        "bytes": f"{manifest.num_bytes:,}, {per_token}",
        "left out": left_out or "nothing",
    }
    return "\n".join(f"{name:10} {value}" for name, value in lines.items())


def generate(run_dir: str, given: Generate) -> None:
    """Print samples, token after token."""
    import jax

    from gptjax.generate import Sampling, stream
    from gptjax.tokenizer import StreamDecoder

    params, model, tokenizer = _load(run_dir, given.step)
    prompt = [tokenizer.end, *tokenizer.encode(given.prompt).tolist()]
    sampling = Sampling(
        max_tokens=given.max_tokens,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
    )
    for sample in range(given.num_samples):
        key = jax.random.fold_in(jax.random.key(given.seed), sample)
        decoder = StreamDecoder(tokenizer)
        if given.num_samples > 1:
            print(f"--- sample {sample + 1} of {given.num_samples} ---")
        print(given.prompt, end="", flush=True)
        for token in stream(params, prompt, model, sampling, key, end=tokenizer.end):
            print(decoder.push(token), end="", flush=True)
        print(decoder.flush())


def predict(run_dir: str, given: Predict) -> None:
    """Print the likeliest next tokens, with their probabilities as bars."""
    import numpy as np

    from gptjax.generate import next_token_logits

    params, model, tokenizer = _load(run_dir, given.step)
    prompt = [tokenizer.end, *tokenizer.encode(given.text).tolist()]
    logits = next_token_logits(params, prompt, model).astype(np.float64)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    likeliest = np.argsort(-probabilities)[: given.top]
    for token in likeliest:
        share = probabilities[token]
        bar = "█" * round(40 * share / probabilities[likeliest[0]])
        print(f"{share:8.4f}  {bar:40}  {_token_text(tokenizer, int(token))}")
    print(f"{1 - probabilities[likeliest].sum():8.4f}  for all other tokens")


def _token_text(tokenizer: "Tokenizer", token: int) -> str:
    special = {tokenizer.end: "end of text", tokenizer.pad: "padding"}
    if token in special:
        return special[token]
    given = tokenizer.decode_bytes([token])
    try:
        return repr(given.decode())
    except UnicodeDecodeError:  # a part of a character
        return repr(given)


def inspect(run_dir: str, given: Inspect) -> None:
    """Print what a run directory holds, on one CPU whatever wrote it."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from gptjax.checkpoint import Checkpoints, read_run
    from gptjax.model import param_letters

    config, _ = read_run(Path(run_dir))
    checkpoints = Checkpoints(Path(run_dir))
    print(f"run {run_dir}")
    print(f"steps {', '.join(map(str, checkpoints.steps())) or 'none yet'}")
    print(f"config {to_json(config)}", end="")
    if given.step is None and not checkpoints.steps():
        return
    stored = checkpoints.stored(given.step)
    axes = " x ".join(f"{axis} {size}" for axis, size in stored.mesh.items() if size > 1)
    print(f"parameters of step {stored.step}, written on {axes or 'one device'}")
    print(_parameter_table(stored.params, param_letters(config.model)))


def _parameter_table(params: Any, letters: Any) -> str:
    """A line for each parameter: path, letters, shape, dtype, bytes; and their sums."""
    import jax

    rows, count, size = [("parameter", "letters", "shape", "dtype", "bytes")], 0, 0
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), dimensions in zip(leaves, jax.tree.leaves(letters), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape, nbytes = " x ".join(map(str, leaf.shape)), leaf.size * leaf.dtype.itemsize
        rows.append((name, dimensions, shape, str(leaf.dtype), f"{nbytes:,}"))
        count, size = count + leaf.size, size + nbytes
    rows.append((f"{count:,} parameters", "", "", "", f"{size:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        *words, number = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([*words, number.strip().rjust(widths[-1])]))
    return "\n".join(lines)


def _load(run_dir: str, step: int | None) -> tuple["Params", "GPTConfig", "Tokenizer"]:
    """The parameters of a checkpoint on one device, with their model and tokenizer."""
    import jax

    from gptjax.checkpoint import Checkpoints, read_run
    from gptjax.model import abstract_params, resolve
    from gptjax.sharding import make_mesh

    config, tokenizer = read_run(Path(run_dir))
    devices = jax.devices()[:1]
    model, _ = resolve(config.model, devices[0].platform)
    like = abstract_params(model, make_mesh(MeshConfig(), devices))
    return Checkpoints(Path(run_dir)).restore_params(like, step), model, tokenizer


VERBS = {
    "prepare": (prepare, Prepare),
    "train": (train, Train),
    "generate": (generate, Generate),
    "predict": (predict, Predict),
    "inspect": (inspect, Inspect),
}
