"""The verb that makes a run: `gptjax train`."""

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gptjax.config import (
    Config,
    ConfigError,
    Count,
    MeshConfig,
    Whole,
)
from gptjax.events import process_began
from gptjax.rundir import refuse_busy

if TYPE_CHECKING:
    from gptjax.config import GPTConfig
    from gptjax.model import Params
    from gptjax.tokenizer import Tokenizer

# Variables in which launchers say how many processes there are, and what makes JAX see them.
LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": "use Open MPI 4",
    "PMI_SIZE": "use Open MPI 4",
    "SLURM_NTASKS": "start it by srun",
}


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
    # a file of `gptjax plan --save`, of which the compiled step is taken if it is that of this run;
    # None: the step is compiled, unless this run has done that before
    executable: str | None = None
    # train so many times, with `seed` and those that follow it, each in a folder of the run
    # directory, and print the mean and the deviation of the figures
    seeds: Count = 1
    debug: bool = False  # show the traceback of an error
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


def train(experiment: str, given: Train) -> None:
    """Train, on all devices of all processes."""
    whole = Path(given.run_dir or Path("runs", given.config.name))
    configs = {whole: given.config}
    if given.seeds > 1:
        seeds = range(given.config.seed, given.config.seed + given.seeds)
        configs = {
            whole / f"seed-{seed}": dataclasses.replace(given.config, seed=seed) for seed in seeds
        }
    for run_dir in configs:
        refuse_busy(run_dir)
    _join_processes(given)
    from gptjax.outcome import over_seeds
    from gptjax.resume import Allowed, Origin
    from gptjax.train import fit

    fork_from = None
    if given.fork_from:
        run, at, step = given.fork_from.rpartition("@")
        known = bool(at) and step.isdecimal()
        fork_from = Origin(Path(run), int(step)) if known else Origin(Path(given.fork_from), None)
    for run_dir, config in configs.items():
        fit(
            config,
            run_dir,
            allowed=Allowed(given.allow_config_change, given.allow_data_change),
            fork_from=fork_from,
            executable=Path(given.executable) if given.executable else None,
            began=process_began(),
        )
        if config.task.kind:
            _write_reports(run_dir)
    if given.seeds > 1:
        print(over_seeds(list(configs), given.config), file=sys.stderr)


def _write_reports(run_dir: Path) -> None:
    """Of a task that was learnt: its figures and errors as pages."""
    import jax

    from gptjax.outcome import read_outcome, write_markdown
    from gptjax.page import write_page
    from gptjax.report import read

    if jax.process_index() > 0:
        return
    run = read(run_dir)
    if outcome := read_outcome(run_dir, run.config):
        pages = write_markdown(run_dir, run.config, outcome), write_page(run)
        print(f"report     {pages[0]}, {pages[1]}", file=sys.stderr)


def launch_problems(given: Train) -> Iterator[str]:
    """The violations of the rules between the options of `train` that are not of the config."""
    if given.seeds > 1 and given.fork_from:
        yield f"seeds = {given.seeds} and --fork-from exclude each other: give one of them"
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
    import jax

    from gptjax.watchdog import join_processes

    try:
        join_processes(given.coordinator, given.num_processes, given.process_id)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise
        # JAX's words when it was given no address and sees no cluster: this is the only process.
        alone = "coordinator_address" in str(error)
        what = _launched(os.environ) if alone else f"the cluster does not say all ({error}):"
        if what:
            raise ConfigError(
                f"{what} give --coordinator HOST:PORT of the first process, --num-processes and "
                "--process-id"
            ) from error


def _launched(environment: Mapping[str, str]) -> str:
    """What a launcher says of other processes where JAX sees none, and what may help.

    Each of them would train alone, in the same run directory.
    """
    for variable, remedy in LAUNCHERS.items():
        if (count := environment.get(variable, "1")) != "1":
            return f"{variable} = {count}, but JAX sees no other process: {remedy}, or"
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return "this is a pod of a Job, but JAX sees no other: install jax[k8s], or"
    return ""


def token_text(tokenizer: "Tokenizer", token: int) -> str:
    special = {tokenizer.begin: "beginning of text", tokenizer.pad: "padding"}
    special |= {tokenizer.end: "end of text"}
    if token in special:
        return special[token]
    if token >= tokenizer.vocab_size:  # of a padded vocabulary
        return "no token"
    given = tokenizer.decode_bytes([token])
    try:
        return repr(given.decode())
    except UnicodeDecodeError:  # a part of a character
        return repr(given)


def load_model(run_dir: str, step: int | None) -> tuple["Params", "GPTConfig", "Tokenizer"]:
    """The parameters of a checkpoint on one device, with their model and tokenizer."""
    import jax

    from gptjax.loading import load_params
    from gptjax.model import resolve
    from gptjax.rundir import read_run
    from gptjax.sharding import make_mesh

    config, tokenizer = read_run(Path(run_dir))
    devices = jax.devices()[:1]
    model, _ = resolve(config.model, devices[0].platform)
    mesh = make_mesh(MeshConfig(), devices)
    return load_params(Path(run_dir), model, mesh, step), model, tokenizer


def unwritten(name: str, text: str) -> Iterator[str]:
    """What is wrong with a text of the command line, if that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        yield f"{name}: not UTF-8 at byte {len(os.fsencode(text[: error.start]))}: give text"
