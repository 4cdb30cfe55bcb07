"""Show that a run survives what happens to it: killed, corrupted, without space, hung.

    python tools/faults.py kills --count 200 --jobs 2
    python tools/faults.py kills --processes 2 --count 50
    python tools/faults.py all --quick

Each campaign starts the real command on a tiny model, disturbs it, and compares what comes of it
with what there is to lose: every logged loss in full precision, every bit of the last state. It is
drawn from a seed, so a campaign can be repeated. For each one JSON line is printed, and at the end
a line that says whether all is well; the exit code is 1 where it is not.

kills: kill -9 at instants drawn from the whole life of a run, again and again, until so many kills
were survived and the runs have come to their end. Of several processes one is killed, and the
others have to end by themselves and say why.
points: kill -9 at each named point, where an instant would rarely hit.
mutations: bytes of a saved step flipped, zeroed, cut off, swapped, deleted. Restoring gives what
was saved, or goes back to the step before; never anything else.
storage: the disk full at a save, for a while or for ever; read-only; the folder gone.
signals: SIGTERM and SIGINT in every phase. Nothing is lost, and the run ends soon.
processes: of three one is killed, fails, is stopped, is stuck. The others end soon and say why.
configs: misspelled and impossible options. All are refused, before JAX is imported.
numerics: a gradient that is not finite, once or for ever, and a clean run where nothing is skipped.
overhead: what all the guards cost a step; seconds to verify a large step.
"""

import argparse
import contextlib
import datetime
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import commit, hardware, positive
from lab import (
    Command,
    Lab,
    Late,
    differences,
    leaves_of,
    like_of,
    resumed_from,
    state_of,
    wait_until,
)
from tqdm import tqdm

from gptjax.faults import POINTS

SAVE_EVERY = 5  # of the experiment
TRAINING_SHARE = 0.7  # of kills, that fall after the first step of a life
GONE_SECONDS = 30  # after which no process of a run is left that has lost one
LEAST_CODE, MOST_CODE = 42, 44  # of a process that ends because of another

Tell = Callable[[int], None]  # how many of a campaign's trials are done since the last call


@dataclass
class Outcome:
    """What a campaign found."""

    campaign: str
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    skipped: str = ""  # why it could not be tried

    def check(self, right: bool, problem: str) -> None:
        if not right:
            self.problems.append(problem)

    def to_json(self) -> str:
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        about = {"campaign": self.campaign, "ok": not self.problems, "date": when}
        about |= {"commit": commit(), "hardware": hardware()}
        if self.skipped:
            about["skipped"] = self.skipped
        return json.dumps(about | self.figures | {"problems": self.problems})


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, 95th percentile and most."""
    if not values:
        return {}
    ordered = sorted(values)
    late = ordered[math.ceil(0.95 * len(ordered)) - 1]
    figures = {"p50": statistics.median(ordered), "p95": late, "most": ordered[-1]}
    return {name: round(value, digits) for name, value in figures.items()}


def in_turn(jobs: int, tasks: Sequence[Callable[[], None]]) -> None:
    """Do all tasks, so many at once."""
    with ThreadPoolExecutor(jobs) as threads:
        for done in [threads.submit(task) for task in tasks]:
            done.result()


def no_tell(count: int) -> None:
    """Tell nobody."""


# --- kills ---------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What the lives of some runs have shown."""

    outcome: Outcome
    phases: Counter = field(default_factory=Counter)  # where a kill hit
    resume_seconds: list[float] = field(default_factory=list)  # to the first new step
    lost: list[int] = field(default_factory=list)  # steps of a kill
    exit_seconds: list[float] = field(default_factory=list)  # of the other processes
    codes: Counter = field(default_factory=Counter)  # of the other processes
    start_seconds: float = 0.0  # to the first step, as last seen


@dataclass(frozen=True)
class Instant:
    """When to kill."""

    in_training: bool
    seconds: float  # after the first step of a life; otherwise after its start


@dataclass
class Life:
    """A run that is killed and started again, and what is known of it."""

    run: str
    options: tuple[str, ...]
    processes: int
    ledger: dict[int, dict] = field(default_factory=dict)  # figures of every step ever logged
    logged: int = 0  # the last step that is logged, when it was killed
    most_lost: int = 0  # that may be, by what was going on when it was killed


