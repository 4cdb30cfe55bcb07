"""Whether a mesh gives the numbers of one device, shown by computing both.

One device runs the same functions on a mesh of one. Compared are where arrays lie, the rows of
batches, parameters, the loss, its gradients, what dropout drops, an update and its moments: leaf by
leaf, and of each leaf what each device holds. Numbers may differ by as much as rounding makes.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from gptjax.config import Config, MeshConfig, check
from gptjax.data import Batch, Member, Rows, Which
from gptjax.model import Params, resolve, token_losses
from gptjax.pipeline import stack_of
from gptjax.sharding import (
    BETWEEN,
    IN_USE,
    constrain_stored,
    in_use,
    local_rows,
    make_mesh,
    spec,
    to_devices,
)
from gptjax.shrink import num_devices
from gptjax.step import TrainState, abstract_state, init_state, jit_train_step, loss_and_grads
from gptjax.tuning import all_letters, merged, trained_letters

# How much of the largest value of a leaf the devices may differ by. Rounding made at most a tenth
# of that in the meshes of tests; what is wrong makes much more.
BOUNDS = {
    "batches": 0.0,
    "parameters": 1e-6,
    "loss": 1e-5,
    "gradients": 1e-4,
    "dropout": 1e-4,
    "update": 1e-3,
    "moments": 1e-3,
}
# A leaf whose values are all far below those of its neighbours is compared by this part of theirs:
# the gradient of keys' biases is 0 but for rounding.
LEAST_SCALE = 1e-2
# What the comments of `MeshConfig` promise: the axes that the dimension of a letter is split over.
# Said here again, so that the tables of sharding.py can be compared with it.
PROMISED = {
    "stored": {"L": "pipe", "D": "fsdp"} | dict.fromkeys("NKFV", "tensor"),
    "in a batch": {"B": "data fsdp", "T": "context"},
    "in use": {"B": "data fsdp pipe", "T": "context"} | dict.fromkeys("NKFV", "tensor"),
    "between blocks": {"B": "data fsdp pipe", "T": "context tensor"},
}
DROPOUT = 0.5  # of the line on dropout, whatever the experiment has


class DifferenceError(RuntimeError):
    """A mesh that does not give the numbers of one device."""


class Held(NamedTuple):
    """What a device has of a leaf."""

    device: int
    index: tuple[slice, ...]
    values: np.ndarray


class Leaf(NamedTuple):
    """An array, in the parts that this process's devices have."""

    letters: str
    group: str  # of leaves whose values are of one kind
    shape: tuple[int, ...]
    parts: tuple[Held, ...]


class Worst(NamedTuple):
    """Where a leaf differs most from that of one device."""

    share: float  # of the largest value
    device: int
    place: int  # in the leaf, flat
    here: float
    there: float  # on one device


Leaves = dict[str, Leaf]


@dataclass(frozen=True)
class _Text:
    """Made-up tokens, read as those of a store are."""

    tokens: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def read(self, starts: np.ndarray, length: int, pad: int) -> np.ndarray:
        padded = np.append(self.tokens, np.full(length, pad, np.int32))
        places = np.minimum(starts, len(self.tokens))[:, None] + np.arange(length)
        return padded[places]

    def begin_read(self, starts: np.ndarray, length: int, pad: int) -> Callable[[], np.ndarray]:
        return functools.partial(self.read, starts, length, pad)


def compare(config: Config, say: Callable[[str], None] = print) -> None:
    """Compute with a mesh, and with one device, and compare.

    Args:
      config: small, as `shrink` makes it; its mesh has all devices of this run, or the first of
        those of a single process.
      say: takes each line of the table, in the first process.
    Raises:
      DifferenceError: with the first leaf that differs.
    """
    count = num_devices(config.mesh)
    check(config, count)
    mesh = make_mesh(config.mesh, jax.devices()[:count])
    one = replace(config, mesh=MeshConfig(data=1))
    alone = make_mesh(one.mesh, jax.local_devices()[:1])
    table = _Table(mesh, say if jax.process_index() == 0 else lambda line: None)
    table.layout(misplaced(config, mesh))
    for (kind, here), (_, there) in zip(_numbers(config, mesh), _numbers(one, alone), strict=True):
        table.compare(kind, here, there)
    if table.first:
        raise DifferenceError(
            f"{table.first} -- give one axis after the other size 1 to find the one that makes it"
        )


