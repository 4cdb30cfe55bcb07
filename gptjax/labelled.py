"""The labelled examples that a config names: as rows to train on, and what a model says of them."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config, ConfigError, refuse, schedule_problems
from gptjax.data import Batch, prefetch
from gptjax.losses import label_losses
from gptjax.model import Params, forward, resolve
from gptjax.pipeline import stack_of
from gptjax.sharding import in_use, local_rows, replicated, to_devices
from gptjax.sources import DataError
from gptjax.tasks import ExampleRows, Prediction, Problems, Task, encode_examples, make_task
from gptjax.tasks.choices import Choice
from gptjax.tasks.dialogue import Dialogue
from gptjax.tasks.entities import Tagged
from gptjax.tasks.metrics import need_packages
from gptjax.tasks.packing import check_examples
from gptjax.tasks.pairs import Pair
from gptjax.tasks.questions import Question
from gptjax.tokenizer import Tokenizer
from gptjax.tuning import abstract_all, merged


class Split(NamedTuple):
    """Examples, and the rows that they are in."""

    examples: list[Any]
    rows: ExampleRows


class Labelled(NamedTuple):
    """What a run on a task reads."""

    task: Task
    splits: dict[str, Split]  # train, valid, test; those that the config names
    problems: dict[str, Problems]  # of each


def load_labelled(config: Config, tokenizer: Tokenizer) -> tuple[Config, Labelled]:
    """The examples of a task, and the config with what follows from them: the labels, the head that
    says them, and the steps of so many epochs. Every process reads all of them.

    Raises:
      DataError: for records that cannot be used, if they are not to be left out; if all have the
        same label.
      ConfigError: if the model has another head.
    """
    task, splits, found = make_task(config.task), {}, {}
    if config.task.written and (config.task.valid or config.task.test):
        need_packages(task.name, "; or --task.written 0, if the loss is enough")
    for name in ("train", "valid", "test"):
        if not (paths := getattr(config.task, name)):
            continue
        problems = found[name] = Problems(config.task.on_bad_example, f"task.{name}", task.name)
        examples = list(task.read(paths, problems))
        problems.refuse()
        if name == "train":
            task = task.fitted(examples)
            if len(task.labels) == 1 and not task.several:
                raise DataError(
                    f"task.train: {task.labels[0]!r} is the label of all records, so there is "
                    "nothing to learn: give the column of the labels by --task.label-column, or "
                    "all of several labels by --task.labels"
                )
        splits[name] = make_split(
            config, task, examples, tokenizer, problems, to_learn=name == "train"
        )
    config = with_head_of(config, task)
    if config.task.epochs is not None:
        config = with_steps(config, splits["train"].rows)
    return config, Labelled(task, splits, found)


def with_steps(config: Config, rows: ExampleRows) -> Config:
    """The config with the steps that its epochs are.

    Raises:
      ConfigError: if it gives a schedule that is longer.
    """
    steps = max(round(config.task.epochs * rows.num_rows / rows.batch_size), 1)
    config = replace(config, steps=steps)
    refuse(list(schedule_problems(config)))
    return config


def make_split(
    config: Config,
    task: Task,
    examples: list[Any],
    tokenizer: Tokenizer,
    problems: Problems,
    *,
    to_learn: bool,
    labelled: bool = True,
) -> Split:
    """Examples in rows: in an order for training, or once each.

    Args:
      to_learn: whether they are trained on.
      labelled: whether there must be labels.
    Raises:
      DataError: if none is left, or one is too long that is not to be left out.
    """
    size, vocab_size = config.model.context_size, config.model.vocab_size
    encoded = encode_examples(task, examples, tokenizer, size, problems, to_learn=to_learn)
    problems.refuse()
    if labelled:
        check_examples(encoded, problems)
    known = vocab_size is None or tokenizer.pad < vocab_size
    rows = ExampleRows(
        encoded=encoded,
        context_size=size,
        batch_size=config.batch_size,
        seed=config.seed,
        shuffle=to_learn and config.data.shuffle,
        pad=tokenizer.pad if known else tokenizer.end,
        once=not to_learn,
        skip=config.data.skip if to_learn else (),
    )
    return Split(examples, rows)


def with_head_of(config: Config, task: Task) -> Config:
    """The config with the labels of a task, and a model whose head says them.

    Raises:
      ConfigError: if the model has another head, or another number of labels.
    """
    head = "labels" if task.head == "label" and task.several else task.head
    num_labels = len(task.labels) if task.head == "label" else None
    model = config.model
    if model.head not in ("lm", head) or model.num_labels not in (None, num_labels):
        raise ConfigError(
            f"model.head = {model.head!r} with model.num_labels = {model.num_labels}, but the task "
            f"has a head of kind {head!r} with {num_labels} labels: leave both out, or give these"
        )
    model = replace(model, head=head, num_labels=num_labels)
    return replace(config, model=model, task=replace(config.task, labels=task.labels))


def describe_examples(config: Config, labelled: Labelled) -> str:
    """What a run on a task sees, and what is wrong with it, in a few lines."""
    lines, rows = [], labelled.splits["train"].rows
    labels = f", {len(labelled.task.labels):,} labels" if labelled.task.labels else ""
    for name, split in labelled.splits.items():
        share = split.rows.num_tokens / max(split.rows.num_rows * split.rows.context_size, 1)
        lines.append(
            f"{len(split.examples):,} examples of task.{name} in {split.rows.num_rows:,} rows, "
            f"{share:.0%} full"
        )
    lines[0] += (
        f", {rows.epochs(config.steps):.2f} epochs in {config.steps:,} steps of "
        f"{config.batch_size:,} rows{labels}"
    )
    for name, problems in labelled.problems.items():
        lines += [f"task.{name}: {line.strip()}" for line in problems.lines()]
    return "\n           ".join(lines)


def contents_of(labelled: Labelled) -> dict[str, Any]:
    """What tells whether the examples are the same, as `resume.data_of` has it of text."""
    kept = {}
    for name in ("train", "valid"):
        split, digest = labelled.splits.get(name), hashlib.sha256()
        for column in split.rows.encoded if split else ():
            digest.update(np.ascontiguousarray(column).tobytes())
        kept[name] = {} if split is None else {
            "examples": {
                "sha256": digest.hexdigest(),
                "documents": len(split.examples),
                "tokens": split.rows.num_tokens,
                "sources": [],
            }
        }  # fmt: skip
    return kept


# --- what a model says ---------------------------------------------------------------------------


def jit_label_step(config: Config, mesh: Mesh) -> Callable[[Params, Batch], tuple]:
    """A compiled function of params and a batch: the logits [B, T, C] on every device, and the sums
    of weights x losses and of weights.
    """
    model = resolve(config.model, mesh.devices.flat[0].platform)[0]

    def step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            logits_BTC, _ = forward(
                merged(params, config),
                batch.tokens_BT,
                model,
                positions_BT=batch.positions_BT,
                segments_BT=batch.segments_BT,
                run=stack_of(config.mesh),
            )
            losses_BT = label_losses(logits_BTC, batch, model)
        sums = [(batch.weights_BT * losses_BT).sum(), batch.weights_BT.sum()]
        return logits_BTC, jnp.stack(sums)

    params = jax.tree.map(lambda leaf: leaf.sharding, abstract_all(config, mesh))
    batch = Batch(*[in_use(mesh, "BT")] * len(Batch._fields))
    return jax.jit(step, in_shardings=(params, batch), out_shardings=replicated(mesh))


class Said(NamedTuple):
    """What a model says of a split."""

    predictions: list[Prediction | None]  # of each example; None where it is too long
    loss: float  # nats, the mean over all weights; NaN without labels


def predict(
    params: Params,
    task: Task,
    split: Split,
    step: Callable,
    mesh: Mesh,
    *,
    prefetched: int = 2,
    begin: Callable[[], bool] = lambda: True,
    request: Future[None] | None = None,
) -> Said | None:
    """What a model with the task's head says of every example.

    Args:
      params: of the model, on the mesh.
      step: as `jit_label_step` returns it.
      mesh: where the batches go.
      prefetched: batches made ahead.
      begin: asked before each batch; False ends it.
      request: when it is done, no more batches are waited for.
    Returns:
      None if it was ended.
    """
    rows = split.rows
    example_of = rows.encoded.example_of.tolist()
    windows_of: dict[int, list[int]] = {}
    for number, example in enumerate(example_of):
        windows_of.setdefault(example, []).append(number)
    awaited = {example: len(numbers) for example, numbers in windows_of.items()}
    predictions: list[Prediction | None] = [None] * len(split.examples)
    outputs: dict[int, np.ndarray] = {}  # of examples of which not all windows were seen
    make = functools.partial(rows.batch_at, which=local_rows(mesh, rows.batch_size))
    total, done = np.zeros(2), 0
    with closing(prefetch(make, 0, rows.num_batches, prefetched, request)) as batches:
        for batch in batches:
            if not begin():
                return None
            logits_BTC, sums = jax.device_get(
                step(params, to_devices(mesh, batch, rows.batch_size))
            )
            for place in rows.places_at(done, which=slice(None)):
                outputs[place.number] = logits_BTC[place.row, place.start : place.stop].copy()
                example = example_of[place.number]
                awaited[example] -= 1
                if not awaited[example]:
                    numbers = windows_of[example]
                    windows = [rows.encoded.one(number) for number in numbers]
                    said = [outputs.pop(number) for number in numbers]
                    predictions[example] = task.decode(split.examples[example], windows, said)
            total, done = total + np.float64(sums), done + 1
    if done < rows.num_batches:
        return None
    return Said(predictions, total[0] / total[1] if total[1] else float("nan"))


def figures_of(task: Task, examples: Sequence[Any], said: Said) -> dict[str, float]:
    """The task's figures over the examples that there are predictions of, and the loss."""
    pairs = [pair for pair in zip(examples, said.predictions, strict=True) if pair[1] is not None]
    return {"loss": said.loss} | task.metrics(*map(list, zip(*pairs, strict=True)))


