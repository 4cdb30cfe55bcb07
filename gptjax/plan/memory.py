"""The memory of one device in training, by kind: from the letters of every tensor and a mesh."""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from gptjax.config import Config, GPTConfig, TuneConfig
from gptjax.data import Batch
from gptjax.guard import no_recent
from gptjax.losses import LOGITS_BYTES
from gptjax.pipeline import Schedule
from gptjax.plan.liveness import Measure, Tensor, kept
from gptjax.sharding import BETWEEN, FED, IN_USE, STORED
from gptjax.tuning import all_letters, init_all, trained


class Leaf(NamedTuple):
    """A parameter."""

    path: str
    letters: str
    shape: tuple[int, ...]
    count: int  # of its numbers that are trained


class Part(NamedTuple):
    """Some of the memory."""

    kind: str
    name: str
    letters: str
    num_bytes: int


class Memory(NamedTuple):
    """The bytes of one device when most are in use."""

    parts: tuple[Part, ...]
    moment: str  # when that is

    @property
    def total(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def kinds(self) -> dict[str, int]:
        """Bytes of each kind, in the order of KINDS."""
        found = dict.fromkeys(KINDS, 0)
        for part in self.parts:
            found[part.kind] += part.num_bytes
        return {kind: num_bytes for kind, num_bytes in found.items() if num_bytes}


TABLES = {"stored": STORED, "in use": IN_USE, "between": BETWEEN}
# What is there before a step and after it, and what a step adds.
STATE = ("parameters", "optimizer", "counters")
KINDS = (
    *STATE,
    "batch",
    "gradients",
    "activations kept",
    "weights in use",
    "loss and logits",
    "temporaries of a layer",
)


# How much more a layer's tensors need than one after the other would, by the attention, for a
# compiler starts what it can early, to hide the wait for the network: the backward pass of one
# layer beside the recomputation of the next. By the peaks of steps compiled for H100 (cudnn, xla)
# and for TPUs (splash).
OVERLAP = {"cudnn": 1.45, "xla": 1.15, "splash": 1.0, "blockwise": 1.0}


def share(letters: str, sizes: Mapping[str, int], axes: Mapping[str, int], table: dict) -> int:
    """How many numbers of a tensor one device has."""
    numbers = 1
    for letter in letters:
        extent = math.prod(axes[axis] for axis in axes_of(letter, table))
        numbers *= -(-sizes[letter] // extent)
    return numbers


def axes_of(letter: str, table: dict) -> tuple[str, ...]:
    """The axes of the mesh that a table splits the dimension of a letter over."""
    on = table.get(letter) or ()
    return (on,) if isinstance(on, str) else on


def leaves(model: GPTConfig, tune: TuneConfig) -> tuple[Leaf, ...]:
    """All parameters of a run."""
    # They do not depend on how it is computed.
    plain = {"remat": "full", "attention": "xla", "compute_dtype": "float32"}
    return _leaves(replace(model, split_residual=False, **plain), tune)


@functools.lru_cache(maxsize=64)
def _leaves(model: GPTConfig, tune: TuneConfig) -> tuple[Leaf, ...]:
    config = Config(model=model, tune=tune)
    shapes = jax.eval_shape(functools.partial(init_all, config), jax.random.key(0))
    counts = trained(jax.tree.map(lambda leaf: leaf.size, shapes), config, lambda count: count)
    letters = dict(_flat(all_letters(config)))
    trained_counts = dict(_flat(counts))
    some = min(tune.layers or 0, model.num_layers)
    found = []
    for path, leaf in _flat(shapes):
        count = trained_counts.get(path, 0)
        if tune.layers is not None and path.startswith("blocks"):
            count = count * some // model.num_layers
        found.append(Leaf(path, letters[path], leaf.shape, count))
    return tuple(found)


def _flat(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield "/".join(key.key for key in path), leaf


def sizes_of(config: Config, axes: Mapping[str, int]) -> dict[str, int]:
    """The size of each letter in a part of a batch, on all devices together; Q is a piece of T
    whose logits exist at once.
    """
    model, T = config.model, config.model.context_size
    rows = config.batch_size // config.accumulate
    sizes = model.sizes | {"B": rows, "T": T, "S": T, "R": config.tune.lora_rank or 0}
    devices = math.prod(axes.values())
    at_once = max(rows * sizes["V"] * 4 // devices, 1)
    piece = min(model.loss_piece or max(LOGITS_BYTES // at_once, 1), T)
    sizes["Q"] = T // next(n for n in range(-(-T // piece), T + 1) if T % n == 0)
    return sizes


def schedule(config: Config, axes: Mapping[str, int]) -> Schedule:
    """Of the stack as a pipeline, which may have one stage."""
    rows = config.batch_size // (axes["data"] * axes["fsdp"] * config.accumulate)
    stages, mesh = axes["pipe"], config.mesh
    return Schedule(stages, mesh.rounds, 1 if stages == 1 else mesh.microbatches or rows)


def turns_of(config: Config, axes: Mapping[str, int]) -> int:
    """How often a device runs a turn of the loop over layers in a part of a batch."""
    plan = schedule(config, axes)
    group = config.model.num_layers // len(config.model.windows) // (plan.stages * plan.rounds)
    return plan.ticks * group


def measure_of(config: Config, axes: Mapping[str, int], *, in_layer: bool = False) -> Measure:
    """Bytes of a tensor on one device; in a layer, of a microbatch."""
    sizes = sizes_of(config, axes)
    if in_layer:  # of a pipeline's rows all are split over its stages elsewhere
        plan = schedule(config, axes)
        sizes["B"] = sizes["B"] // plan.microbatches * plan.stages
    if config.model.attention == "splash":  # reads and writes rows of 128 numbers
        sizes["H"] = -(-sizes["H"] // 128) * 128
        head = config.model.sizes["H"] / sizes["H"]

    @functools.cache
    def measure(tensor: Tensor) -> float:
        numbers = share(tensor.letters, sizes, axes, TABLES[tensor.place])
        weight = not {*tensor.letters} & {*"BT"} and "H" in tensor.letters
        if config.model.attention == "splash" and weight:
            numbers *= head
        return tensor.factor * tensor.itemsize * numbers

    return measure


def memory(config: Config, axes: Mapping[str, int]) -> Memory:
    """What one device needs at once, at most.

    Args:
      config: with nothing left to choose: vocabulary, compute dtype, attention.
      axes: the mesh's axes and their sizes.
    """
    model, sizes = config.model, sizes_of(config, axes)
    itemsize = 4 if model.compute_dtype == "float32" else 2
    measure = measure_of(config, axes)
    in_layer = measure_of(config, axes, in_layer=True)
    state = [*_state(config, sizes, axes)]
    grads = [*_gradients(config, sizes, axes)]
    saved = [*_saved(config, turns_of(config, axes), in_layer)]
    traces = kept(model)
    place = "between" if model.split_residual else "in use"
    width = Tensor("BTD", 1, itemsize, place=place)
    loss = [
        Part("loss and logits", "logits and softmax of a piece", "BQV", traces.loss.most(measure)),
        Part("loss and logits", "gradient of the unembedding", "DV", measure(Tensor("DV", 1, 4))),
        Part("loss and logits", "gradient of the stream", "BTD", measure(width)),
        Part("weights in use", "unembedding", "VD", measure(Tensor("VD", 1, itemsize))),
    ]
    working = traces.backward.most(in_layer)
    early = (OVERLAP[model.attention] - 1) * (working + in_layer(width))
    layer = [
        Part("temporaries of a layer", "backward pass", "", working),
        Part("temporaries of a layer", "of what the scheduler begins early", "", early),
        Part("temporaries of a layer", "gradient of the stream", "BTD", in_layer(width)),
    ]
    if axes["pipe"] > 1:  # all rows, forward, and their gradients
        rows = 2 * axes["pipe"] * measure(width)
        layer.append(Part("temporaries of a layer", "rows of the pipeline", "BTD", rows))
    if model.attention == "cudnn" and model.remat == "dots":
        copy = turns_of(config, axes) * in_layer(Tensor("BTNH", 1, itemsize))
        layer.append(
            Part("temporaries of a layer", "what is kept, in another order", "LBTNH", copy)
        )
    accumulated = [part for part in grads if part.name.endswith("accumulated")]
    moments = {
        "in the backward pass of a layer": [*grads, *layer],
        "in the loss": [*accumulated, *loss],
    }
    moment = max(moments, key=lambda name: sum(part.num_bytes for part in moments[name]))
    parts = [*state, *moments[moment], *saved]
    return Memory(tuple(part._replace(num_bytes=round(part.num_bytes)) for part in parts), moment)


def _state(config: Config, sizes: Mapping[str, int], axes: Mapping[str, int]) -> Iterator[Part]:
    """What a step is given."""
    for leaf in leaves(config.model, config.tune):
        each = share(leaf.letters, sizes, axes, STORED)
        yield Part("parameters", leaf.path, leaf.letters, 4 * each)
        if leaf.count:
            part = each * leaf.count // math.prod(leaf.shape)
            yield Part("optimizer", f"{leaf.path}: both moments", leaf.letters, 8 * part)
    yield Part("counters", "step, skipped, what is recent", "", 4 * (_recent_numbers() + 3))
    rows = share("BT", sizes, axes, FED | {"T": "context"}) * config.accumulate
    yield Part("batch", ", ".join(Batch._fields), "BT", 4 * rows * len(Batch._fields))


@functools.cache
def _recent_numbers() -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(no_recent)))


def _gradients(config: Config, sizes: Mapping[str, int], axes: Mapping[str, int]) -> Iterator[Part]:
    times = 1 if config.accumulate == 1 else 2
    for leaf in leaves(config.model, config.tune):
        each = share(leaf.letters, sizes, axes, STORED) * leaf.count // math.prod(leaf.shape)
        if leaf.count:
            yield Part("gradients", leaf.path, leaf.letters, 4 * each)
            if times == 2:
                yield Part("gradients", f"{leaf.path}: accumulated", leaf.letters, 4 * each)


def _saved(config: Config, turns: int, measure: Measure) -> Iterator[Part]:
    for tensor in kept(config.model).saved:
        yield Part("activations kept", tensor.name, f"L{tensor.letters}", turns * measure(tensor))
