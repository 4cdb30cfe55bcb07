"""The command line: `gptjax prepare | train | generate | predict | inspect | data | tokenizer`.

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
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from gptjax.config import (
    Config,
    ConfigError,
    Count,
    DataConfig,
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
    from tqdm import tqdm

    from gptjax.config import GPTConfig
    from gptjax.data import Exclusion, Passage, Rows
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

PIECE_BYTES = 1 << 22  # of a line that is learnt from at once

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


@dataclass(frozen=True)
class Data:
    """Tell which documents a step of the run directory RUN saw, blame them, leave them out."""

    step: Count | None = None  # whose batch is shown, counted from 1 as in metrics.jsonl
    rows: tuple[Whole, Whole] | None = None  # FIRST LAST of the batch, counted from 0; None: all
    blame: bool = False  # rank the documents by their mean loss under a checkpoint
    checkpoint: Whole | None = None  # step of that checkpoint; None: the newest
    top: Count | None = None  # so many of the worst documents; None: all
    skip: tuple[Count, ...] = ()  # steps whose documents the rest of the run leaves out
    verify: bool = False  # read all stores of the run, and compare them with their checksums
    debug: bool = False  # show the traceback of an error


@dataclass(frozen=True)
class TrainTokenizer:
    """Train a SentencePiece model on text, given as to --data.path."""

    more: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[TEXT ...]")] = ()
    out: str | None = None  # FILE.model, the new file
    text_field: str = "text"  # of a record that has several fields, such as a line of JSON
    vocab_size: Count = 8000  # pieces, with 256 of bytes, and unknown, end and padding
    kind: Literal["unigram", "bpe"] = "unigram"
    character_coverage: Probability = 0.9995  # of the text has pieces; the rest becomes bytes
    split_digits: bool = False  # each digit is a piece of its own
    max_bytes: Count = 100 << 20  # of text that is learnt from; of more, a sample spread over it
    debug: bool = False  # show the traceback of an error


@dataclass(frozen=True)
class InspectTokenizer:
    """Say what a tokenizer is, what it changes, and how many bytes of a text a token has."""

    text: tuple[str, ...] = ()  # as --data.path; one of each language perhaps
    text_field: str = "text"  # of a record that has several fields, such as a line of JSON
    debug: bool = False  # show the traceback of an error


@dataclass(frozen=True)
class EncodeText:
    """Print the ids of a text, each with what it stands for."""

    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")] = ""
    debug: bool = False  # show the traceback of an error


def main() -> int:
    """Run the command line; the exit code."""
    arguments = sys.argv[1:]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are processes
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
    groups = {verb.partition(" ")[0] for verb in VERBS if " " in verb}
    if {*arguments[:2]} <= {"-h", "--help", *groups} or arguments[0] in ("-h", "--help"):
        print("usage: gptjax VERB ...\n")
        for verb, (_, options) in VERBS.items():
            print(f"  {verb:19}{options.__doc__}")
        print("\n`gptjax VERB --help` lists the options of a verb.")
        return
    verb, *rest = arguments
    if verb in groups and rest:
        verb = f"{verb} {rest.pop(0)}"
    if verb not in VERBS:
        near = did_you_mean(verb, VERBS)
        raise ConfigError(f"{verb!r} is not a verb: give one of {', '.join(VERBS)}.{near}")
    run, options = VERBS[verb]
    target = rest.pop(0) if rest and not rest[0].startswith("-") else None
    default, placeholder = options(), PLACEHOLDERS.get(verb, "RUN")
    if target and hasattr(default, "config"):
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
    words = {int: "INT", float: "FLOAT", str: "TEXT"}

    def word(kind: Kind) -> str:
        if kind.base is not tuple:
            return "|".join(kind.choices) or words[kind.base]
        if dataclasses.is_dataclass(kind.items[0]):
            return "(in FILE.py)"
        each = " ".join(word(kind_of(item)) for item in kind.items)
        return f"[{each} ...]" if kind.many else each

    @registry.primitive_rule
    def value(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec | None:
        kind = kind_of(info.type)
        if kind.base is not tuple and kind.base not in words:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1 if tyro.conf.Positional in info.markers and kind.base is not tuple else "*",
            metavar=f"{word(kind)}|None" if kind.optional else word(kind),
            instance_from_str=lambda texts: _value(texts, kind),
            is_instance=kind.takes,
            str_from_instance=lambda given: [*_texts(given)],
        )

    return registry


def _value(texts: list[str], kind: Kind) -> Any:
    """What texts stand for in a field of a kind; where that is nothing, the texts themselves."""
    if kind.optional and texts == ["None"]:
        return None
    if kind.base is tuple:
        inner = kind_of(kind.items[0])
        if kind.many and inner.base is tuple:  # pairs, written one after the other
            size = len(inner.items)
            return tuple(_value(texts[i : i + size], inner) for i in range(0, len(texts), size))
        kinds = [inner] * len(texts) if kind.many else map(kind_of, kind.items)
        known = tuple(_value([text], one) for text, one in zip(texts, kinds, strict=False))
        return known + tuple(texts[len(known) :])
    if len(texts) != 1:
        return tuple(texts)
    try:
        return kind.base(texts[0])
    except (TypeError, ValueError):
        return texts[0]


def _texts(given: Any) -> Iterator[str]:
    """The texts that stand for a value; of a store of a mixture its name."""
    for item in given if isinstance(given, tuple) else [getattr(given, "name", given)]:
        if isinstance(item, tuple) or dataclasses.is_dataclass(item):
            yield from _texts(item)
        else:
            yield str(item)


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


def data(run_dir: str, given: Data) -> None:
    """Print the documents behind a step, recomputed from the config and the stores; leave them out
    of the rest of the run if that is asked for.
    """
    refuse([*_data_problems(given)])
    import jax

    if not given.blame:
        jax.config.update("jax_platforms", "cpu")
    from gptjax.checkpoint import Checkpoints, read_run
    from gptjax.data import Batch, batch_at, exclude, passages_at, read_exclusions, write_exclusions
    from gptjax.evaluate import document_losses
    from gptjax.metrics import read_metrics
    from gptjax.train import batch_hash, load_rows

    run = Path(run_dir)
    config, tokenizer = read_run(run)
    refuse([*_outside_problems(given, config)])
    rows, held_out = load_rows(config, tokenizer)
    if given.verify:
        for member in [*rows.members, *(split.members[0] for split in held_out.values())]:
            member.store.verify()
            print(f"verified {member.store.folder}: {member.store.num_tokens:,} tokens as built")
    if given.blame:
        params, model, _ = _load(run_dir, given.checkpoint)
    logged = {line["step"]: line.get("data/batch_hash") for line in read_metrics(run)}
    recorded = read_exclusions(run)
    # What the run has not taken up yet changed no step that it has done.
    newest = Checkpoints(run).latest() or 0
    done = max([newest, *logged])
    rows = exclude(
        rows,
        [one if one.taken_up else dataclasses.replace(one, from_step=done) for one in recorded],
    )
    which = slice(given.rows[0], given.rows[1] + 1) if given.rows else slice(0, rows.batch_size)
    passages, losses = [], []
    for step in given.skip or filter(None, [given.step]):
        batch = batch_at(step - 1, rows, which=slice(0, rows.batch_size))
        _compare_hash(step, int(batch_hash(batch)), logged.get(step))
        seen = passages_at(step - 1, rows, which=which)
        passages += seen
        if given.blame:
            part = Batch(*(x[which] for x in batch))
            losses += document_losses(params, part, seen, model)
    if given.step and not given.blame:
        print(_passage_table(passages, tokenizer))
    elif passages:
        documents = _by_document(passages, losses)[: given.top]
        print(_document_table(documents, tokenizer))
        if given.skip:
            new = _exclusions(documents, newest, recorded, tokenizer)
            exclude(rows, [*recorded, *new])  # refuses what would leave nothing
            write_exclusions(run, [*recorded, *new])
            print(_left_out(new, rows, run, newest))


def _data_problems(given: Data) -> Iterator[str]:
    """The violations of the rules between the options of `data`."""
    if given.step is None and not given.skip and not given.verify:
        yield "nothing is asked for: give --step STEP, --skip STEP ... or --verify"
    if given.step is not None and given.skip:
        yield "--step shows a step and --skip leaves out steps: give one of them"
    if given.step is None and not given.skip and (given.rows or given.blame):
        yield "--rows and --blame are of a step: give --step STEP or --skip STEP ..."
    if not given.blame and (given.checkpoint is not None or given.top is not None):
        yield "--checkpoint and --top say how to blame: give --blame with them"
    if given.rows and given.rows[0] > given.rows[1]:
        first, last = given.rows
        yield f"rows = {first} {last}: the first comes after the last: give {last} {first}"


def _outside_problems(given: Data, config: Config) -> Iterator[str]:
    """Steps and rows that the run does not have."""
    for step in given.skip or filter(None, [given.step]):
        if step > config.steps:
            yield f"step {step:,}: the run has {config.steps:,} steps: give one from 1 to that"
    if given.rows and given.rows[1] >= config.batch_size:
        yield f"rows: {given.rows[1]} is given: a batch has rows 0 to {config.batch_size - 1}"


def _compare_hash(step: int, found: int, logged: float | None) -> None:
    """Print the hash of a batch, and refuse one that is not what the run saw."""
    from gptjax.sources import DataError

    if logged is not None and found != logged:
        raise DataError(
            f"step {step:,}: its batch has the hash {found}, but metrics.jsonl says {logged}: the "
            "stores or skipped.json are not what they were; --verify reads the stores again"
        )
    said = "metrics.jsonl does not list this step" if logged is None else "as in metrics.jsonl"
    print(f"step {step:,}: batch hash {found} ({said})")


def _by_document(
    passages: list["Passage"], losses: list[tuple[float, int]]
) -> list[tuple["Passage", float, int]]:
    """Each document's first passage, sum of losses and number of tokens that count; with losses,
    the worst mean first.
    """
    documents = {}
    for passage, (nats, count) in zip(passages, losses or [(0.0, 0)] * len(passages), strict=True):
        if passage.excluded:
            continue
        key = (passage.member.name, passage.document.number)
        first, total, number = documents.get(key, (passage, 0.0, 0))
        documents[key] = (first, total + nats, number + count)
    found = list(documents.values())
    return sorted(found, key=lambda one: -one[1] / max(one[2], 1)) if losses else found


def _exclusions(
    documents: list[tuple["Passage", float, int]],
    newest: int,
    recorded: tuple["Exclusion", ...],
    tokenizer: "Tokenizer",
) -> list["Exclusion"]:
    """The record of documents that are to be left out, without those that are recorded already."""
    from gptjax.data import Exclusion

    known = {(one.store, one.document) for one in recorded}
    return [
        Exclusion(
            from_step=newest,
            taken_up=False,
            store=passage.member.name,
            document=passage.document.number,
            start=passage.document.start,
            stop=passage.document.stop,
            source=passage.document.source,
            position=passage.document.position,
            text=_preview(passage, passage.document.start, tokenizer),
        )
        for passage, _, _ in documents
        if (passage.member.name, passage.document.number) not in known
    ]


def _left_out(new: list["Exclusion"], rows: "Rows", run: Path, newest: int) -> str:
    """How much is left out, and from when on."""
    lines = []
    for member in rows.members:
        sizes = [one.stop - one.start for one in new if one.store == member.name]
        share = sum(sizes) / member.store.num_tokens
        if sizes:
            lines.append(
                f"left out of {member.name}: {len(sizes):,} documents, {sum(sizes):,} tokens, "
                f"{share:.2%} of it"
            )
    when = f"in effect once the run is started again, which goes on after step {newest:,}"
    return "\n".join([*(lines or ["nothing new is left out"]), f"{run / 'skipped.json'}: {when}"])


def _passage_table(passages: list["Passage"], tokenizer: "Tokenizer") -> str:
    lines = [("row", "store", "document", "source", "position", "tokens", "text")]
    for one in passages:
        text = "(left out)" if one.excluded else _preview(one, one.start, tokenizer)
        tokens = f"{one.start:,} to {one.stop:,}"
        lines.append((str(one.row), *_place(one), tokens, text))
    return _aligned(lines)


def _document_table(documents: list[tuple["Passage", float, int]], tokenizer: "Tokenizer") -> str:
    lines = [("loss", "tokens", "store", "document", "source", "position", "text")]
    for one, nats, count in documents:
        loss = f"{nats / count:.4f}" if count else ""
        tokens = f"{count or one.document.stop - one.document.start:,}"
        lines.append((loss, tokens, *_place(one), _preview(one, one.start, tokenizer)))
    return _aligned(lines)


def _place(passage: "Passage") -> tuple[str, str, str, str]:
    document = passage.document
    return passage.member.name, str(document.number), document.source, f"{document.position:,}"


def _preview(passage: "Passage", start: int, tokenizer: "Tokenizer") -> str:
    """The text of a document from a token on, in one line of at most 60 characters."""
    import numpy as np

    most = 4 * 60  # no character has more tokens than it has bytes
    length = min(passage.document.stop - start, most)
    (tokens,) = passage.member.store.read(np.array([start]), length, tokenizer.pad)
    text = repr(tokenizer.decode(tokens[tokens != tokenizer.end]))[1:-1]
    return text if len(text) <= 60 else f"{text[:57]}..."


def _aligned(lines: list[tuple[str, ...]]) -> str:
    """Lines of cells under each other."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def train_tokenizer(first: str, given: TrainTokenizer) -> None:
    """Train a tokenizer, and say how well it does."""
    from tqdm import tqdm

    from gptjax.tokenizer import train_sentencepiece

    if not (given.out or "").endswith(".model"):
        raise ConfigError(f"out = {given.out!r}: give the new file, as in --out text.model")
    with tqdm(desc="reading", unit="B", unit_scale=True) as bar:
        trained = train_sentencepiece(
            _text_of((first, *given.more), given.text_field, bar, then="training"),
            Path(given.out),
            vocab_size=given.vocab_size,
            kind=given.kind,
            character_coverage=given.character_coverage,
            split_digits=given.split_digits,
            max_bytes=given.max_bytes,
        )
    print(f"text       {trained.used_bytes:,} of {trained.num_bytes:,} bytes were learnt from")
    print(
        f"tokenizer  {given.out}: {trained.tokenizer.vocab_size:,} pieces, {given.kind}, "
        f"{trained.bytes_per_token:.3f} bytes per token of that text"
    )
    print(f"next       gptjax train FILE.py --data.tokenizer {given.out}")