def write_said(
    folder: Path,
    name: str,
    task: Task,
    examples: Sequence[Any],
    predictions: Sequence[Prediction | None],
) -> None:
    """Write what was said of a split, a line of JSON for each example, with what is right.

    Raises:
      OSError: if it cannot be written.
    """
    folder.mkdir(exist_ok=True)
    new = folder / f"{name}.jsonl.new"
    with new.open("w", encoding="utf-8") as file:
        for example, one in zip(examples, predictions, strict=True):
            if one is not None:
                line = {"where": example.where, "shown": _shown(task, example)}
                line["right"] = _right(task, example)
                file.write(json.dumps(line | one, ensure_ascii=False) + "\n")
    new.rename(folder / f"{name}.jsonl")


def _right(task: Task, example: Any) -> Any:
    match example:
        case Choice():
            return example.gold
        case Pair() | Dialogue():
            return task.target(example).strip()
        case Tagged():
            return example.tags
        case Question():
            return example.answers
    return example.labels


def _shown(task: Task, example: Any) -> str:
    match example:
        case Pair():
            return example.source
        case Choice() | Dialogue():
            return task.prompt(example)
        case Tagged():
            return " ".join(example.words)
        case Question():
            return example.question
    return example.text if example.second is None else f"{example.text} / {example.second}"
