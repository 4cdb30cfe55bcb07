"""What a run goes on from, what may change between two commands of it, and forks.

Beside what `rundir.py` lists, a run directory keeps

    configs/STEP.json  the config of the steps that follow this one, for each time it was another
    data.json          what the stores held: checksums, and the sources behind them
    fork.json          of a fork: the run and the step it began from, and those that one began from
"""

import dataclasses
import json
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, ConfigError, MixtureConfig, from_json, to_json, weight_at
from gptjax.data import Rows, batch_number
from gptjax.events import Events
from gptjax.exclusions import Rollback, join_ranges
from gptjax.optim import learning_rate
from gptjax.rundir import CheckpointError, read_run, sync
from gptjax.tokenizer import Tokenizer


class Allowed(NamedTuple):
    """Changes that the user wants although they change the numbers of the steps to come."""

    config: bool = False
    data: bool = False


NOTHING_ALLOWED = Allowed()


class Origin(NamedTuple):
    """Where a fork begins."""

    run: Path
    step: int | None  # None: the latest, as the fork begins


class Past(NamedTuple):
    """What a run goes on from."""

    run_dir: Path  # where it lies: the run's own directory, or that of which it is a fork
    step: int  # that it goes on from
    config: Config  # that it went by
    ancestry: tuple[Origin, ...]  # of a fork, the nearest first

    @property
    def forks(self) -> bool:
        """Whether a fork begins here."""
        return bool(self.ancestry) and self.run_dir == self.ancestry[0].run


# --- what there is -------------------------------------------------------------------------------


def find_past(run_dir: Path, tokenizer: Tokenizer, fork_from: Origin | None) -> Past | None:
    """What a run goes on from; None: it begins.

    Raises:
      CheckpointError: if it is of another tokenizer, the folder holds another run than this fork,
        or there is no such step to begin a fork from.
    """
    ancestry = read_fork(run_dir)
    begun = (run_dir / "config.json").exists()
    if fork_from:
        if begun or ancestry:
            _refuse_another_fork(run_dir, ancestry, fork_from)
        else:
            ancestry = _resolve(run_dir, fork_from)
    if not begun and not ancestry:
        return None
    place = run_dir if begun else ancestry[0].run
    config, kept = read_run(place)
    if (kept.kind, kept.fingerprint) != (tokenizer.kind, tokenizer.fingerprint):
        raise CheckpointError(
            f"{place} holds a run whose tokenizer is of kind {kept.kind!r} with fingerprint "
            f"{kept.fingerprint}, but data.tokenizer is now of kind {tokenizer.kind!r} with "
            f"{tokenizer.fingerprint}. Give --data.tokenizer {place / 'tokenizer'}, which the "
            "run kept, to go on with it, or another --run-dir to begin a new one"
        )
    if not begun:
        return Past(place, ancestry[0].step, config_at(place, ancestry[0].step), ancestry)
    first = ancestry[0].step if ancestry else 0
    return Past(place, Checkpoints(run_dir).latest() or first, config, ancestry)


def _refuse_another_fork(run_dir: Path, ancestry: Sequence[Origin], fork_from: Origin) -> None:
    where = f"{fork_from.run}" + ("" if fork_from.step is None else f" at step {fork_from.step:,}")
    if not ancestry:
        raise CheckpointError(
            f"{run_dir} holds a run that is no fork, so it cannot begin from {where}: give another "
            "--run-dir, or leave out --fork-from to go on with it"
        )
    known = ancestry[0]
    same = known.run == fork_from.run.absolute() and fork_from.step in (None, known.step)
    if not same:
        raise CheckpointError(
            f"{run_dir} holds a fork of {known.run} at step {known.step:,}, not of {where}: give "
            f"another --run-dir, or --fork-from {known.run}@{known.step} to go on with it"
        )


def _resolve(run_dir: Path, fork_from: Origin) -> tuple[Origin, ...]:
    """The origin of a new fork with its step, the same in all processes, and those before it."""
    run = fork_from.run.absolute()
    if run == run_dir.absolute():
        raise ConfigError(f"--fork-from {run}: that is the run itself: give another --run-dir")
    read_run(run)  # says what is wrong with the folder, if it is none of a run
    step = Checkpoints(run).stored(fork_from.step).step
    if jax.process_count() > 1:
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    return (Origin(run, step), *(one for one in read_fork(run) if one.step < step))


