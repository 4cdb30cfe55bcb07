"""Runs of the real command on a tiny model, to be disturbed: started, watched, compared."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.events import read_events

REPOSITORY = Path(__file__).resolve().parent.parent
MAIN = "import sys; from gptjax.cli import main; sys.exit(main())"
EXPERIMENT = """
from gptjax import Config, DataConfig, GPTConfig, OptimizerConfig, SampleConfig

def config():
    return Config(
        model=GPTConfig(
            context_size=64, num_layers=2, width=64, num_heads=4, compute_dtype="float32"
        ),
        data=DataConfig(path=("text.txt",)),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=10),
        sample=SampleConfig(max_tokens=0),
        steps=150, batch_size=12, log_every=1, eval_every=25, eval_batches=1, save_every=5,
        tensorboard=False,
    )
"""
# A tiny model compiles for longer than it runs: half as long with the last three.
FLAGS = (
    "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
POLL_SECONDS = 0.01
LIMIT_SECONDS = 900  # that a run may take, or a moment may be waited for: the machine may be busy
# What an unfinished save, removal or write is called.
SET_ASIDE = {"quarantine", "abandoned"}  # folders of what is kept, but is no part of a run
UNFINISHED = re.compile(r"\.(saving|deleting|replaced|new)\b|orbax-checkpoint-tmp")


class Late(AssertionError):
    """Something did not happen within its limit."""


@dataclass
class Command:
    """The command line, in a group of processes of its own, what it prints in a file."""

    process: subprocess.Popen
    log: Path
    began: float = field(default_factory=time.monotonic)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def last_line(self) -> str:
        lines = [line for line in self.text().splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def wait(self, limit: float = LIMIT_SECONDS) -> int:
        """The exit code.

        Raises:
          Late: if it is still there after so many seconds.
        """
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise Late(f"still there after {limit:g} seconds:\n{self.text()[-2000:]}") from None

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def end(self) -> None:
        """Kill it with all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Lab:
    """A folder with an experiment, its text, and what its runs leave.

    Compiled functions are kept in a folder beside, so a run that is started again begins soon.
    """

    def __init__(self, folder: Path, cache: Path, experiment: str = EXPERIMENT):
        self.folder, self.cache = Path(folder), Path(cache)
        self.mark = f"lab-{uuid.uuid4().hex}"  # in the environment of all that is started
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "run.py").write_text(experiment)
        rng = np.random.default_rng(0)
        lines = [f"{a} and {b} is {a + b}" for a, b in rng.integers(0, 500, (6000, 2)).tolist()]
        (self.folder / "text.txt").write_text("\n".join(lines))
        self.known: dict[tuple, str] = {}  # names of undisturbed runs, by what was asked for
        self.start_seconds = 0.0  # to the first step of the last of them

    def command(
        self, *words: str, fault: str = "", name: str = "command", program: str = MAIN
    ) -> Command:
        """Start `gptjax WORDS`, with a fault armed."""
        variables = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("JAX_", "XLA_", "GPTJAX_"))
        }
        variables |= {
            "GPTJAX_FAULT": fault,
            "GPTJAX_LAB": self.mark,
            "PYTHONPATH": str(REPOSITORY),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": FLAGS,
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        log = self.folder / "logs" / f"{name}-{uuid.uuid4().hex[:8]}.txt"
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", program, *words],
                cwd=self.folder,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Command(process, log)

    @contextlib.contextmanager
    def running(
        self,
        run: str,
        *options: str,
        processes: int = 1,
        fault: str = "",
        at: int | None = None,
    ) -> Iterator[list[Command]]:
        """The processes of a run; those still there in the end are killed.

        Args:
          fault: armed in the process `at`; None: in all of them.
        """
        launch: list[str] = []
        if processes > 1:
            launch = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes"]
            launch += [str(processes), "--process-id"]
        started: list[Command] = []
        try:
            for i in range(processes):
                own = [*launch, str(i)] if launch else []
                armed = fault if at in (None, i) else ""
                words = ["train", "run.py", "--run-dir", run, *options, *own]
                started.append(self.command(*words, fault=armed, name=f"{Path(run).name}-{i}"))
            yield started
        finally:
            for one in started:
                one.end()

    def finish(self, run: str, *options: str, processes: int = 1) -> None:
        """Let a run come to its end.

        Raises:
          AssertionError: if it does not end with 0.
        """
        with self.running(run, *options, processes=processes) as commands:
            _end_well(commands)

    def undisturbed(self, *options: str, processes: int = 1) -> str:
        """The name of a run that nothing disturbed, made when it is first asked for."""
        asked = (*options, processes)
        if asked not in self.known:
            run = f"undisturbed-{len(self.known)}"
            with self.running(run, *options, processes=processes) as commands:
                wait_until(lambda: self.last_logged(run), commands)
                self.start_seconds = time.monotonic() - commands[0].began
                _end_well(commands)
            self.known[asked] = run
        return self.known[asked]

    def metrics(self, run: str) -> list[dict[str, Any]]:
        """All lines that a run has logged."""
        path = self.folder / run / "metrics.jsonl"
        if not path.exists():
            return []
        *lines, _ = path.read_text().split("\n")  # after the last line end: one half written
        return [json.loads(line) for line in lines]

    def figures(self, run: str) -> dict[int, dict[str, Any]]:
        """What must be the same in every run, by step, in full precision.

        Raises:
          AssertionError: if steps do not ascend.
        """
        found = self.metrics(run)
        steps = [line["step"] for line in found]
        assert steps == sorted(set(steps)), f"{run}: steps are logged twice or out of order"
        kept = ("train/loss", "train/grad_norm", "eval/loss", "data/batch_hash")
        return {line["step"]: {name: line.get(name) for name in kept} for line in found}

    def last_logged(self, run: str) -> int:
        return max(self.figures(run), default=0)

    def saved(self, run: str) -> list[int]:
        """Steps whose folder has the name of a finished save."""
        folder = self.folder / run / "checkpoints"
        names = os.listdir(folder) if folder.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal())

    def passed_over(self, run: str) -> int:
        """Saves that came due in the last attempt after the step of the last finished one, while
        one was under way: that one, or another.
        """
        saved, skipped = 0, []
        for line in read_events(self.folder / run):
            if line["event"] == "start":
                skipped = []
            elif line["event"] == "save":
                saved = line["step"]
            elif line["event"] == "save_skipped":
                skipped.append(line["step"])
        return sum(step > saved for step in skipped)

    def unfinished(self, run: str) -> list[str]:
        """Files and folders of what was begun: after a run there must be none."""
        folder = self.folder / run
        found = []
        for path in folder.rglob("*"):
            name = str(path.relative_to(folder))
            if UNFINISHED.search(name) and not SET_ASIDE.intersection(path.parts):
                found.append(name)
        return sorted(found)

    def events(self, run: str, event: str) -> list[dict[str, Any]]:
        path = self.folder / run / "events.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [one for one in map(json.loads, lines) if one["event"] == event]

    def orphans(self) -> list[int]:
        """Processes that this lab has started and that are still there."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if self.mark.encode() in (folder / "environ").read_bytes() and state != "Z":
                    found.append(int(folder.name))
        return found


def _end_well(commands: Sequence[Command]) -> None:
    for one in commands:
        code = one.wait()
        assert code == 0, f"code {code}:\n{one.text()[-3000:]}"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until(
    condition: Callable[[], Any], commands: Sequence[Command] = (), limit: float = LIMIT_SECONDS
) -> Any:
    """What a condition gives once it is true.

    Raises:
      Late: if it never is within the limit, or all commands have ended meanwhile.
    """
    until = time.monotonic() + limit
    while not (found := condition()):
        ended = commands and all(one.process.poll() is not None for one in commands)
        if ended and not (found := condition()):
            codes = [one.process.returncode for one in commands]
            raise Late(f"the run ended with {codes}:\n{commands[0].text()[-3000:]}")
        if found:
            break
        if time.monotonic() > until:
            text = commands[0].text()[-3000:] if commands else ""
            raise Late(f"it did not come within {limit:g} seconds {text}")
        time.sleep(POLL_SECONDS)
    return found


def resumed_from(command: Command) -> int | None:
    """The step that a run says it goes on from; None: it has not said so."""
    found = re.search(r"resumed\s+from step ([\d,]+)", command.text())
    return int(found[1].replace(",", "")) if found else None


# --- states, in this process ---------------------------------------------------------------------


def like_of(run_dir: Path) -> Any:
    """The state of a run, as shapes on one device."""
    import jax

    from gptjax.config import MeshConfig
    from gptjax.rundir import read_run
    from gptjax.sharding import make_mesh
    from gptjax.step import abstract_state

    config, _ = read_run(run_dir)
    return abstract_state(config, make_mesh(MeshConfig(), jax.devices()[:1]))


def leaves_of(state: Any) -> list[bytes]:
    """All bits of a state."""
    import jax

    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(state))]


def state_of(run_dir: Path, step: int | None = None) -> list[bytes]:
    """All bits of what a run has saved; None: of the newest step."""
    from gptjax.checkpoint import Checkpoints

    return leaves_of(Checkpoints(run_dir).restore(like_of(run_dir), step))


def differences(lab: Lab, run: str, other: str) -> list[str]:
    """How two finished runs differ, in words."""
    found = []
    figures, others = lab.figures(run), lab.figures(other)
    if figures.keys() != others.keys():
        found.append(f"{run}: {len(figures)} steps are logged, in {other} {len(others)}")
    for step in sorted(figures.keys() & others.keys()):
        if figures[step] != others[step]:
            found.append(f"{run}: step {step} has {figures[step]}, in {other} {others[step]}")
            break
    if state_of(lab.folder / run) != state_of(lab.folder / other):
        found.append(f"{run}: its last state is not that of {other}")
    return found
