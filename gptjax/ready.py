"""Everything about a run that can be known, or refused, before anything is compiled or written."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from gptjax.config import Config, ConfigError, GPTConfig, check, field_problems
from gptjax.data import Rows, check_epochs
from gptjax.events import Events
from gptjax.exclusions import Exclusion, exclude, pass_over, read_rollbacks
from gptjax.labelled import Labelled, contents_of, describe_examples, load_labelled
from gptjax.loading import check_origin, take_over
from gptjax.model import resolve
from gptjax.resume import (
    Allowed,
    Change,
    Origin,
    Past,
    changes_of,
    data_changes,
    data_of,
    find_past,
    refuse_changes,
    told,
)
from gptjax.rows import load_rows, with_vocabulary
from gptjax.sharding import make_mesh
from gptjax.summary import describe, describe_text, left_out
from gptjax.tasks import ExampleRows
from gptjax.tokenizer import Tokenizer, make_tokenizer


class Ready(NamedTuple):
    """A run that may begin, or go on."""

    config: Config  # with its vocabulary, and the head of its task
    mesh: Mesh
    reason: str  # why attention is computed as it is
    tokenizer: Tokenizer
    rows: Rows | ExampleRows  # to train on
    valid_splits: dict[str, Rows | ExampleRows]
    labelled: Labelled | None  # None: text
    about: str  # the data, in the words of the first lines
    contents: dict[str, Any]  # of the data, by which another time tells that it is the same
    past: Past | None  # what it goes on from
    changes: Sequence[Change]  # of the config since then
    data_changes: Sequence[str]

    @property
    def origin(self) -> Origin | None:
        """That of which it is a fork."""
        return self.past.ancestry[0] if self.past and self.past.ancestry else None

    def passing_over(self, exclusions: tuple[Exclusion, ...], run_dir: Path) -> "Ready":
        """Without the documents that were left out and the batches that were rolled back."""
        rows = self.rows if self.labelled else exclude(self.rows, exclusions)
        return self._replace(rows=pass_over(rows, read_rollbacks(run_dir)))

    def first_lines(self, exclusions: tuple[Exclusion, ...], run_dir: Path) -> list[str]:
        """What a user is told as it begins."""
        lines = [describe(self.config, self.mesh, self.reason, self.about)]
        if exclusions:
            lines.append(f"left out   {left_out(exclusions)}, as {run_dir / 'skipped.json'} lists")
        if self.past and self.changes:
            lines.append(told(self.changes, self.past, self.config))
        if self.past:
            since = f"--- changed since step {self.past.step:,}"
            lines += [f"{since}: {change}" for change in self.data_changes]
        return lines


def make_ready(
    config: Config, run_dir: Path, allowed: Allowed, fork_from: Origin | None, events: Events
) -> Ready:
    """Check a config, open its data, and compare both with what a run directory holds already.

    Raises:
      ConfigError, DataError, CheckpointError: as `gptjax.train.fit` does.
    """
    # The rules are those of the model that is taken over; a value of a wrong kind is told first.
    if config.task.kind and config.init_from and not field_problems(config, Config):
        begun = (run_dir / "config.json").exists()
        config = take_over(config, run_dir if begun else Path(config.init_from))
    check(config, jax.device_count())
    labelled = None
    tokenizer = make_tokenizer(config.data)
    if config.task.kind:
        with events.spent.of("data_preparation"):
            config, labelled = load_labelled(config, tokenizer)
    past = find_past(run_dir, tokenizer, fork_from)
    config = replace(config, model=_complete_model(config, past, tokenizer))
    mesh = make_mesh(config.mesh)
    check(config, mesh.size)
    changes = _find_changes(config, past, allowed)
    _, reason = resolve(config.model, mesh.devices.flat[0].platform)
    if labelled:
        splits = {name: split.rows for name, split in labelled.splits.items()}
        rows, valid = splits["train"], {"": splits["valid"]} if "valid" in splits else {}
        about, contents = describe_examples(config, labelled), contents_of(labelled)
    else:
        with events.spent.of("data_preparation"):
            rows, valid = load_rows(config, tokenizer)
        check_epochs(rows, config.steps)
        about, contents = describe_text(config, rows, valid), data_of(rows, valid)
    others = data_changes(past.run_dir, contents) if past else []
    refuse_changes(others, past, allowed, what="data")
    return Ready(
        config=config,
        mesh=mesh,
        reason=reason,
        tokenizer=tokenizer,
        rows=rows,
        valid_splits=valid,
        labelled=labelled,
        about=about,
        contents=contents,
        past=past,
        changes=changes,
        data_changes=others,
    )


def _complete_model(config: Config, past: Past | None, tokenizer: Tokenizer) -> GPTConfig:
    """The model with its vocabulary, which a run or a folder to begin with may have settled."""
    model = config.model
    if past and model.vocab_size is None:
        model = replace(model, vocab_size=past.config.model.vocab_size)
    elif config.init_from and not past:
        model = check_origin(Path(config.init_from), model, tokenizer)
    return with_vocabulary(model, tokenizer)


def _find_changes(config: Config, past: Past | None, allowed: Allowed) -> list[Change]:
    """How the config differs from that so far, where that is allowed."""
    if past is None:
        return []
    changes = changes_of(past.config, config, past.step, read_rollbacks(past.run_dir))
    refuse_changes(changes, past, allowed)
    if past.forks and past.step >= config.steps:
        raise ConfigError(
            f"steps = {config.steps:,}, but the fork begins after step {past.step:,}: give more"
        )
    return changes