def read_fork(run_dir: Path) -> tuple[Origin, ...]:
    """Where a fork began, the nearest origin first; nothing for a run that is none.

    Raises:
      CheckpointError: if `fork.json` cannot be read.
    """
    path = run_dir / "fork.json"
    if not path.exists():
        return ()
    try:
        return tuple(Origin(Path(one["run"]), int(one["step"])) for one in _read(path))
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): restore a copy") from error


def config_at(run_dir: Path, step: int) -> Config:
    """The config that a step, counted from 1, went by; of steps to come, the latest.

    Raises:
      CheckpointError: if it cannot be read.
    """
    path = run_dir / "config.json"
    for kept in _configs(run_dir):
        if int(kept.stem) < step:
            path = kept
    try:
        return from_json(path.read_text())
    except (OSError, ConfigError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _configs(run_dir: Path) -> list[Path]:
    """Ascending by step."""
    paths = [path for path in (run_dir / "configs").glob("*.json") if path.stem.isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem))


# --- what differs --------------------------------------------------------------------------------

Kind = Literal["free", "config", "data", "fatal"]

# How, where and how long to compute, and what to watch. Where the tokenizer lies is one of them.
FREE = {
    "name",
    "init_from",  # what a run begins with, which it has
    "model.attention",
    "model.context_attention",
    "model.split_residual",
    "model.remat",
    "model.loss_piece",
    "data.tokenizer",
    "data.store_dir",
    "data.workers",
    "data.prefetch",
    "data.tfds_dir",
    "data.tfds_prepare",
    "data.max_epochs",
    "accumulate",
    "log_every",
    "eval_every",
    "eval_batches",
    "save_every",
    "keep_last",
    "keep_every",
    "tensorboard",
    "task.test",
    "task.epochs",  # which `steps` come from
    "task.patience",
    "task.words",
    "task.score",
    "task.max_answer",
    "task.bleu_tokens",
    "task.written",
}
FREE_SECTIONS = ("mesh.", "sample.", "guard.")
# What changes the numbers of the steps to come, and leaves the state and the order of batches what
# they are.
NUMBERS = {
    "model.compute_dtype",
    "model.dropout",
    "guard.spike_window",
    "guard.spike_loss",
    "guard.spike_grad_norm",
    "guard.max_spikes",
    "guard.rollback_after",
    "tune.layer_decay",
    "task.label_smoothing",
    "task.lm_weight",
}
NUMBERS_SECTIONS = ("optimizer.",)
# Judged by what lies behind the run.
APART = ("data.skip", "data.mixture")
# What the stores hold.
CONTENT = {
    "path",
    "exclude",
    "valid_path",
    "holdout",
    "format",
    "text_field",
    "tfds_split",
    "on_bad_record",
    "filter",
    "deduplicate",
}
# What the examples of a task are.
EXAMPLES = {
    "train",
    "valid",
    "file_format",
    "header",
    "delimiter",
    "on_bad_example",
    "text_column",
    "second_column",
    "label_column",
    "label_columns",
    "first_label",
    "label_separator",
    "scheme",
    "source_column",
    "target_column",
    "messages_column",
    "role_key",
    "content_key",
    "choice_columns",
    "first_choice",
}
NEEDS = {
    "free": "may change",
    "config": "needs --allow-config-change",
    "data": "needs --allow-data-change",
    "fatal": "makes it another run",
}


class Change(NamedTuple):
    """A field that has another value."""

    name: str
    before: Any
    now: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.name} {reprlib.repr(self.before)} -> {reprlib.repr(self.now)}"


def changes_of(
    before: Config, config: Config, step: int, rollbacks: Sequence[Rollback] = ()
) -> list[Change]:
    """All fields that differ, of a run whose state is that of a step, with its rollbacks."""
    bare = not before.data.path and not before.data.mixture and not before.task.train
    if bare:  # converted: it has seen no data yet, but a head may be there, which has its labels
        kept = {"kind": before.task.kind, "labels": before.task.labels} if before.task.kind else {}
        task = replace(config.task, **kept)
        before = replace(config, model=before.model, tune=before.tune, task=task)
    old, new = dict(_fields(before)), dict(_fields(config))
    changes = [
        Change(name, old[name], new[name], _kind(name, before, config, step))
        for name in old
        if old[name] != new[name] and name not in APART
    ]
    went_back = [(one.first, one.last) for one in rollbacks]
    passed = join_ranges([*before.data.skip, *went_back])
    batches = batch_number(step - 1, passed) + 1 if step else 0  # behind it, read or not
    if before.data.skip != config.data.skip:
        skips = before.data.skip, config.data.skip
        met = [_passed_over(join_ranges([*skip, *went_back]), step) for skip in skips]
        behind = f"data.skip up to step {step:,}, which is saved,"
        same = met[0] == met[1]
        changes.append(
            Change("data.skip", *skips, "free") if same else Change(behind, *met, "fatal")
        )
    return changes + list(_mixture_changes(before.data.mixture, config.data.mixture, batches))