def _text_of(
    paths: tuple[str, ...], text_field: str, bar: "tqdm", then: str = ""
) -> Iterator[bytes]:
    """The text of what paths name, in pieces that end where a line does; the bar says `then` at
    the end.
    """
    from gptjax.sources import find_sources

    sources = find_sources(DataConfig(path=paths, text_field=text_field))
    for record in (record for source in sources for record in source.records()):
        left = b""
        for piece in record.pieces():
            bar.update(len(piece))
            lines, end, left = (left + piece).rpartition(b"\n")
            yield lines + end
            if len(left) >= PIECE_BYTES:
                yield left
                left = b""
        yield left
    bar.set_description_str(then)


def inspect_tokenizer(name: str, given: InspectTokenizer) -> None:
    """Print what a tokenizer is, and what it makes of texts."""
    from tqdm import tqdm

    from gptjax.tokenizer import make_tokenizer

    tokenizer = make_tokenizer(DataConfig(tokenizer=name))
    print(f"kind         {tokenizer.kind}")
    print(f"ids          {tokenizer.vocab_size:,}")
    print(f"special      end of text {tokenizer.end}, padding {tokenizer.pad}")
    print(f"fingerprint  {tokenizer.fingerprint}")
    changes = tokenizer.normalises or ("nothing: every text, and every byte string, comes back",)
    print("changes      " + "\n             ".join(changes))
    for path in given.text:
        num_bytes = num_tokens = 0
        start = time.perf_counter()
        with tqdm(desc=path, unit="B", unit_scale=True, leave=False) as bar:
            for text in _text_of((path,), given.text_field, bar):
                num_bytes += len(text)
                num_tokens += len(tokenizer.encode(text))
        speed = num_bytes / (time.perf_counter() - start) / 1e6
        print(
            f"text         {path}: {num_bytes:,} bytes, {num_tokens:,} tokens, "
            f"{num_bytes / max(num_tokens, 1):.3f} bytes per token, {speed:.1f} MB/s"
        )


def encode_text(name: str, given: EncodeText) -> None:
    """Print the ids of a text."""
    from gptjax.tokenizer import make_tokenizer

    tokenizer = make_tokenizer(DataConfig(tokenizer=name))
    for token in tokenizer.encode(os.fsencode(given.text)).tolist():
        print(f"{token:8}  {_token_text(tokenizer, token)}")


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
    "data": (data, Data),
    "tokenizer train": (train_tokenizer, TrainTokenizer),
    "tokenizer inspect": (inspect_tokenizer, InspectTokenizer),
    "tokenizer encode": (encode_text, EncodeText),
}
# What a verb's first argument is called, unless that is RUN.
PLACEHOLDERS = {
    "prepare": "FILE",
    "train": "FILE",
    "tokenizer train": "TEXT",
    "tokenizer inspect": "TOKENIZER",
    "tokenizer encode": "TOKENIZER",
}