def kills(
    lab: Lab,
    *,
    count: int = 200,
    processes: int = 1,
    seed: int = 0,
    steps: int = 2000,
    span: float = 8.0,
    jobs: int = 1,
    tell: Tell = no_tell,
) -> Outcome:
    """Kill runs at random instants, until so many kills were survived.

    Args:
      span: seconds after its first step in which a kill may fall. Some fall before.
    """
    options = ("--steps", str(steps))
    whole = lab.undisturbed(*options, processes=processes)
    outcome = Outcome("kills", {"processes": processes, "steps": steps})
    tally = Tally(outcome, start_seconds=lab.start_seconds)
    shares = [count // jobs + (job < count % jobs) for job in range(jobs)]
    lives: list[Life] = []

    def job(number: int, share: int) -> None:
        draw = random.Random(f"{seed} {number}")
        killed = 0
        while killed < share:
            life = Life(f"kills-{processes}-{number}-{killed}", options, processes)
            lives.append(life)
            while True:
                instant = None
                if killed < share:
                    in_training = draw.random() < TRAINING_SHARE
                    most = span if in_training else tally.start_seconds
                    instant = Instant(in_training, draw.uniform(0, most))
                if not _live(lab, life, instant, draw, tally):
                    break
                killed += 1
                tell(1)

    in_turn(jobs, [lambda n=n, share=share: job(n, share) for n, share in enumerate(shares)])
    for life in lives:
        outcome.problems += differences(lab, life.run, whole)
        outcome.check(
            not (left := lab.unfinished(life.run)), f"{life.run}: left behind {', '.join(left)}"
        )
    outcome.check(not lab.orphans(), f"processes are left: {lab.orphans()}")
    outcome.figures |= {
        "kills": sum(tally.phases.values()),
        "runs": len(lives),
        "bitwise_equal": not any("of that" in one or "has" in one for one in outcome.problems),
        "where": dict(tally.phases),
        "resume_seconds": spread(tally.resume_seconds),
        "lost_steps": spread(tally.lost),
    }
    if processes > 1:
        outcome.figures["exit_seconds"] = spread(tally.exit_seconds)
        outcome.figures["codes"] = {str(code): n for code, n in tally.codes.items()}
    return outcome


def _live(lab: Lab, life: Life, instant: Instant | None, draw: random.Random, tally: Tally) -> bool:
    """Start a run, and kill it; whether it was still there."""
    had_steps, logged, most_lost = lab.saved(life.run), life.logged, life.most_lost
    with lab.running(life.run, *life.options, processes=life.processes) as commands:
        first = commands[0]
        # Processes that wait for one that never came are JAX's concern, with a limit of its own.
        if life.processes > 1 and instant is not None:
            wait_until(lambda: "mesh " in first.text(), commands)
        began, stepped = time.monotonic(), 0.0
        while any(one.process.poll() is None for one in commands):
            resumed = resumed_from(first) if had_steps else 0
            if not stepped and resumed is not None and lab.last_logged(life.run) > resumed:
                stepped = time.monotonic()
                tally.start_seconds = stepped - began
                if had_steps:
                    tally.resume_seconds.append(stepped - first.began)
            since = stepped if instant and instant.in_training else began
            if instant and since and time.monotonic() - since >= instant.seconds:
                _kill(lab, life, commands, bool(stepped), draw, tally)
                break
            time.sleep(0.02)
        killed = any(one.process.poll() == -signal.SIGKILL for one in commands)
        resumed = resumed_from(first)
        if logged and (resumed is not None or not had_steps):  # now it is known what was lost
            lost = logged - (resumed or 0)
            tally.lost.append(max(lost, 0))
            tally.outcome.check(
                lost <= most_lost,
                f"{life.run}: goes on from step {resumed} though step {logged} was logged",
            )
        _note_figures(lab, life, tally)
    if not killed:
        codes = [one.process.returncode for one in commands]
        assert not any(codes), f"{life.run}: ended with {codes}:\n{first.text()[-3000:]}"
    return killed


def _kill(
    lab: Lab,
    life: Life,
    commands: list[Command],
    stepped: bool,
    draw: random.Random,
    tally: Tally,
) -> None:
    """Kill one process, and see the others end."""
    victim = draw.randrange(life.processes)
    commands[victim].send(signal.SIGKILL)
    began = time.monotonic()
    code = commands[victim].wait()
    if code != -signal.SIGKILL:  # it was just done
        return
    unfinished = lab.unfinished(life.run)
    saving = any(".saving" in name or "-tmp" in name for name in unfinished)
    removing = any(".deleting" in name for name in unfinished)
    phase = "saving" if saving else "removing" if removing else "training" if stepped else "start"
    tally.phases[phase] += 1
    life.logged = lab.last_logged(life.run)
    if stepped:  # a save may be on its way, before its folder is there; those that come due wait
        life.most_lost = SAVE_EVERY * (2 + lab.passed_over(life.run))
    for i, other in enumerate(commands):
        if i == victim:
            continue
        try:
            code = other.wait(GONE_SECONDS)
        except Late as late:
            tally.outcome.problems.append(f"{life.run}: process {i}: {late}")
            continue
        tally.codes[code] += 1
        tally.outcome.check(
            code == 0 or LEAST_CODE <= code <= MOST_CODE,
            f"{life.run}: process {i} ended with {code} as {victim} was killed: "
            f"{other.last_line()}",
        )
        tally.outcome.check(
            code == 0 or f"process {victim}" in other.text(),
            f"{life.run}: process {i} does not name process {victim}: {other.last_line()}",
        )
    if life.processes > 1:
        tally.exit_seconds.append(time.monotonic() - began)


def _note_figures(lab: Lab, life: Life, tally: Tally) -> None:
    """A step that is trained again has the same figures."""
    for step, values in lab.figures(life.run).items():
        before = life.ledger.setdefault(step, values)
        tally.outcome.check(
            before == values, f"{life.run}: step {step} was {before} and then has {values}"
        )


# --- points --------------------------------------------------------------------------------------

# The visit of a point at which it is killed, where that is not the first.
VISITS = {"batch_read": 9, "step_end": 9, "copied": 2, "written": 2, "sealed": 2, "renamed": 2}


def points(
    lab: Lab, *, names: Sequence[str] = POINTS, jobs: int = 1, tell: Tell = no_tell
) -> Outcome:
    """Kill a run at each of the points, one after the other, then let it come to its end."""
    options = ("--steps", "150")
    whole = lab.undisturbed(*options)
    outcome, passed = Outcome("points"), []
    # Nothing is restored before something is saved, and all is done before the sample.
    late = ("restore", "sample")
    names = sorted(names, key=lambda name: late.index(name) + 1 if name in late else 0)
    chains = [names[job::jobs] for job in range(jobs)]

    def survive(chain: Sequence[str]) -> None:
        runs = [f"points-{chain[0]}"]
        for name in chain:
            fault = f"{name}:kill9@{VISITS.get(name, 1)}"
            with lab.running(runs[-1], *options, fault=fault) as [command]:
                code = command.wait()
            if code == -signal.SIGKILL:
                passed.append(name)
            else:
                outcome.problems.append(f"{name}: code {code}, the run never came there")
                runs.append(f"points-after-{name}")
            tell(1)
        for run in runs:
            lab.finish(run, *options)
            outcome.problems += differences(lab, run, whole)
            left = lab.unfinished(run)
            outcome.check(not left, f"{run}: left behind {', '.join(left)}")

    in_turn(jobs, [lambda chain=chain: survive(chain) for chain in chains if chain])
    outcome.figures |= {"points": len(names), "passed": len(passed)}
    return outcome


# --- mutations -----------------------------------------------------------------------------------


def _flip(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return (
        content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
    )


def _overwrite(content: bytes, draw: random.Random, byte: bytes) -> bytes:
    start = draw.randrange(len(content))
    stop = min(len(content), start + draw.randint(1, 64))
    return content[:start] + byte * (stop - start) + content[stop:]


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "flip": _flip,
    "zero": lambda content, draw: _overwrite(content, draw, b"\x00"),
    "ones": lambda content, draw: _overwrite(content, draw, b"\xff"),
    "truncate": lambda content, draw: content[: draw.randrange(len(content))],
    "append": lambda content, draw: content + draw.randbytes(draw.randint(1, 64)),
    "delete": lambda content, draw: None,
}


def mutate(folder: Path, draw: random.Random) -> str | None:
    """Change a file of a step, or two; what was done, None where nothing differs."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    kind = draw.choice([*MUTATIONS, "swap"])
    # Kinds of files have the same chance, whatever their number.
    path = draw.choice([one for one in files if one.name == draw.choice(files).name] or files)
    before = path.read_bytes()
    if kind == "swap":
        other = draw.choice(files)
        after = other.read_bytes()
        path.write_bytes(after)
        other.write_bytes(before)
        return None if after == before else f"swap {path.name} and {other.name}"
    if not before and kind not in ("append", "delete"):
        return None
    after = MUTATIONS[kind](before, draw)
    if after is None:
        path.unlink()
    else:
        path.write_bytes(after)
    return None if after == before else f"{kind} {path.relative_to(folder)}"


def mutations(lab: Lab, *, count: int = 1000, seed: int = 0, tell: Tell = no_tell) -> Outcome:
    """Change the bytes of the newest step, and restore."""
    from gptjax.checkpoint import Checkpoints
    from gptjax.rundir import CheckpointError

    whole, run_dir = lab.undisturbed("--steps", "150"), lab.folder / "mutated"
    outcome, like = Outcome("mutations"), like_of(lab.folder / whole)
    *_, before, newest = lab.saved(whole)
    right = {step: state_of(lab.folder / whole, step) for step in (before, newest)}
    draw, found, kinds, seconds = random.Random(seed), Counter(), Counter(), []
    while sum(kinds.values()) < count:
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(lab.folder / whole, run_dir)
        what = mutate(run_dir / "checkpoints" / str(newest), draw)
        if what is None:
            continue
        kinds[what.partition(" ")[0]] += 1
        damage = Checkpoints(run_dir).verify(newest)
        began = time.monotonic()
        try:
            state = leaves_of(Checkpoints(run_dir).restore(like))
        except CheckpointError as error:
            state = error
        seconds.append(time.monotonic() - began)
        if state == right[newest]:
            verdict = "harmless"
            outcome.check(not damage, f"{what}: restored, but verifying finds {damage}")
        elif state == right[before]:
            verdict = "fell back"
            outcome.check(bool(damage), f"{what}: fell back, but verifying finds nothing")
        else:
            verdict = "refused" if isinstance(state, CheckpointError) else "silently wrong"
            outcome.problems.append(f"{what}: {verdict} {state if verdict == 'refused' else ''}")
        found[verdict] += 1
        tell(1)
    shutil.rmtree(run_dir, ignore_errors=True)
    outcome.figures |= {"mutations": count, "kinds": dict(kinds), "found": dict(found)}
    outcome.figures["silently_wrong"] = found["silently wrong"]
    outcome.figures["restore_seconds"] = spread(seconds)
    return outcome


# --- storage -------------------------------------------------------------------------------------

# Steps as slow as those of a large model, so that a save takes less than one.
SLOW_STEPS = "step_end:sleep=0.1@1-100000"
RETRIES = ("--guard.save-backoff", "0.2", "--guard.save-retries", "3")


def storage(lab: Lab, *, kinds: Sequence[str] = (), tell: Tell = no_tell) -> Outcome:
    """Take the storage away from a run, in some ways or all."""
    outcome = Outcome("storage")
    whole = lab.undisturbed("--steps", "30")
    for kind in kinds or STORAGE:
        try:
            STORAGE[kind](lab, f"storage-{kind}", whole, outcome)
        except (Late, AssertionError) as error:
            outcome.problems.append(f"{kind}: {error}")
        except PermissionError as error:
            outcome.skipped = f"{outcome.skipped} {kind}: {error}".strip()
        tell(1)
    return outcome


@contextlib.contextmanager
def mounted(folder: Path, *words: str) -> Iterator[None]:
    """Something is mounted at a folder.

    Raises:
      PermissionError: if that is not allowed here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *words, str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(f"mounting is not allowed: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextlib.contextmanager
def _about_to_fail(
    lab: Lab, run: str, outcome: Outcome, break_it: Callable[[], None]
) -> Iterator[Command]:
    """A run whose storage breaks after its first save, once it has told of that."""
    with lab.running(run, "--steps", "30", *RETRIES, fault=SLOW_STEPS) as [command]:
        wait_until(lambda: lab.saved(run) and lab.last_logged(run) >= SAVE_EVERY, [command])
        first = lab.folder / run / "checkpoints" / str(SAVE_EVERY)
        before = _contents(first)
        break_it()
        report = wait_until(lambda: "error[6]" in command.text() or "saves again" in command.text())
        assert report
        late = lab.last_logged(run) - 2 * SAVE_EVERY
        outcome.figures.setdefault("steps_until_told", []).append(late)
        outcome.check(late <= 1, f"{run}: told {late} steps late")
        if first.exists():
            outcome.check(_contents(first) == before, f"{run}: the older checkpoint has changed")
        yield command


def _full_for_a_while(lab: Lab, run: str, whole: str, outcome: Outcome) -> None:
    with mounted(lab.folder / run, "-t", "tmpfs", "-o", "size=24m", "tmpfs"):
        filler = lab.folder / run / "filler"
        with _about_to_fail(lab, f"{run}/run", outcome, lambda: _fill(filler)) as command:
            filler.unlink()
            code = command.wait()
        outcome.check(code == 0, f"{run}: code {code} though there is space again")
        outcome.problems += differences(lab, f"{run}/run", whole)
        left = lab.unfinished(f"{run}/run")
        outcome.check(not left, f"{run}: left behind {', '.join(left)}")


def _full_for_ever(lab: Lab, run: str, whole: str, outcome: Outcome) -> None:
    with mounted(lab.folder / run, "-t", "tmpfs", "-o", "size=24m", "tmpfs"):
        filler = lab.folder / run / "filler"
        with _about_to_fail(lab, f"{run}/run", outcome, lambda: _fill(filler)) as command:
            _ends_with_6(lab, f"{run}/run", command, outcome)
        filler.unlink()
        lab.finish(f"{run}/run", "--steps", "30")
        outcome.problems += differences(lab, f"{run}/run", whole)


def _read_only(lab: Lab, run: str, whole: str, outcome: Outcome) -> None:
    folder = lab.folder / run / "checkpoints"
    with mounted(folder, "--bind", str(folder.parent / "real")) if _make(folder) else None:
        remount = ["mount", "-o", "remount,ro,bind", str(folder)]

        def protect() -> None:
            wait_until(lambda: subprocess.run(remount, capture_output=True).returncode == 0)

        with _about_to_fail(lab, run, outcome, protect) as command:
            _ends_with_6(lab, run, command, outcome)
        subprocess.run(["mount", "-o", "remount,rw,bind", str(folder)], check=True)
        lab.finish(run, "--steps", "30")
        outcome.problems += differences(lab, run, whole)


def _make(folder: Path) -> Path:
    """The folder, and one beside it that is to appear there."""
    folder.mkdir(parents=True)
    (folder.parent / "real").mkdir()
    return folder


def _folder_gone(lab: Lab, run: str, whole: str, outcome: Outcome) -> None:
    """It may be made again: what counts is that the end is told as it is."""
    with lab.running(run, "--steps", "30", *RETRIES, fault=SLOW_STEPS) as [command]:
        wait_until(lambda: lab.saved(run), [command])
        shutil.rmtree(lab.folder / run / "checkpoints")
        code = command.wait()
    if code == 0:
        outcome.problems += differences(lab, run, whole)
    else:
        outcome.check(code == 6, f"{run}: code {code}, {command.last_line()}")


def _ends_with_6(lab: Lab, run: str, command: Command, outcome: Outcome) -> None:
    code = command.wait()
    said = command.last_line()
    outcome.check(code == 6 and "error[6]" in said, f"{run}: code {code}, {said}")
    kept = lab.saved(run)
    outcome.check(kept[:1] == [SAVE_EVERY], f"{run}: the checkpoint before has gone: {kept}")


def _fill(filler: Path) -> None:
    """Leave less than a checkpoint needs, and enough for lines of logs."""
    free = os.statvfs(filler.parent)
    filler.write_bytes(bytes(free.f_bavail * free.f_frsize - (256 << 10)))


STORAGE: dict[str, Callable[[Lab, str, str, Outcome], None]] = {
    "full for a while": _full_for_a_while,
    "full for ever": _full_for_ever,
    "read-only": _read_only,
    "folder gone": _folder_gone,
}


# --- signals -------------------------------------------------------------------------------------

# Of each phase: what holds the run there, and the most seconds that it may take to end: to compile
# and to restore need not be waited for, the others come to the end of what is begun, held or not.
PHASES = {
    "compile": ("compile:sleep=30", 5.0),
    "step": ("step_end:sleep=1@9", 3.0),
    "evaluation": ("evaluate:sleep=1", 3.0),
    "save": ("copied:sleep=1@2", 3.0),
    "data wait": ("batch_read:sleep=30@9", 5.0),
    "restore": ("restore:sleep=30", 5.0),
}


def signals(
    lab: Lab,
    *,
    numbers: Sequence[int] = (signal.SIGTERM, signal.SIGINT),
    patience: float = 1.0,
    jobs: int = 1,
    tell: Tell = no_tell,
) -> Outcome:
    """Send a signal in every phase, and let the run go on; then to one of two processes, and twice.

    Args:
      patience: limits are so many times as long, for a busy machine.
    """
    options, outcome = ("--steps", "150"), Outcome("signals")
    whole, seconds = lab.undisturbed(*options), {}

    def survive(number: int) -> None:
        name = signal.Signals(number).name
        run = f"signals-{name}"
        for phase, (fault, limit) in PHASES.items():
            before = lab.saved(run)
            with lab.running(run, *options, fault=fault) as [command]:
                try:
                    took = _send(
                        lab, run, command, [command], number, outcome, f"{name} in {phase}"
                    )
                except Late as late:
                    outcome.problems.append(f"{name} in {phase}: {late}")
                    continue
            seconds[f"{name} in {phase}"] = round(took, 2)
            outcome.check(took <= limit * patience, f"{name} in {phase}: {took:.1f} seconds")
            if phase in ("compile", "restore"):
                outcome.check(lab.saved(run) == before, f"{name} in {phase}: checkpoints changed")
            tell(1)
        lab.finish(run, *options)
        outcome.problems += differences(lab, run, whole)

    in_turn(jobs, [lambda number=number: survive(number) for number in numbers])
    run = "signals-one-of-two"
    with lab.running(run, *options, processes=2, fault="step_end:sleep=1@9", at=1) as commands:
        took = _send(lab, run, commands[1], commands, signal.SIGTERM, outcome, "one of two")
    seconds["SIGTERM to one of two"] = round(took, 2)
    with lab.running("signals-twice", *options, fault="step_end:sleep=30@9") as [command]:
        wait_until(lambda: "fault on purpose" in command.text(), [command])
        command.send(signal.SIGTERM)
        time.sleep(0.5)
        began = time.monotonic()
        command.send(signal.SIGTERM)
        code = command.wait()
        seconds["the second SIGTERM"] = round(time.monotonic() - began, 2)
        outcome.check(code in (143, -signal.SIGTERM), f"the second SIGTERM: code {code}")
    outcome.check(seconds["the second SIGTERM"] <= 2 * patience, "the second SIGTERM: late")
    outcome.check(not lab.orphans(), f"processes are left: {lab.orphans()}")
    outcome.figures |= {"sent": len(seconds), "seconds": seconds}
    return outcome


def _send(
    lab: Lab,
    run: str,
    target: Command,
    commands: Sequence[Command],
    number: int,
    outcome: Outcome,
    what: str,
) -> float:
    """Send a signal to a run that is held; seconds until all of it has ended."""
    wait_until(lambda: "fault on purpose" in target.text(), commands)
    began = time.monotonic()
    target.send(number)
    for i, one in enumerate(commands):
        code = one.wait()
        said = one.last_line()
        outcome.check(code == 75, f"{what}: process {i} ended with {code}: {said}")
        outcome.check("stopped[75]" in said, f"{what}: process {i} says {said}")
    took = time.monotonic() - began
    if lab.last_logged(run):
        saved = max(lab.saved(run), default=0)
        lost = lab.last_logged(run) - saved
        outcome.check(lost <= 0, f"{what}: {lost} steps are lost, {saved} are saved")
    return took


# --- processes -----------------------------------------------------------------------------------

STEP_LIMIT = 5  # seconds that a step may take before a run is stuck
# Of each way to lose one of three processes: what is armed there, what is sent to it, the seconds
# after which all others are gone, and what the log of each of them says.
LOSSES: dict[str, tuple[int, str, int, float, str]] = {
    **{f"kill -9 of {i}": (i, "", signal.SIGKILL, GONE_SECONDS, f"process {i}") for i in range(3)},
    "error in 1": (1, "step_end:raise@9", 0, 5.0, "a fault on purpose at step_end"),
    "1 is stopped": (1, "", signal.SIGSTOP, GONE_SECONDS, "process 1"),
    "1 is stuck": (1, "step_end:hang@9", 0, STEP_LIMIT + 5.0, "stuck"),
}


def processes(
    lab: Lab, *, names: Sequence[str] = (), patience: float = 1.0, tell: Tell = no_tell
) -> Outcome:
    """Lose one of three processes, in some ways or all."""
    outcome, seconds, codes = Outcome("processes"), {}, {}
    for name in names or LOSSES:
        victim, fault, number, limit, words = LOSSES[name]
        run = f"processes-{name.replace(' ', '-')}"
        # A run without end, and with a first step that need not be waited for.
        options = ("--steps", "1000000", "--guard.step-seconds", str(STEP_LIMIT))
        with lab.running(run, *options, processes=3, fault=fault, at=victim) as commands:
            if fault:
                wait_until(lambda: "fault on purpose" in commands[victim].text(), commands)  # noqa: B023
            else:
                wait_until(lambda: lab.last_logged(run) >= 9, commands)  # noqa: B023
                commands[victim].send(number)
            began = time.monotonic()
            # Who is stopped, or hangs in the interpreter, cannot end itself.
            others = [i for i in range(3) if i != victim or number not in (9, signal.SIGSTOP)]
            try:
                codes[name] = [commands[i].wait(limit * patience + 30) for i in others]
            except Late as late:
                outcome.problems.append(f"{name}: {late}")
                continue
            seconds[name] = round(time.monotonic() - began, 2)
            outcome.check(
                seconds[name] <= limit * patience, f"{name}: {seconds[name]} seconds of {limit}"
            )
            for i, code in zip(others, codes[name], strict=True):
                own = name.startswith("error") and i == victim  # it ends by its own error
                right = code == 1 if own else LEAST_CODE <= code <= MOST_CODE
                said = commands[i].last_line()
                outcome.check(right, f"{name}: process {i} ended with {code}: {said}")
                outcome.check(words in said, f"{name}: process {i} does not say {words!r}: {said}")
        tell(1)
    outcome.check(not lab.orphans(), f"processes are left: {lab.orphans()}")
    outcome.figures |= {"seconds": seconds, "codes": codes}
    return outcome


# --- configs -------------------------------------------------------------------------------------

# A program in which `import jax` fails.
WITHOUT_JAX = "import sys; sys.modules['jax'] = None; from gptjax.cli import main; sys.exit(main())"
CONFLICTS = (
    "--model.num-heads 3",
    "--model.num-heads 5 --model.width 64",
    "--model.num-kv-heads 3",
    "--model.positions rope --model.head-size 15",
    "--model.window-every 2",
    "--model.window 8 --model.window-every 3",
    "--optimizer.final-learning-rate 1 --optimizer.learning-rate 0.1",
    "--optimizer.warmup-steps 100 --steps 50",
    "--optimizer.decay-steps 100 --optimizer.final-steps 100 --steps 150",
    "--data.holdout 0",
    "--data.skip 5 3",
    "--data.skip 1 5 4 9",
    "--mesh.pipe 5",
    "--mesh.context 3",
    "--mesh.fsdp 7",
    "--mesh.tensor 3",
    "--mesh.fsdp 8 --batch-size 12",
    "--accumulate 7",
    "--mesh.slices 2 --mesh.fsdp 3 --mesh.across fsdp",
    "--name a/b",
    "--name ..",
    "--coordinator 127.0.0.1:1234",
    "--num-processes 2",
    "--coordinator here --num-processes 2 --process-id 0",
    "--coordinator 127.0.0.1:1234 --num-processes 2 --process-id 2",
)
WRONG_VALUES = {
    "int": ("abc", "-1", "1.5", "1e400", "nan", "99999999999999999999", ""),
    "float": ("abc", "-1", "nan", "inf", "1e400", "-inf", ""),
    "bool": ("maybe", "2", "yess"),
    "words": ("nothing-like-it", ""),
}


def _options() -> dict[str, str]:
    """Every option of `gptjax train` that is a field of the config, with its kind."""
    from typing import get_type_hints

    from gptjax.config import Config, kind_of

    found = {}

    def walk(kind: type, path: str) -> None:
        for name, hint in get_type_hints(kind, include_extras=True).items():
            about = kind_of(hint)
            option = f"{path}{name}".replace("_", "-")
            if hasattr(about.base, "__dataclass_fields__"):
                walk(about.base, f"{option}.")
            else:
                found[option] = "words" if about.choices else about.base.__name__

    walk(Config, "")
    return {name: kind for name, kind in found.items() if not name.startswith("data.mixture")}


def _misspelt(word: str, draw: random.Random) -> str:
    """The word with a letter more, less, another, or two in the wrong order."""
    place = draw.randrange(1, len(word) - 1)
    letter = draw.choice("abcdefghijklmnopqrstuvwxyz")
    before, here, after = word[:place], word[place], word[place + 1 :]
    forms = (before + after, before + letter + here + after, before + letter + after)
    return draw.choice([*forms, before + after[:1] + here + after[1:]])


def wrong_options(count: int, seed: int) -> list[tuple[str, list[str], str]]:
    """Options that are to be refused: kind of mistake, words, and what is meant if known."""
    draw, options, found = random.Random(seed), _options(), []
    names = [f"--{name}" for name in options]
    found += [("conflict", words.split(), "") for words in CONFLICTS]
    while len(found) < count:
        name = draw.choice([*options])
        values = WRONG_VALUES.get(options[name])
        if values is None or draw.random() < 0.5:
            wrong = "--" + ".".join([*name.split(".")[:-1], _misspelt(name.split(".")[-1], draw)])
            if wrong not in names:
                found.append(("misspelt", [wrong, "1"], f"--{name}"))
        else:
            found.append(("value", [f"--{name}", draw.choice(values)], f"--{name}"))
    return draw.sample(found, count)


def configs(
    lab: Lab, *, count: int = 300, seed: int = 0, jobs: int = 1, tell: Tell = no_tell
) -> Outcome:
    """Give wrong options."""
    outcome, seconds, hits, misspelt = Outcome("configs"), [], 0, 0
    accepted: list[str] = []

    def refuse(kind: str, words: list[str], meant: str) -> None:
        nonlocal hits, misspelt
        run = f"configs-{threading.get_ident()}"
        command = lab.command("train", "run.py", "--run-dir", run, *words, program=WITHOUT_JAX)
        try:
            code = command.wait()
        finally:
            command.end()
        seconds.append(time.monotonic() - command.began)
        said, given = command.text(), " ".join(words)
        if code != 2:
            accepted.append(given)
        outcome.check(code == 2, f"{given}: code {code}, {command.last_line()}")
        outcome.check("gptjax: error[2]" in said, f"{given}: no such line in {said!r}")
        outcome.check("import of jax" not in said, f"{given}: JAX is imported before it is refused")
        outcome.check(not (lab.folder / run).exists(), f"{given}: something is written")
        if kind == "misspelt":
            misspelt += 1
            hits += bool(re.search(f"mean .*{re.escape(meant)}", said.replace("_", "-")))
        tell(1)

    wrong = wrong_options(count, seed)
    in_turn(jobs, [lambda one=one: refuse(*one) for one in wrong])
    kinds = Counter(kind for kind, *_ in wrong)
    outcome.figures |= {"given": len(wrong), "kinds": dict(kinds), "accepted": len(accepted)}
    outcome.figures |= {
        "seconds": spread(seconds),
        "suggestions": round(hits / max(misspelt, 1), 3),
    }
    return outcome


# --- numerics ------------------------------------------------------------------------------------

# Of each injection: the steps whose gradient is not a number, of a run of 60.
INJECTIONS = {"first": "1", "warm-up": "5", "later": "40", "four in a row": "40-43"}


def numerics(
    lab: Lab, *, clean_steps: int = 2000, names: Sequence[str] = (), tell: Tell = no_tell
) -> Outcome:
    """Make gradients that are not finite, and see what is skipped."""
    outcome = Outcome("numerics")
    poisoned = needless = 0
    for name in names or INJECTIONS:
        first, _, last = INJECTIONS[name].partition("-")
        wanted = [*range(int(first), int(last or first) + 1)]
        run = f"numerics-{name.replace(' ', '-')}"
        with lab.running(run, "--steps", "60", fault=f"batch_read:nan@{INJECTIONS[name]}") as [
            command
        ]:
            code = command.wait()
        skipped = [line["step"] for line in lab.metrics(run) if line["train/skipped"]]
        outcome.check(code == 0, f"{name}: code {code}, {command.last_line()}")
        outcome.check(skipped == wanted, f"{name}: skipped {skipped}, not {wanted}")
        needless += len({*skipped} - {*wanted})
        poisoned += not _all_finite(lab.folder / run)
        tell(1)
    run = "numerics-for-ever"
    with lab.running(run, "--steps", "60", fault="batch_read:nan@40-100000") as [command]:
        code = command.wait()
    outcome.check(code == 5, f"for ever: code {code}, {command.last_line()}")
    poisoned += not _all_finite(lab.folder / run)
    tell(1)
    if clean_steps:
        clean = lab.undisturbed("--steps", str(clean_steps), "--save-every", "None")
        needless += sum(bool(line["train/skipped"]) for line in lab.metrics(clean))
        tell(1)
    outcome.check(not poisoned, f"{poisoned} runs have saved what is not finite")
    outcome.check(not needless, f"{needless} updates were skipped needlessly")
    outcome.figures |= {"poisoned": poisoned, "needless_skips": needless}
    outcome.figures["clean_steps"] = clean_steps
    return outcome


def _all_finite(run_dir: Path) -> bool:
    import jax
    import numpy as np

    from gptjax.checkpoint import Checkpoints

    state = Checkpoints(run_dir).restore(like_of(run_dir))
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))


