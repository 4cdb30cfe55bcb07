"""What the time of a run went to, by its events."""

import json
import math
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.config import Config
from gptjax.events import AT_MOST_SECONDS, read_events
from gptjax.resume import Origin, read_fork
from gptjax.rundir import CheckpointError, read_run

# What the main thread did, as `events.jsonl` has it, and the parts of a report.
PART_OF = {
    "train": "productive",
    "data_wait": "data wait",
    "checkpoint": "checkpoint",
    "evaluation": "evaluation",
    "compile": "compile",
    "start_up": "start-up",
    "initialise": "start-up",
    "data_preparation": "data preparation",
    "restore": "restore",
    "sample": "sample",
}
# In the order of a report: what each part is, and its colour on the page.
PARTS = {
    "productive": ("steps that count", "#2e9e6b"),
    "done again": ("steps that were lost when a run ended without saving them", "#c8453d"),
    "data wait": ("the devices had nothing to do, for no batch was there", "#e0a63a"),
    "checkpoint": ("the steps stood still for a save", "#7a68d6"),
    "evaluation": ("", "#3a86d9"),
    "compile": ("that nothing else was done meanwhile", "#d96fa8"),
    "start-up": ("from the start of the process on, with its first state", "#8494a5"),
    "data preparation": ("text to token stores, and opening these", "#b08657"),
    "restore": ("of a checkpoint", "#49b3b8"),
    "sample": ("at the end", "#9aad3f"),
    "restart": ("from the last sign of an attempt to the process of the next", "#59636f"),
    "other": ("no clock says what", "#bdbdb7"),
}


class Attempt(NamedTuple):
    """One process's part of a run, or that of several that ran together."""

    began: float  # seconds since 1970
    ended: float  # its last sign
    first_step: int  # that it went on from
    last_step: int  # that it began
    outcome: str
    about: dict[str, Any]  # its `start` event


class Goodput(NamedTuple):
    """What the time of a run went to."""

    wall: float  # seconds from the first sign to the last
    parts: dict[str, float]  # seconds by the names of PARTS; they add up to `wall`
    attempts: list[Attempt]
    steps: int  # that count, of this run directory
    lost_steps: int
    counts: Counter[str]  # of events, by their names


class _Ledger:
    """Steps and the productive seconds that they took; those that a run goes back from are lost."""

    def __init__(self):
        self._stretches: list[tuple[int, int, float]] = []  # after which step, up to which
        self.lost_steps, self.lost_seconds = 0, 0.0

    def add(self, after: int, up_to: int, seconds: float) -> None:
        if up_to > after or seconds > 0:
            self._stretches.append((after, up_to, seconds))

    def go_back(self, step: int) -> None:
        """What follows a step is done again."""
        kept = []
        for after, up_to, seconds in self._stretches:
            if up_to <= step:
                kept.append((after, up_to, seconds))
                continue
            share = 1.0 if after >= step else (up_to - step) / (up_to - after)
            self.lost_steps += up_to - max(after, step)
            self.lost_seconds += seconds * share
            if after < step:
                kept.append((after, step, seconds * (1 - share)))
        self._stretches = kept


def goodput(events: Iterable[dict[str, Any]], now: float | None = None) -> Goodput | None:
    """What the time of a run went to, by its events alone; None if it tells of no attempt.

    Args:
      events: as `read_events` has them; those of process 0 count.
      now: seconds since 1970, to tell a run that goes on from one that ended without a word.
    """
    attempts: list[Attempt] = []
    spent: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    ledger, so_far, restart = _Ledger(), {}, 0.0
    for event in events:
        if event["process"] != 0:
            continue
        kind = event["event"]
        counts[kind] += 1
        if kind == "start":
            spent.update(so_far)
            if attempts:
                restart += max(event["began"] - attempts[-1].ended, 0.0)
            step = event["step"]
            ledger.go_back(step)
            attempts.append(Attempt(event["began"], event["time"], step, step, "", event))
            so_far = event["spent"]
        elif not attempts:
            continue
        elif kind in ("progress", "end"):
            last, seconds = attempts[-1], event["spent"].get("train", 0.0)
            ledger.add(last.last_step, event["step"], seconds - so_far.get("train", 0.0))
            so_far = event["spent"]
            attempts[-1] = last._replace(ended=event["time"], last_step=event["step"])
            if kind == "end":
                attempts[-1] = attempts[-1]._replace(outcome=_outcome(event))
        elif kind == "rollback":
            ledger.go_back(event["to_step"])
            attempts[-1] = attempts[-1]._replace(last_step=event["to_step"])
        elif kind in ("error", "stop"):
            attempts[-1] = attempts[-1]._replace(outcome=f"{kind}: {event.get('message', '')}")
    if not attempts:
        return None
    spent.update(so_far)
    attempts = _with_outcomes(attempts, time.time() if now is None else now)
    wall = attempts[-1].ended - attempts[0].began
    steps = attempts[-1].last_step - attempts[0].first_step
    return Goodput(
        wall, _parts(spent, ledger, restart, wall), attempts, steps, ledger.lost_steps, counts
    )


def _outcome(event: dict[str, Any]) -> str:
    if event["outcome"] == "done":
        return "done"
    stopped = event["outcome"] in ("Interrupted", "KeyboardInterrupt")
    return f"{'stop' if stopped else 'error'}: {event.get('message') or event['outcome']}"


