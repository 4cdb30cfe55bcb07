"""The mesh, the tables that place every tensor on it, and rows on their way to the devices."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gptjax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor", "context", "pipe")

# Where the dimension of a letter lies while a tensor is kept, while it is computed with, and
# between blocks if `model.split_residual` says so. These tables are the sharding code. Rows lie on
# `pipe` only outside the pipeline: within it the axis is taken.
STORED = {"L": "pipe", "V": "tensor", "D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor"}
IN_USE = {
    "B": ("data", "fsdp", "pipe"),
    "T": "context",
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "V": "tensor",
}
BETWEEN = IN_USE | {"T": ("context", "tensor")}
# Of a batch as a step is given it: every stage of the pipeline needs all rows.
FED = IN_USE | {"B": ("data", "fsdp")}
# Of rows of a table, as they are looked up: each device of the fsdp axis has a slice of the table's
# width, and looks it up for the tokens of all of them. What travels is activations both ways, not
# the table, and not the activations of the whole batch for its gradient, as XLA would do.
LOOKED_UP = {"B": "data", "T": "context", "D": "fsdp"}
# Of the gradient of the unembedding, with a term for each device's rows and positions, which the
# devices of the fsdp axis send each other by width, and then add up.
TERMS = LOOKED_UP | {"B": ("data", "pipe"), "V": "tensor"}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run: all five axes, in the order of `AXES`, those not used of size 1.

    Devices of several slices (TPU), or of several groups named by `config.slices`, are laid out so
    that only the axis `config.across` crosses the slower network between them.

    Args:
      config: the sizes of the axes.
      devices: all devices of the run; None takes `jax.devices()`.
    Raises:
      ConfigError: if the axes do not use each device exactly once, or the crossing axis does not
        divide by the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    others = config.fsdp * config.tensor * config.context * config.pipe
    sizes = {axis: getattr(config, axis) or len(devices) // others for axis in AXES}
    shape = tuple(sizes.values())
    if np.prod(shape) != len(devices):
        raise ConfigError(
            f"mesh {sizes} needs {np.prod(shape)} devices, but there are {len(devices)}: "
            f"give axes whose product is {len(devices)}"
        )
    slices = config.slices or len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[config.across] % slices:
        raise ConfigError(
            f"mesh.{config.across} = {sizes[config.across]} does not divide by {slices} slices: "
            f"give a multiple of {slices}, or another mesh.across"
        )
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        across = AXES.index(config.across)
        groups = np.array_split(np.array(_by_slice(devices), dtype=object), slices)
        inner = tuple(size // slices if axis == across else size for axis, size in enumerate(shape))
        parts = [
            mesh_utils.create_device_mesh(inner, list(group), allow_split_physical_axes=True)
            for group in groups
        ]
        grid = np.concatenate(parts, axis=across)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _by_slice(devices: list[jax.Device]) -> list[jax.Device]:
    return sorted(
        devices,
        key=lambda device: (getattr(device, "slice_index", 0), device.process_index, device.id),
    )


def spec(letters: str, table: dict[str, str | tuple[str, ...]]) -> PartitionSpec:
    """The axes that each dimension lies on: `spec("DNH", STORED)` is `P("fsdp", "tensor",
    None)`.
    """
    return PartitionSpec(*(table.get(letter) for letter in letters))


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Place a tensor as it is in use on the mesh that is set; without one, the tensor itself."""
    return _place(x, letters, IN_USE)


def constrain_between(x: jax.Array, letters: str) -> jax.Array:
    """Place a tensor as it is between blocks."""
    return _place(x, letters, BETWEEN)


def constrain_fed(x: jax.Array, letters: str, *, between: bool = False) -> jax.Array:
    """Place a tensor as a batch is fed, with all rows on every stage of a pipeline; the other
    dimensions as in use, or as between blocks.
    """
    return _place(x, letters, (BETWEEN if between else IN_USE) | {"B": FED["B"]})


def constrain_looked_up(x: jax.Array, letters: str) -> jax.Array:
    """Place a tensor as rows of a table are looked up, split by width as the table is stored."""
    return _place(x, letters, LOOKED_UP)


def constrain_terms(x: jax.Array, letters: str) -> jax.Array:
    """Place terms of a gradient where they are added up."""
    return _place(x, letters, TERMS)


def gather(x: jax.Array, letters: str) -> jax.Array:
    """Bring a parameter from how it is stored to how it is used; its gradient goes the other way.

    Without the second half XLA would bring every gradient to the layout in use, whole on each
    device of the fsdp axis, before it keeps a part of it.
    """
    return _move(x, letters, "stored", "in use")


def from_between(x: jax.Array, letters: str) -> jax.Array:
    """Bring a tensor from how it is between blocks to how it is used, and its gradient back: an
    all-gather, and a reduce-scatter.
    """
    return _move(x, letters, "between", "in use")


def to_between(x: jax.Array, letters: str) -> jax.Array:
    """The inverse of `from_between`."""
    return _move(x, letters, "in use", "between")