# --- overhead ------------------------------------------------------------------------------------

# A model with steps as long as in earnest, on a CPU.
SLOWER = "--model.width 256 --model.num-layers 4 --save-every None --eval-every None".split()
WITHOUT_GUARDS = (
    "--guard.spike-window 0 --guard.cross-check-every None --guard.step-seconds None "
    "--guard.evaluate-seconds None --guard.start-seconds None --guard.save-seconds None"
).split()
LARGE = (  # 200 MB
    "--model.width 512 --model.num-layers 5 --steps 1 --optimizer.warmup-steps 0 --eval-every None"
).split()
MOST_OVERHEAD = 1.05
VERIFY_SECONDS = 2.0


def overhead(lab: Lab, *, rounds: int = 5, steps: int = 150, tell: Tell = no_tell) -> Outcome:
    """Measure steps with all guards and without, in turn, and the verification of a large step."""
    from gptjax.checkpoint import Checkpoints

    outcome, found = Outcome("overhead"), {"with": [], "without": []}
    for number in range(rounds):
        for name, options in (("with", ()), ("without", WITHOUT_GUARDS)):
            run = f"overhead-{name}-{number}"
            lab.finish(run, *SLOWER, "--steps", str(steps), *options)
            # The first ones warm the caches; the last one evaluates.
            found[name].append([line["perf/step_seconds"] for line in lab.metrics(run)[10:-1]])
            tell(1)
    for name, p in (("p50", 0.5), ("p99", 0.99)):
        each = {
            side: [sorted(one)[math.ceil(p * len(one)) - 1] for one in many]
            for side, many in found.items()
        }
        ratio = statistics.median(a / b for a, b in zip(each["with"], each["without"], strict=True))
        outcome.figures[f"{name}_seconds"] = round(statistics.median(each["with"]), 5)
        outcome.figures[f"{name}_ratio"] = round(ratio, 4)
        outcome.check(ratio <= MOST_OVERHEAD, f"{name} is {ratio:.3f} times that without guards")
    lab.finish("overhead-large", *LARGE)
    run_dir, seconds = lab.folder / "overhead-large", []
    size = sum(path.stat().st_size for path in run_dir.glob("checkpoints/1/**/*"))
    for _ in range(3):
        began = time.monotonic()
        damage = Checkpoints(run_dir).verify(1)
        seconds.append(round(time.monotonic() - began, 3))
        outcome.check(not damage, f"verifying finds {damage}")
    outcome.check(min(seconds) <= VERIFY_SECONDS, f"verifying {size:,} bytes took {seconds}")
    outcome.figures |= {"verify_bytes": size, "verify_seconds": seconds}
    tell(1)
    return outcome