def _with_outcomes(attempts: list[Attempt], now: float) -> list[Attempt]:
    """Those that said nothing at their end: killed, or still there."""
    silent = [one if one.outcome else one._replace(outcome="killed") for one in attempts]
    if not attempts[-1].outcome and now - attempts[-1].ended < 2 * AT_MOST_SECONDS:
        silent[-1] = silent[-1]._replace(outcome="running")
    return silent


def _parts(spent: Counter[str], ledger: _Ledger, restart: float, wall: float) -> dict[str, float]:
    parts = dict.fromkeys(PARTS, 0.0)
    for kind, seconds in spent.items():
        if kind in PART_OF:
            parts[PART_OF[kind]] += seconds
    parts["productive"] -= ledger.lost_seconds
    parts["done again"] = ledger.lost_seconds
    parts["restart"] = restart
    parts["other"] = wall - sum(parts.values())
    return parts


# --- a run ---------------------------------------------------------------------------------------


class Run(NamedTuple):
    """All that a report tells."""

    run_dir: Path
    config: Config
    goodput: Goodput | None
    ancestry: tuple[Origin, ...]
    notes: list[dict[str, Any]]  # events of changes, errors and the like
    curves: dict[str, tuple[array, array]]  # steps and values, by the name of the metric


NOTED = (
    "config",
    "data",
    "fork",
    "error",
    "stop",
    "rollback",
    "save_failed",
    "refused",
    "abandoned",
)
MOST_LISTED = 200  # events, and attempts on a page
FIGURES = ("eval/accuracy", "eval/f1", "eval/micro_f1", "eval/macro_f1", "eval/exact")
CURVES = (*FIGURES, "train/learning_rate", "train/grad_norm", "perf/tokens_per_second", "perf/mfu")


def read(run_dir: Path) -> Run:
    """A run as it is now, also while it goes on.

    Raises:
      CheckpointError: if it is no run directory.
    """
    config, _ = read_run(run_dir)
    try:
        ancestry = read_fork(run_dir)
    except CheckpointError:  # there is more to tell
        ancestry = ()
    notes: list[dict[str, Any]] = []

    def noting() -> Iterator[dict[str, Any]]:
        for event in read_events(run_dir):
            if event["event"] in NOTED:
                notes.append(event)
            yield event

    found = goodput(noting())
    return Run(run_dir, config, found, ancestry, notes[-MOST_LISTED:], _curves(run_dir))


def _curves(run_dir: Path) -> dict[str, tuple[array, array]]:
    """The metrics that are drawn, read line by line: memory holds two numbers for each."""
    curves: dict[str, tuple[array, array]] = {}
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return curves
    with path.open("rb") as file:
        for text in file:
            try:
                line = json.loads(text)
                step = int(line["step"])
            except (ValueError, TypeError, KeyError):  # the last one, which is being written
                continue
            for name, value in line.items():
                if name in CURVES or name.endswith("/loss"):
                    steps, values = curves.setdefault(name, (array("d"), array("d")))
                    steps.append(step)
                    values.append(math.nan if value is None else value)
    return curves


def summary(run: Run) -> str:
    """What the time went to, as text."""
    figures = "\n".join(f"{name:11}{value}" for name, value in facts(run))
    if not run.goodput:
        return figures
    rows = [
        f"{name:20}{seconds:12,.1f} s {share:8.2%}   {PARTS[name][0]}".rstrip()
        for name, seconds, share in shares(run.goodput)
    ]
    total = f"{'total':20}{run.goodput.wall:12,.1f} s {1:8.2%}"
    return "\n".join([figures, "", *rows, total])


def shares(found: Goodput) -> list[tuple[str, float, float]]:
    """Each part that took time: its name, seconds, and share of all."""
    wall = max(found.wall, 1e-9)
    return [
        (name, seconds, seconds / wall)
        for name, seconds in found.parts.items()
        if abs(seconds) >= 0.0005 or name in ("productive", "other")
    ]


def facts(run: Run) -> list[tuple[str, str]]:
    """Name and text of each figure of a run."""
    found = run.goodput
    lines = [("run", str(run.run_dir))]
    lines += [("fork of", f"{one.run} at step {one.step:,}") for one in run.ancestry]
    if not found:
        return [*lines, ("events", "none that tell of an attempt: its time is not known")]
    last, counts = found.attempts[-1], found.counts
    about = last.about
    tokens = found.steps * about.get("step_tokens", 0)
    speed = tokens / max(found.wall, 1e-9)
    skipped = counts["skipped_update"] + counts["spike"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in about.get("mesh", {}).items())
    return [
        *lines,
        ("state", f"{last.outcome}, at step {last.last_step:,} of {about.get('steps', 0):,}"),
        (
            "on",
            f"{about.get('devices', 1)} x {about.get('device', '?')}"
            + (f" ({mesh})" if mesh else "")
            + f", processes: {about.get('processes', 1)}, gptjax {about.get('gptjax', '?')}, "
            f"jax {about.get('jax', '?')}",
        ),
        ("steps", f"{found.steps:,}, {found.lost_steps:,} more were lost and done again"),
        ("tokens", f"{tokens:,}, {speed:,.0f} a second of all time"),
        ("attempts", f"{len(found.attempts):,}"),
        ("saves", f"{counts['save']:,}, {counts['save_failed']:,} failed"),
        (
            "trouble",
            f"{skipped:,} updates skipped, {counts['rollback']:,} rollbacks, "
            f"{counts['error']:,} errors",
        ),
    ]
