"""The mesh, the two tables that place every tensor on it, and rows on their way to the devices."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gptjax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor", "context", "pipe")

# Where the dimension of a letter lies while a tensor is kept, and while it is computed with. These
# tables are the sharding code. Rows lie on `pipe` only outside the pipeline: within it the axis is
# taken.
STORED = {"L": "pipe", "V": "tensor", "D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor"}
IN_USE = {
    "B": ("data", "fsdp", "pipe"),
    "T": "context",
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "V": "tensor",
}
# Of a batch as a step is given it: every stage of the pipeline needs all rows.
FED = IN_USE | {"B": ("data", "fsdp")}


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


def constrain_fed(x: jax.Array, letters: str) -> jax.Array:
    """Place a tensor as a batch is fed: rows whole on every stage of a pipeline."""
    return _place(x, letters, FED)


def gather(x: jax.Array, letters: str) -> jax.Array:
    """Bring a parameter from how it is stored to how it is used; its gradient goes the other way.

    Without the second half XLA would bring every gradient to the layout in use, whole on each
    device of the fsdp axis, before it keeps a part of it.
    """
    return _gather(x, letters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x: jax.Array, letters: str) -> jax.Array:
    return constrain(x, letters)


_gather.defvjp(
    lambda x, letters: (constrain(x, letters), None),
    lambda letters, _, gradient: (_place(gradient, letters, STORED),),
)


def _place(x: jax.Array, letters: str, table: dict) -> jax.Array:
    assert x.ndim == len(letters), (x.shape, letters)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.auto_axes:
        return x
    # What does not divide stays whole: a prompt alone on a mesh of eight. For training, the
    # config's checks refuse it. Inside `jax.shard_map` an axis is its caller's.
    axes = [
        _dividing(mesh, _free(mesh, axes), size)
        for axes, size in zip(spec(letters, table), x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def _free(mesh: jax.sharding.AbstractMesh, axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Those of the axes that the mesh has and leaves to XLA."""
    return tuple(
        axis
        for axis in ((axes,) if isinstance(axes, str) else axes or ())
        if axis in mesh.auto_axes
    )


def _dividing(
    mesh: jax.sharding.AbstractMesh, axes: tuple[str, ...], size: int
) -> tuple[str, ...]:
    """As many of the axes, the first ones, as a dimension of that size divides by."""
    while axes and size % _extent(mesh, axes):
        axes = axes[:-1]
    return axes


def _extent(mesh: jax.sharding.AbstractMesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def in_use_spec(letters: str) -> PartitionSpec:
    """The axes that a tensor of these letters is split over while it is computed with, as far as
    the mesh that is set leaves them to XLA.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return PartitionSpec(*(_free(mesh, axes) for axes in spec(letters, IN_USE)))


def row_shards(num_rows: int) -> int:
    """In how many parts rows lie on the axes of `FED`, on the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return _extent(mesh, _dividing(mesh, _free(mesh, FED["B"]), num_rows))


def stored(mesh: Mesh, letters: str) -> NamedSharding:
    """Where a parameter of these letters is kept."""
    return NamedSharding(mesh, spec(letters, STORED))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def in_use(mesh: Mesh, letters: str) -> NamedSharding:
    """Where an array of a batch is while it is computed with."""
    return NamedSharding(mesh, spec(letters, FED))


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a global batch that this process's devices hold.

    Raises:
      ConfigError: if they are not one run of rows, which a mesh with the rows' axes outermost
        always gives.
    """
    sharding = in_use(mesh, "B")
    held = {
        (index[0].start or 0, index[0].stop or batch_size)
        for index in sharding.addressable_devices_indices_map((batch_size,)).values()
    }
    start, stop = min(low for low, _ in held), max(high for _, high in held)
    if sum(high - low for low, high in held) != stop - start:
        raise ConfigError(
            f"the rows of this process are not consecutive: {sorted(held)}; "
            "order the devices by process"
        )
    return slice(start, stop)


def to_devices(mesh: Mesh, local: Any, batch_size: int) -> Any:
    """This process's rows [B/processes, ...] of each array -> global arrays [B, ...], split as
    rows in use are.
    """

    def put(rows: np.ndarray) -> jax.Array:
        letters = "BT"[: rows.ndim]
        return jax.make_array_from_process_local_data(
            in_use(mesh, letters), rows, (batch_size, *rows.shape[1:])
        )

    return jax.tree.map(put, local)


def constrain_stored(x: jax.Array, letters: str) -> jax.Array:
    """Place a tensor of a parameter's letters, such as its gradient, as the parameter is stored."""
    return _place(x, letters, STORED)


def whole(x: jax.Array) -> jax.Array:
    """Place a whole copy on every device of the mesh that is set."""
    return _place(x, "?" * x.ndim, {})