# --- the command ---------------------------------------------------------------------------------

CAMPAIGNS = {
    "kills": kills,
    "points": points,
    "mutations": mutations,
    "storage": storage,
    "signals": signals,
    "processes": processes,
    "configs": configs,
    "numerics": numerics,
    "overhead": overhead,
}
# What `all` does: a campaign, its arguments, and those that --quick has instead.
ALL: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("configs", {}, {"count": 60}),
    ("points", {}, {}),
    ("kills", {"processes": 1, "count": 200}, {"count": 20, "steps": 400, "span": 2.0}),
    ("kills", {"processes": 2, "count": 50}, {"count": 6, "steps": 400, "span": 2.0}),
    ("kills", {"processes": 4, "count": 50}, {"count": 2, "steps": 400, "span": 2.0}),
    ("mutations", {}, {"count": 100}),
    ("storage", {}, {}),
    ("signals", {}, {}),
    ("processes", {}, {}),
    ("numerics", {}, {"clean_steps": 200}),
    ("overhead", {}, {"rounds": 2, "steps": 60}),
]


def run(name: str, lab: Lab, arguments: dict[str, Any]) -> Outcome:
    """Do a campaign with a progress bar, and print what it found."""
    accepts = CAMPAIGNS[name].__kwdefaults__
    arguments = {key: value for key, value in arguments.items() if key in accepts}
    total = arguments.get("count", accepts.get("count"))
    with tqdm(desc=name, total=total, unit="trial", mininterval=1) as bar:
        try:
            outcome = CAMPAIGNS[name](lab, **arguments, tell=bar.update)
        except AssertionError as error:  # a run that was to end well did not
            outcome = Outcome(name, problems=[str(error)])
    print(outcome.to_json(), flush=True)
    return outcome