_TABLES = {"stored": STORED, "in use": IN_USE, "between": BETWEEN}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _move(x: jax.Array, letters: str, here: str, there: str) -> jax.Array:
    return _place(x, letters, _TABLES[there])


_move.defvjp(
    lambda x, letters, here, there: (_place(x, letters, _TABLES[there]), None),
    lambda letters, here, there, _, gradient: (_place(gradient, letters, _TABLES[here]),),
)


def _place(x: jax.Array, letters: str, table: dict) -> jax.Array:
    if not jax.sharding.get_abstract_mesh().auto_axes:
        return x
    axes = _dividing(x.shape, letters, table)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def _dividing(shape: tuple[int, ...], letters: str, table: dict) -> list[tuple[str, ...]]:
    """The axes of the mesh that is set that each dimension lies on.

    As many of them, the first ones, as it divides by: a prompt alone on a mesh of eight stays
    whole. For training, the config's checks refuse what does not divide. Inside `jax.shard_map` an
    axis is its caller's.
    """
    assert len(shape) == len(letters), (shape, letters)
    mesh = jax.sharding.get_abstract_mesh()
    found = []
    for axes, size in zip(spec(letters, table), shape, strict=True):
        axes = _free(mesh, axes)
        while size % _extent(mesh, axes):
            axes = axes[:-1]
        found.append(axes)
    return found


def _free(mesh: jax.sharding.AbstractMesh, axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Those of the axes that the mesh has and leaves to XLA."""
    return tuple(
        axis
        for axis in ((axes,) if isinstance(axes, str) else axes or ())
        if axis in mesh.auto_axes
    )


def _extent(mesh: jax.sharding.AbstractMesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def parts(letter: str, size: int, *, between: bool = False) -> int:
    """Into how many parts the mesh that is set splits a dimension of this size, in use or between
    blocks; 1 without a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    (axes,) = _dividing((size,), letter, BETWEEN if between else IN_USE)
    return _extent(mesh, axes)


def row_shards(num_rows: int) -> int:
    """Into how many parts the mesh that is set splits so many rows of a batch as it is fed."""
    (axes,) = _dividing((num_rows,), "B", FED)
    return _extent(jax.sharding.get_abstract_mesh(), axes)


def by_hand(run: Callable, shape: tuple[int, ...], inputs: str, outputs: str) -> Callable:
    """A function of the parts that each device has, for what XLA cannot split: a kernel, or
    messages between devices.

    Args:
      run: takes and returns a device's parts.
      shape: of keys, [B, T, K, H]: which of the axes divide.
      inputs: letters of each of its arguments, apart by spaces; N is split as K is.
      outputs: letters of its result, or of each of several.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.auto_axes:
        return run
    lies = dict(zip("BTKH", _dividing(shape, "BTKH", IN_USE), strict=True))
    lies["N"] = lies["K"]
    specs = [
        [PartitionSpec(*(lies.get(letter) for letter in letters)) for letters in side.split()]
        for side in (inputs, outputs)
    ]
    return jax.shard_map(
        run,
        in_specs=tuple(specs[0]),
        out_specs=tuple(specs[1]) if len(specs[1]) > 1 else specs[1][0],
        axis_names=set(mesh.auto_axes),
        check_vma=False,
    )


def stored(mesh: Mesh, letters: str) -> NamedSharding:
    """Where a parameter of these letters is kept."""
    return NamedSharding(mesh, spec(letters, STORED))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def in_use(mesh: Mesh, letters: str) -> NamedSharding:
    """Where an array of a batch is while it is computed with."""
    return NamedSharding(mesh, spec(letters, FED))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, in order: int64.

    They may lie apart: devices are in the order in which they are wired, and those of one host are
    a square of a TPU's torus.
    """
    held = in_use(mesh, "B").addressable_devices_indices_map((batch_size,))
    every = np.arange(batch_size)
    return np.unique(np.concatenate([every[rows] for (rows,) in held.values()]))


def to_devices(mesh: Mesh, local: Any, batch_size: int) -> Any:
    """This process's rows [B/processes, ...] of each array -> global arrays [B, ...], split as
    rows in use are. Of positions that are split, a process gives its devices only theirs.
    """
    mine = local_rows(mesh, batch_size)

    def put(rows: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(mine, start)
            return rows[(slice(first, first + stop - start), *index[1:])]

        sharding = in_use(mesh, "BT"[: rows.ndim])
        return jax.make_array_from_callback((batch_size, *rows.shape[1:]), sharding, part)

    return jax.tree.map(put, local)


def constrain_stored(x: jax.Array, letters: str) -> jax.Array:
    """Place a tensor of a parameter's letters, such as its gradient, as the parameter is stored."""
    return _place(x, letters, STORED)


def whole(x: jax.Array) -> jax.Array:
    """Place a whole copy on every device of the mesh that is set."""
    return _place(x, "?" * x.ndim, {})