def _fields(value: Any, section: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        inner, name = getattr(value, field.name), f"{section}{field.name}"
        if dataclasses.is_dataclass(inner):
            yield from _fields(inner, f"{name}.")
        else:
            yield name, inner


def _kind(name: str, before: Config, config: Config, step: int) -> Kind:
    """What it means that a field has changed; of one that is listed nowhere, another run."""
    if name == "steps":
        return "free" if config.steps > before.steps else "config"
    if name in NUMBERS or name.startswith(NUMBERS_SECTIONS):
        return "config"
    if name in FREE or name.startswith(FREE_SECTIONS):
        return "free"
    content = {f"data.{one}" for one in CONTENT} | {f"task.{one}" for one in EXAMPLES}
    return "data" if name in content else "fatal"


def _passed_over(skip: tuple[tuple[int, int], ...], step: int) -> tuple[tuple[int, int], ...]:
    """The ranges that the first steps have met."""
    met, passed = [], 0
    for first, last in skip:
        if first - passed <= step:
            met.append((first, last))
        passed += last - first + 1
    return tuple(met)


def _mixture_changes(
    before: Sequence[MixtureConfig], now: Sequence[MixtureConfig], batches: int
) -> Iterator[Change]:
    """The changes of a mixture. Weights may change from here on, and stores be added at its end
    that had none so far: then the rows of so many batches are those that were read.
    """
    names = [[one.name for one in stores] for stores in (before, now)]
    if names[0] != names[1][: len(names[0])] or (names[1] and not names[0]):
        yield Change("data.mixture", *map(tuple, names), "fatal")
        return
    added = now[len(before) :]
    if added:
        met = any(any(_weights_up_to(batches, one, one)[0]) for one in added)
        yield Change("data.mixture", *map(tuple, names), "fatal" if met else "config")
    for old, new in zip(before, now, strict=False):
        weights = _weights_up_to(batches, old, new)
        for name, value in _fields(old):
            if value != (other := getattr(new, name)):
                kind = "free" if name == "max_epochs" else "data"
                if name in ("weight", "weights"):
                    kind = "config" if weights[0] == weights[1] else "fatal"
                yield Change(f"data.mixture.{old.name}.{name}", value, other, kind)


def _weights_up_to(batches: int, *stores: MixtureConfig) -> list[list[float]]:
    """The weights of each in so many batches, at every one where one of them changes."""
    firsts = {1, *(first for one in stores for first, _ in one.weights)}
    met = sorted(one for one in firsts if one <= batches)
    return [[weight_at(store, one) for one in met] for store in stores]


def refuse_changes(
    changes: Iterable[Change | str], past: Past | None, allowed: Allowed, *, what: str = "config"
) -> None:
    """Refuse changes that are not allowed, in one message with all there are. A fork is made to
    change the config.

    Args:
      changes: of the config, or as text, of what the stores hold.
    Raises:
      CheckpointError: with the option that allows each, if there is one.
    """
    lines, refused = [], False
    for one in changes:
        kind = "data" if isinstance(one, str) else one.kind
        permitted = kind == "free" or (kind == "config" and (allowed.config or past.forks))
        refused |= not (permitted or (kind == "data" and allowed.data))
        words = one
        if not isinstance(one, str):
            words = f"{one.name} was {one.before!r} and is now {one.now!r}"
        lines.append(f"  - {words}: {NEEDS[kind]}")
    if refused:
        raise CheckpointError(
            f"{past.run_dir} holds a run of another {what}, changes since step {past.step:,}:\n"
            + "\n".join(lines)
            + "\nTo go on with it give those values again, or the options that are named; to begin "
            "a new one, another --run-dir"
        )


def told(changes: Sequence[Change], past: Past, config: Config) -> str:
    """What has changed, as the log has it."""
    text = f"--- changed since step {past.step:,}: {', '.join(map(str, changes))}"
    if any(one.name == "steps" or one.name.startswith("optimizer.") for one in changes):
        rates = [float(learning_rate(one, past.step)) for one in (past.config, config)]
        if rates[0] != rates[1]:
            text += f" (learning rate of the next step {rates[0]:.4g} -> {rates[1]:.4g})"
    return text


# --- what the stores held ------------------------------------------------------------------------


def data_of(train: Rows, valid: dict[str, Rows]) -> dict[str, Any]:
    """What a run keeps of its stores: by split and name, what tells whether they are the same."""
    splits = {
        "train": train.members,
        "valid": [one for rows in valid.values() for one in rows.members],
    }
    return {
        split: {
            member.name or "text": {
                "sha256": member.store.manifest.sha256,
                "documents": member.store.num_documents,
                "tokens": member.store.num_tokens,
                "sources": [
                    [one.name, one.size, one.sha256] for one in member.store.manifest.source
                ],
            }
            for member in members
        }
        for split, members in splits.items()
    }


def data_changes(run_dir: Path, data: dict[str, Any]) -> list[str]:
    """What the stores hold that they did not hold when the run was last started; where nothing was
    kept of them, nothing. Stores that were added are a change of the config.

    Raises:
      CheckpointError: if `data.json` cannot be read.
    """
    path = run_dir / "data.json"
    if not path.exists():
        return []
    try:
        return [
            f"{split} store {name}: {what}"
            for split, stores in _read(path).items()
            for name, before in stores.items()
            if (what := _store_change(before, data[split].get(name)))
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): restore a copy") from error


LISTED = 5  # sources that a message names at most


def _store_change(before: dict[str, Any], now: dict[str, Any] | None) -> str:
    if now is None:
        return "is gone"
    if before["sha256"] == now["sha256"]:
        return ""
    old, new = ({source[0]: source[1:] for source in one["sources"]} for one in (before, now))
    parts = [
        f"{name} {what}"
        for what, names in (
            ("is gone", [name for name in old if name not in new]),
            ("is new", [name for name in new if name not in old]),
            ("holds other text", [name for name in old if old[name] != new.get(name, old[name])]),
        )
        for name in names
    ]
    if not parts and list(old) != list(new):
        parts = ["its sources have another order"]
    more = [f"and {len(parts) - LISTED:,} more"] if len(parts) > LISTED else []
    counts = ", ".join(f"{before[one]:,} -> {now[one]:,} {one}" for one in ("documents", "tokens"))
    digests = f"checksum {before['sha256'][:12]} -> {now['sha256'][:12]}"
    return "; ".join([*parts[:LISTED], *more, counts, digests])


# --- what is kept --------------------------------------------------------------------------------


RECORDS = ("skipped.json", "rollbacks.json")  # which decide what later steps see


def begin_fork(run_dir: Path, past: Past) -> None:
    """Write what a fork has behind it, before all else: where it began, the configs of the steps up
    to there, and what its origin leaves out.

    Raises:
      OSError: if the folder cannot be written.
    """
    (run_dir / "configs").mkdir(parents=True, exist_ok=True)
    for path in _configs(past.run_dir):
        if int(path.stem) < past.step:
            _write(run_dir / "configs" / path.name, path.read_text(encoding="utf-8"))
    for name in RECORDS:
        if (past.run_dir / name).exists() and not (run_dir / name).exists():
            _write(run_dir / name, (past.run_dir / name).read_text(encoding="utf-8"))
    origins = [{"run": str(one.run), "step": one.step} for one in past.ancestry]
    _write(run_dir / "fork.json", json.dumps(origins, indent=2) + "\n")


def keep_past(run_dir: Path, config: Config, step: int, data: dict[str, Any]) -> None:
    """Write what the next command of a run needs to know of this one, beside `save_run` and before
    it: what that writes says that the run has begun.

    Args:
      config: of the steps after `step`, which the run goes on from.
      data: as `data_of` has it.
    Raises:
      OSError: if the folder cannot be written.
    """
    (run_dir / "configs").mkdir(parents=True, exist_ok=True)
    _write(run_dir / "data.json", json.dumps(data) + "\n")
    for path in _configs(run_dir):
        if int(path.stem) >= step:  # of steps that are done again
            path.unlink()
    kept = _configs(run_dir)
    if not kept or from_json(kept[-1].read_text(encoding="utf-8")) != config:
        _write(run_dir / "configs" / f"{step}.json", to_json(config))


def write_changes(
    events: Events, step: int, changes: Sequence[Change], data: Sequence[str], past: Past | None
) -> None:
    """What is another than before, as events."""
    if past and past.forks:
        events.write("fork", run=str(past.run_dir), step=step)
    if changes:
        events.write("config", step=step, changes=[one._asdict() for one in changes])
    if data:
        events.write("data", step=step, changes=list(data))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, text: str) -> None:
    """A file at once, and for good."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    sync(new)
    new.rename(path)
    sync(path.parent)
