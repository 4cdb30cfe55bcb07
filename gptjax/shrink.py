"""A small copy of an experiment, with its options and its kind of mesh: what `gptjax check` runs.

The rule: every size becomes the smallest that the axes of the mesh divide, that is at least a few,
and that keeps what the size decides: whether key/value heads are shared, how wide the feed-forward
layer and the window are, whether a row divides into the halves of a ring, whether the vocabulary
has padding. The stack has one period of windows for each group of each stage, and at least two
layers. Each shard has at least two rows of each part of a batch. Whatever is neither a size nor
about data, storage or time stays, in float32; but the learning rate is high, without warm-up, and
`optimizer.epsilon` is not so small that rounding becomes an update.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from gptjax.config import (
    Config,
    DataConfig,
    GPTConfig,
    MeshConfig,
    TaskConfig,
    TuneConfig,
    default_ffn_size,
)

MOST_DEVICES = 16  # virtual ones, which take turns on this machine's cores
AXES = ("data", "fsdp", "tensor", "context", "pipe")
LEAST_CONTEXT, LEAST_HEAD, LEAST_VOCAB, NUM_LABELS = 32, 8, 64, 5
LEARNING_RATE = 0.1  # of one update, that is to be seen beside the parameters' rounding
# Adam's first update of a number is near the learning rate, however small its gradient, unless this
# is added to the root: and a gradient that should be 0 is some 1e-9 by rounding.
LEAST_EPSILON = 1e-3


def with_any_data(config: Config) -> Config:
    """The experiment as if it had data: a check makes its own."""
    data, task = config.data, config.task
    if task.kind:
        task = replace(task, train=task.train or ("train",), valid=task.valid or ("valid",))
    elif not data.mixture:
        data = replace(data, path=data.path or ("text",))
    return replace(config, data=data, task=task)


def shrink(config: Config, longest: int = 2) -> Config:
    """The small copy of an experiment.

    Args:
      config: with `mesh.data` None, rows are split over two devices.
      longest: devices along context and pipe, where the mesh needs more than `MOST_DEVICES`; the
        other axes have at most two then.
    """
    mesh = _mesh(config.mesh, longest)
    model = _model(config, mesh)
    accumulate = min(config.accumulate, 2)
    return Config(
        name="check",
        model=model,
        data=_data(config.data),
        task=_task(config.task),
        tune=_tune(config.tune, config.model, model, mesh),
        optimizer=replace(
            config.optimizer,
            learning_rate=LEARNING_RATE,
            final_learning_rate=None,
            warmup_steps=0,
            decay_steps=None,
            final_steps=0,
            epsilon=max(config.optimizer.epsilon, LEAST_EPSILON),
        ),
        mesh=mesh,
        steps=4,
        batch_size=accumulate * mesh.data * mesh.fsdp * _rows(mesh),
        accumulate=accumulate,
        seed=config.seed,
        eval_every=None,
    )


def num_devices(mesh: MeshConfig) -> int:
    """Of a mesh that says all its sizes."""
    return math.prod(getattr(mesh, axis) for axis in AXES)


def changes(config: Config, small: Config) -> Iterator[str]:
    """What of the model, the mesh, the batch and the optimizer is another in the small copy."""
    for section in ("model", "mesh", "tune", "optimizer", ""):
        old, new = (getattr(one, section) if section else one for one in (config, small))
        names = [one.name for one in dataclasses.fields(old)]
        if not section:
            names = ["batch_size", "accumulate"]
        found = [
            f"{name} {_word(getattr(old, name))} -> {_word(getattr(new, name))}"
            for name in names
            if getattr(old, name) != getattr(new, name)
        ]
        if found:
            yield f"{section and section + ': '}{', '.join(found)}"


def _word(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _mesh(mesh: MeshConfig, longest: int) -> MeshConfig:
    sizes = {axis: getattr(mesh, axis) or 2 for axis in AXES}
    if math.prod(sizes.values()) > MOST_DEVICES:
        most = {"context": longest, "pipe": longest}
        sizes = {axis: min(size, most.get(axis, 2)) for axis, size in sizes.items()}
    for axis in ("data", "fsdp", "tensor"):  # in the order in which the most is still shown
        if math.prod(sizes.values()) > MOST_DEVICES:
            sizes[axis] = 1
    slices = mesh.slices and math.gcd(mesh.slices, sizes[mesh.across])
    rounds, microbatches = (mesh.rounds, mesh.microbatches) if sizes["pipe"] > 1 else (1, None)
    return replace(
        mesh,
        **sizes,
        slices=slices,
        rounds=min(rounds, 2),
        microbatches=microbatches and min(microbatches, 2 * sizes["pipe"]),
    )


def _rows(mesh: MeshConfig) -> int:
    """Of a part of a batch on each shard; the stages divide them, so that each has a part of the
    loss.
    """
    return math.lcm(2, mesh.pipe, mesh.microbatches or 1)


def _model(config: Config, mesh: MeshConfig) -> GPTConfig:
    model, task = config.model, config.task
    heads = _heads(model, mesh)
    width, ffn_size = _widths(model, mesh, heads["num_heads"])
    context_size = _context_size(config, mesh)
    vocab_multiple = math.lcm(8, mesh.tensor)
    vocab_size = _up(LEAST_VOCAB, vocab_multiple)
    if model.vocab_size is None or model.vocab_size % model.vocab_multiple:
        vocab_size -= 3
    labelled = {"classify": "label", "entities": "label", "questions": "span"}.get(task.kind)
    head = "labels" if labelled == "label" and task.several else labelled or model.head
    return replace(
        model,
        **heads,
        vocab_size=vocab_size,
        vocab_multiple=vocab_multiple,
        context_size=context_size,
        num_layers=_num_layers(model, mesh),
        width=width,
        head_size=model.head_size and LEAST_HEAD,
        ffn_size=ffn_size,
        head=head,
        num_labels=NUM_LABELS if head in ("label", "labels") else None,
        window=model.window and max(_part(model.window, context_size, model.context_size), 2),
        loss_piece=model.loss_piece and _part(model.loss_piece, context_size, model.context_size),
        compute_dtype="float32",
        attention="auto" if model.attention in ("cudnn", "splash") else model.attention,
    )


def _heads(model: GPTConfig, mesh: MeshConfig) -> dict[str, int | None]:
    """Two on each device of the axis tensor, if there are so many; shared by two, if by any."""
    num_kv_heads = model.num_kv_heads or model.num_heads
    here = mesh.tensor * min(max(num_kv_heads // mesh.tensor, 1), 2)
    shared = min(model.num_heads // num_kv_heads, 2)
    return {"num_heads": here * shared, "num_kv_heads": model.num_kv_heads and here}


def _widths(model: GPTConfig, mesh: MeshConfig, num_heads: int) -> tuple[int, int | None]:
    """Of the residual stream and of the feed-forward layer, None where it has its default."""
    width = math.lcm(num_heads * LEAST_HEAD, mesh.fsdp)
    if model.head_size is not None:
        of_heads = model.num_heads * model.head_size
        width = _up(_part(num_heads * LEAST_HEAD, model.width, of_heads), math.lcm(8, mesh.fsdp))
    if model.ffn_size is not None:
        return width, _up(_part(model.ffn_size, width, model.width), mesh.tensor)
    ffn_size = default_ffn_size(width, model.activation)
    return width, None if ffn_size % mesh.tensor == 0 else _up(ffn_size, mesh.tensor)


def _context_size(config: Config, mesh: MeshConfig) -> int:
    model, before = config.model, config.mesh.context
    in_halves = model.context_size % (2 * before) == 0
    unit = mesh.context * (2 if in_halves else 1)
    if model.split_residual:
        unit = math.lcm(unit, mesh.context * mesh.tensor)
    size = _up(LEAST_CONTEXT, unit)
    return size if in_halves or size % (2 * mesh.context) else size + unit


def _num_layers(model: GPTConfig, mesh: MeshConfig) -> int:
    groups = len(model.windows) * mesh.pipe * mesh.rounds
    return 2 if groups == 1 and model.num_layers > 1 else groups


def _tune(tune: TuneConfig, before: GPTConfig, model: GPTConfig, mesh: MeshConfig) -> TuneConfig:
    layers = tune.layers
    if layers:
        layers = model.num_layers if layers >= before.num_layers else mesh.pipe
    return replace(tune, layers=layers, lora_rank=tune.lora_rank and min(tune.lora_rank, 2))


def _data(data: DataConfig) -> DataConfig:
    mixture = [
        replace(one, path=("text",), exclude=(), valid_path=(), max_epochs=None)
        for one in data.mixture
    ]
    path = () if mixture else ("text",)
    return DataConfig(path=path, mixture=tuple(mixture), skip=data.skip, shuffle=data.shuffle)


def _task(task: TaskConfig) -> TaskConfig:
    if task.kind is None:
        return task
    return replace(
        task,
        train=("train",),
        valid=("valid",),
        test=(),
        labels=(),
        words=(),
        epochs=None,
        patience=None,
    )


def _part(size: int, new: int, old: int) -> int:
    """The size that is to `new` as this is to `old`."""
    return max(round(size * new / old), 1)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
