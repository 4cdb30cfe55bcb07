"""Whether the copies of one array on several devices are still the same, bit for bit."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec


class Comparison(NamedTuple):
    """What a comparison found, on its way from the devices."""

    differs: jax.Array  # bool [arrays]: whether the copies of each do, the same on every device
    words: jax.Array  # uint32 [devices, arrays, 2]: what each device's part folds into


class Comparer(NamedTuple):
    """A comparison of all arrays of a tree that have copies."""

    compare: Callable[[Any], Comparison]  # of a tree; compiled, and nothing waits for it
    names: list[str]  # of the arrays, such as "params/head/norm/scale"
    axes: list[tuple[str, ...]]  # of the mesh, along which each has copies
    mesh: Mesh


def make_comparer(like: Any, mesh: Mesh) -> Comparer | None:
    """A comparer of trees like this one; None if no array has copies, as on one device.

    Each device folds its part of each array into two words, one read of the memory; then only the
    words are compared, along the axes that the array is not split over.

    Args:
      like: the tree as jax.ShapeDtypeStruct, each leaf with its sharding.
    """
    leaves = jax.tree.leaves_with_path(like)
    specs = [leaf.sharding.spec for _, leaf in leaves]
    axes = [_copied_over(spec, mesh) for spec in specs]
    copied = [i for i, over in enumerate(axes) if over]
    if not copied:
        return None
    names = [jax.tree_util.keystr(leaves[i][0], simple=True, separator="/") for i in copied]

    def compare(*parts: jax.Array) -> Comparison:
        words = [fold(part) for part in parts]
        differs = [
            (jax.lax.pmax(word, axes[i]) != jax.lax.pmin(word, axes[i])).any()
            for i, word in zip(copied, words, strict=True)
        ]
        # What differs between two parts of an array is one thing, and known everywhere.
        differs = jax.lax.pmax(jnp.stack(differs).astype(jnp.uint32), mesh.axis_names) > 0
        return Comparison(differs, jnp.stack(words)[None])

    mapped = jax.shard_map(
        compare,
        mesh=mesh,
        in_specs=tuple(specs[i] for i in copied),
        out_specs=Comparison(PartitionSpec(), PartitionSpec(mesh.axis_names)),
        check_vma=False,  # that the copies may differ is the point
    )

    def compare_tree(tree: Any) -> Comparison:
        leaves = jax.tree.leaves(tree)
        return mapped(*(leaves[i] for i in copied))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    compiled = jax.jit(compare_tree, in_shardings=(shardings,)).lower(like).compile()
    return Comparer(compiled, names, [axes[i] for i in copied], mesh)


def _copied_over(spec: PartitionSpec, mesh: Mesh) -> tuple[str, ...]:
    """The axes that an array has copies along."""
    split = {axis for axes in spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)}
    return tuple(axis for axis in mesh.axis_names if axis not in split and mesh.shape[axis] > 1)


def fold(part: jax.Array) -> jax.Array:
    """Two words of an array's bits, uint32 [2], in which every bit matters: each element is
    multiplied by an odd number of its own, so no single change is lost, and sums do not depend on
    their order.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[part.dtype.itemsize]
    if part.dtype == jnp.bool_:
        part = part.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(part, unsigned).reshape(-1).astype(jnp.uint32)
    odd = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
    lanes = (
        bits * (odd * jnp.uint32(0x9E3779B1)),
        (bits ^ bits >> 15) * (odd * jnp.uint32(0x85EBCA77)),
    )
    return jnp.stack([lane.sum(dtype=jnp.uint32) for lane in lanes])


def differences(comparison: Comparison, comparer: Comparer) -> list[str]:
    """What a comparison found, in words: each array whose copies differ, and on which devices.

    Those devices are the ones in the minority; where there are only two copies, both. All processes
    call it together, for when there are differences it takes the words of all.
    """
    differs = np.asarray(jax.device_get(comparison.differs))
    if not differs.any():
        return []
    words = multihost_utils.process_allgather(comparison.words, tiled=True)
    mesh, found = comparer.mesh, []
    for i in np.flatnonzero(differs):
        places = tuple(mesh.axis_names.index(axis) for axis in comparer.axes[i])
        copies = math.prod(mesh.devices.shape[place] for place in places)
        ends = range(mesh.devices.ndim - len(places), mesh.devices.ndim)
        devices = np.moveaxis(mesh.devices, places, ends).reshape(-1, copies)
        grid = words[:, i].reshape(*mesh.devices.shape, 2)
        parts = np.moveaxis(grid, places, ends).reshape(-1, copies, 2)
        odd = [
            str(device)
            for part, group in zip(parts, devices, strict=True)
            for device in _minority(part, group)
        ]
        found.append(f"{comparer.names[i]} on {', '.join(odd)}")
    return found


def _minority(words: np.ndarray, devices: np.ndarray) -> list[jax.Device]:
    """The devices whose words, [copies, 2], are not those of most; all of them if it is a draw."""
    _, kind, counts = np.unique(words, axis=0, return_inverse=True, return_counts=True)
    if len(counts) == 1:
        return []
    draw = (counts == counts.max()).sum() > 1
    odd = draw | (counts[kind.reshape(-1)] < counts.max())
    return list(devices[odd])