def main() -> int:
    """Do what the arguments say; 1 if anything is not as it should be."""
    logging.getLogger("gptjax").setLevel(logging.ERROR)  # a warning for each mutation is right
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("campaign", choices=[*CAMPAIGNS, "all"])
    parser.add_argument("--count", type=positive, help="kills, mutations or configs")
    parser.add_argument("--processes", type=positive, help="of a run, for kills")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at once (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    parser.add_argument("--steps", type=positive, help="of a run, for kills and overhead")
    parser.add_argument("--span", type=float, help="seconds of training a kill may fall in")
    parser.add_argument("--patience", type=float, help="limits are so many times as long")
    parser.add_argument("--quick", action="store_true", help="fewer trials, for all")
    parser.add_argument("--folder", help="where runs are made (a temporary folder, then removed)")
    given = parser.parse_args()
    own = {name: value for name, value in vars(given).items() if value is not None}
    plan = [(given.campaign, own)]
    if given.campaign == "all":
        plan = [(name, own | full | (quick if given.quick else {})) for name, full, quick in ALL]
    outcomes = []
    with contextlib.ExitStack() as open_:
        folder = given.folder or open_.enter_context(tempfile.TemporaryDirectory(prefix="faults-"))
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(folder, "compiled"))
        for number, (name, arguments) in enumerate(plan):
            lab = Lab(Path(folder, f"{number}-{name}"), Path(folder, "compiled"))
            outcomes.append(run(name, lab, arguments))
    bad = [one.campaign for one in outcomes if one.problems]
    skipped = [f"{one.campaign} ({one.skipped})" for one in outcomes if one.skipped]
    note = f"; not tried: {', '.join(skipped)}" if skipped else ""
    done = ", ".join(one.campaign for one in outcomes)
    print(f"faults: NOT WELL: {', '.join(bad)}{note}" if bad else f"faults: all well: {done}{note}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
