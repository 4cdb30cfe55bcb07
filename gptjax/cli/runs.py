"""The verbs of a run: `gptjax train | generate | predict`."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gptjax.config import (
    Config,
    ConfigError,
    Count,
    MeshConfig,
    NotNegative,
    Probability,
    Whole,
)
from gptjax.events import process_began
from gptjax.rundir import refuse_busy

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
    allow_config_change: bool = False  # go on with another learning rate, dropout, or the like
    allow_data_change: bool = False  # go on though the text is another than the run began with
    # RUN@STEP or RUN: begin as that run was after that step, or the latest; --run-dir is a new one
    fork_from: str | None = None
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


def train(experiment: str, given: Train) -> None:
    """Train, on all devices of all processes."""
    run_dir = Path(given.run_dir or Path("runs", given.config.name))
    refuse_busy(run_dir)
    _join_processes(given)
    from gptjax.resume import Allowed, Origin
    from gptjax.train import fit

    fork_from = None
    if given.fork_from:
        run, at, step = given.fork_from.rpartition("@")
        known = bool(at) and step.isdecimal()
        fork_from = Origin(Path(run), int(step)) if known else Origin(Path(given.fork_from), None)
    fit(
        given.config,
        run_dir,
        allowed=Allowed(given.allow_config_change, given.allow_data_change),
        fork_from=fork_from,
        began=process_began(),
    )


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
    """Find the other processes of the run, if there are any."""
    from gptjax.watchdog import join_processes

    try:
        join_processes(given.coordinator, given.num_processes, given.process_id)
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

    from gptjax.generate import Sampling, stream
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

    from gptjax.generate import next_token_logits

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