# --- what is computed ----------------------------------------------------------------------------


def _numbers(config: Config, mesh: Mesh) -> Iterator[tuple[str, Leaves]]:
    """What a mesh makes of an experiment, by kind."""
    rows, size, which = _rows(config), config.batch_size, local_rows(mesh, config.batch_size)
    batches = [to_devices(mesh, rows.batch_at(step, which=which), size) for step in range(2)]
    letters = dict.fromkeys(Batch._fields, "BT")
    steps = {f"step {number}": batch._asdict() for number, batch in enumerate(batches, 1)}
    yield "batches", _leaves(steps, letters)

    state = _stirred_state(config, mesh)
    params = _leaves(state.params, all_letters(config))
    yield "parameters", params

    batch = to_devices(mesh, _weighed(rows.batch_at(0, which=which), config, which), size)
    loss, grads = _jit(config, mesh, _gradients)(state.params, batch)
    yield "loss", _leaves({"loss": loss}, {"loss": ""})
    letters = trained_letters(config)
    yield "gradients", _leaves(grads, letters)
    losses_BT = _jit(config, mesh, _dropped)(state.params, batch)
    yield "dropout", _leaves({"losses": losses_BT}, {"losses": "BT"})

    state, _ = jit_train_step(config, mesh)(state, batch)
    after = _leaves(state.params, all_letters(config))
    yield "update", {name: _less(leaf, params[name]) for name, leaf in after.items()}
    yield "moments", _leaves(state.opt_state, letters)


def _rows(config: Config) -> Rows:
    """Rows of documents of many lengths, in the order that the experiment's stores, their weights
    and its options give them.
    """
    model, data = config.model, config.data
    pad, end = model.vocab_size - 2, model.vocab_size - 1
    members = []
    for number, one in enumerate(data.mixture or (None,)):
        rng = np.random.default_rng((config.seed, number))
        tokens = rng.integers(0, pad, 8 * config.batch_size * model.context_size, np.int32)
        tokens[rng.random(len(tokens)) < 4 / model.context_size] = end
        own = {"name": one.name, "weight": one.weight, "weights": one.weights} if one else {}
        members.append(Member(store=_Text(tokens), **own))
    return Rows(
        members=tuple(members),
        context_size=model.context_size,
        batch_size=config.batch_size,
        seed=config.seed,
        shuffle=data.shuffle,
        pad=pad,
        end=end,
        skip=data.skip,
    )


