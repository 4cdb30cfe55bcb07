"""The verbs of a run: `gptjax train | generate | predict | inspect`."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gptjax.config import (
    Config,
    ConfigError,
    Count,
    MeshConfig,
    NotNegative,
    Probability,
    Whole,
    check,
    to_json,
)

if TYPE_CHECKING:
    from gptjax.config import GPTConfig
    from gptjax.model import Params
    from gptjax.tokenizer import Tokenizer


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


def train(experiment: str, given: Train) -> None:
    """Train, on all devices of all processes."""
    import jax

    _join_processes(given)
    check(given.config, jax.device_count())
    from gptjax.train import fit

    fit(given.config, Path(given.run_dir or Path("runs", given.config.name)))


def launch_problems(given: Train) -> Iterator[str]:
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


def generate(run_dir: str, given: Generate) -> None:
    """Print samples, token after token."""
    import jax

    from gptjax.decoding import stream
    from gptjax.sampling import Sampling
    from gptjax.tokenizer import StreamDecoder

    params, model, tokenizer = load_model(run_dir, given.step)
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

    from gptjax.decoding import next_token_logits

    params, model, tokenizer = load_model(run_dir, given.step)
    prompt = [tokenizer.end, *tokenizer.encode(given.text).tolist()]
    logits = next_token_logits(params, prompt, model).astype(np.float64)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    likeliest = np.argsort(-probabilities)[: given.top]
    for token in likeliest:
        share = probabilities[token]
        bar = "█" * round(40 * share / probabilities[likeliest[0]])
        print(f"{share:8.4f}  {bar:40}  {token_text(tokenizer, int(token))}")
    print(f"{1 - probabilities[likeliest].sum():8.4f}  for all other tokens")


def token_text(tokenizer: "Tokenizer", token: int) -> str:
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
    from gptjax.checkpoint import Checkpoints
    from gptjax.model import param_letters
    from gptjax.rundir import read_run

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


def load_model(run_dir: str, step: int | None) -> tuple["Params", "GPTConfig", "Tokenizer"]:
    """The parameters of a checkpoint on one device, with their model and tokenizer."""
    import jax

    from gptjax.checkpoint import Checkpoints
    from gptjax.model import abstract_params, resolve
    from gptjax.rundir import read_run
    from gptjax.sharding import make_mesh

    config, tokenizer = read_run(Path(run_dir))
    devices = jax.devices()[:1]
    model, _ = resolve(config.model, devices[0].platform)
    like = abstract_params(model, make_mesh(MeshConfig(), devices))
    return Checkpoints(Path(run_dir)).restore_params(like, step), model, tokenizer