def _weighed(batch: Batch, config: Config, which: Which) -> Batch:
    """Rows whose weights add up to another sum in each, with what the head is to say."""
    rng, model = np.random.default_rng(config.seed), config.model
    shape = (config.batch_size, model.context_size)
    weights_BT = rng.choice(np.float32([0, 0.5, 1, 2]), shape)
    weights_BT[-1, model.context_size // 2 :] = 0
    batch = batch._replace(weights_BT=batch.weights_BT * weights_BT[which])
    if model.head == "lm":
        return batch
    kinds = {"label": model.num_labels, "labels": 2 ** (model.num_labels or 0), "span": 4}
    return batch._replace(targets_BT=rng.integers(0, kinds[model.head], shape, np.int32)[which])


def _stirred_state(config: Config, mesh: Mesh) -> TrainState:
    """The state before the first step, with parameters none of which is 0, so that each matters."""

    def stirred(key: jax.Array) -> TrainState:
        state = init_state(config, key)
        leaves, tree = jax.tree.flatten(state.params)
        stirred = [
            leaf + 0.1 * jax.random.normal(jax.random.fold_in(key, number), leaf.shape)
            for number, leaf in enumerate(leaves)
        ]
        return state._replace(params=jax.tree.unflatten(tree, stirred))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return jax.jit(stirred, out_shardings=shardings)(jax.random.key(config.seed))


def _jit(config: Config, mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the config, parameters, a batch and the key of the first step, compiled for
    parameters and a batch on a mesh.
    """
    config = replace(config, model=resolve(config.model, "cpu")[0])
    state = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    batch = Batch(*[in_use(mesh, "BT")] * len(Batch._fields))

    def run(params: Params, batch: Batch) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            key = jax.random.fold_in(jax.random.key(config.seed), 0)
            return function(config, params, batch, key)

    return jax.jit(run, in_shardings=(state.params, batch))


def _gradients(
    config: Config, params: Params, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Params]:
    """The loss, and its gradients as they are stored."""
    loss, grads = loss_and_grads(params, batch, config, key)
    return loss, jax.tree.map(constrain_stored, grads, trained_letters(config))


def _dropped(config: Config, params: Params, batch: Batch, key: jax.Array) -> jax.Array:
    """The losses of all positions with dropout."""
    model, run = replace(config.model, dropout=DROPOUT), stack_of(config.mesh)
    return token_losses(merged(params, config), batch, model, key=key, run=run)


# --- leaves --------------------------------------------------------------------------------------


def _leaves(tree: Any, letters: Any) -> Leaves:
    """A tree by the names of its leaves."""
    return {
        name: Leaf(
            of_leaf,
            group,
            leaf.shape,
            tuple(
                Held(shard.device.id, shard.index, np.array(shard.data))  # its memory may be taken
                for shard in leaf.addressable_shards
            ),
        )
        for name, of_leaf, group, leaf in _named(tree, letters)
    }


def _named(tree: Any, letters: Any) -> Iterator[tuple[str, str, str, Any]]:
    """Of each leaf its name, its letters, which belong to the end of the name, the name before that
    end, and itself.
    """
    known = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(letters)}
    for path, leaf in jax.tree.leaves_with_path(tree):
        words = (name := _name(path)).split("/")
        ends = ("/".join(words[start:]) for start in range(len(words)))
        end = next((end for end in ends if end in known), name)
        yield name, known.get(end, ""), name.removesuffix(end), leaf


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _less(leaf: Leaf, other: Leaf) -> Leaf:
    """What one is more than the other."""
    parts = [
        part._replace(values=part.values - before.values)
        for part, before in zip(leaf.parts, other.parts, strict=True)
    ]
    return leaf._replace(parts=tuple(parts))


def _worst(here: Leaves, there: Leaves) -> list[Worst]:
    """Of each leaf, over the devices of all processes."""
    whole = {name: leaf.parts[0].values.astype(np.float64) for name, leaf in there.items()}
    largest = {name: np.abs(values).max(initial=0) for name, values in whole.items()}
    of_group: dict[str, float] = {}
    for name, leaf in here.items():
        of_group[leaf.group] = max(of_group.get(leaf.group, 0), largest[name])
    found = [
        max(
            (_worst_of(part, leaf, whole[name]) for part in leaf.parts),
            key=lambda one: one.share,
        )
        for name, leaf in here.items()
    ]
    scales = [max(largest[name], LEAST_SCALE * of_group[leaf.group]) for name, leaf in here.items()]
    found = [
        one._replace(share=one.share / (scale or 1))
        for one, scale in zip(found, scales, strict=True)
    ]
    each = np.float32(multihost_utils.process_allgather(np.float32(found)))
    each = each.reshape(-1, len(found), len(Worst._fields))
    return [Worst(*of_leaf[of_leaf[:, 0].argmax()].tolist()) for of_leaf in each.swapaxes(0, 1)]


def _worst_of(part: Held, leaf: Leaf, whole: np.ndarray) -> Worst:
    wanted = whole[part.index]
    apart = np.nan_to_num(np.abs(part.values - wanted), nan=np.inf)
    place = np.unravel_index(apart.argmax(), apart.shape)
    starts = [one.indices(size)[0] for one, size in zip(part.index, leaf.shape, strict=True)]
    flat = np.ravel_multi_index([a + b for a, b in zip(place, starts, strict=True)], leaf.shape)
    return Worst(apart[place], part.device, flat, part.values[place], wanted[place])


# --- where arrays lie ----------------------------------------------------------------------------


def misplaced(config: Config, mesh: Mesh) -> list[str]:
    """What is wrong with where the parts of each array are to lie; of most arrays nothing."""
    return [_misplaced(mesh, one) for one in _layouts(config, mesh)]


class Layout(NamedTuple):
    """Where the parts of an array are to lie."""

    when: str  # one of PROMISED
    name: str
    letters: str
    shape: tuple[int, ...]
    sharding: NamedSharding


def _layouts(config: Config, mesh: Mesh) -> list[Layout]:
    """Of the state, of batches, and of what is computed with: weights, and what a block makes."""
    model = config.model
    sizes = model.sizes | {"B": config.batch_size, "T": model.context_size}
    state, letters = abstract_state(config, mesh), all_letters(config)
    found = [
        Layout("stored", name, of_leaf, leaf.shape, leaf.sharding)
        for name, of_leaf, _, leaf in _named(
            {"params": state.params, "moments": state.opt_state}, letters
        )
    ]

    def lies(letters: str, table: dict) -> NamedSharding:
        return NamedSharding(mesh, spec(letters, table))

    weights = {leaf.lstrip("L") for leaf in jax.tree.leaves(letters) if "R" not in leaf}
    cases = [("in a batch", "BT", in_use(mesh, "BT"))]
    for of_one in [*sorted(weights), "BTD", "BTNH", "BTKH", "BTF", "BTV"]:
        cases.append(("in use", of_one, lies(of_one, IN_USE)))
    if model.split_residual:
        cases.append(("between blocks", "BTD", lies("BTD", BETWEEN)))
    return found + [
        Layout(when, "", of_one, tuple(sizes[letter] for letter in of_one), sharding)
        for when, of_one, sharding in cases
    ]


def _misplaced(mesh: Mesh, layout: Layout) -> str:
    """What the first device that has not the promised part of an array has; nothing if all have."""
    promised, shape = PROMISED[layout.when], layout.shape
    indices = layout.sharding.devices_indices_map(shape)
    for place, device in np.ndenumerate(mesh.devices):
        at = dict(zip(mesh.axis_names, place, strict=True))
        for letter, size, index in zip(layout.letters, shape, indices[device], strict=True):
            number, count, axes = 0, 1, promised.get(letter, "")
            for axis in axes.split():
                number, count = number * mesh.shape[axis] + at[axis], count * mesh.shape[axis]
            first, last = size * number // count, size * (number + 1) // count
            start, stop, _ = index.indices(size)
            if (start, stop) != (first, last):
                return (
                    f"{layout.name} {layout.letters} {layout.when}: {_words_of(mesh, device.id)} "
                    f"has {start}:{stop} of {letter}, but split over {axes or 'no axis'} it would "
                    f"have {first}:{last}"
                ).strip()
    return ""


def _words_of(mesh: Mesh, number: int) -> str:
    """A device, and its place in the mesh."""
    (place,) = [place for place, one in np.ndenumerate(mesh.devices) if one.id == number]
    axes = zip(mesh.axis_names, place, strict=True)
    at = ", ".join(f"{axis} {i}" for axis, i in axes if mesh.shape[axis] > 1)
    return f"device {number}{at and f' ({at})'}"


# --- the table -----------------------------------------------------------------------------------


class _Table:
    """What was compared, a line each, and the first difference."""

    def __init__(self, mesh: Mesh, say: Callable[[str], None]):
        self.mesh, self.say, self.first = mesh, say, ""

    def layout(self, found: list[str]) -> None:
        """A line on where arrays lie, as `misplaced` says it."""
        wrong = [words for words in found if words]
        self.line("layout", len(found), wrong, "lie as the axes promise")

    def compare(self, kind: str, here: Leaves, there: Leaves) -> None:
        """A line on the leaves of a mesh beside those of one device."""
        found = dict(zip(here, _worst(here, there), strict=True))
        wrong = [
            self.words(name, here[name], one)
            for name, one in found.items()
            if one.share > BOUNDS[kind]
        ]
        most = max(one.share for one in found.values())
        near = f"within {most:.0e} of their largest values" if most else "bit for bit"
        self.line(kind, len(found), wrong, f"are the same, {near}")

    def words(self, name: str, leaf: Leaf, worst: Worst) -> str:
        """How a leaf differs, and where."""
        place = np.unravel_index(int(worst.place), leaf.shape)
        at = ", ".join(f"{letter} {i}" for letter, i in zip(leaf.letters, place, strict=True))
        return (
            f"{name} {leaf.letters} by {worst.share:.1e} of its largest value: at {at or 'it'} "
            f"{_words_of(self.mesh, int(worst.device))} has {worst.here:.9g}, and one device alone "
            f"{worst.there:.9g}"
        )

    def line(self, kind: str, count: int, wrong: list[str], right: str) -> None:
        """A line, of what is wrong if anything is."""
        if not wrong:
            self.say(f"{kind:10} {count} {right}")
            return
        self.say(f"{kind:10} {len(wrong)} of {count} DIFFER, the first {wrong[0]}")
        self.first = self.first or f"{kind}: {wrong[0]}"
