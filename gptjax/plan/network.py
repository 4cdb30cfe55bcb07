"""How long devices need to exchange something: by where they lie, and the links between them."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import Config, MeshConfig
from gptjax.plan.memory import leaves, schedule, share, sizes_of, turns_of
from gptjax.plan.topologies import Topology
from gptjax.sharding import BETWEEN, IN_USE, STORED, make_mesh

# Bytes that a device sends, as a share of a whole tensor, of n devices (Thakur et al. 2005,
# "Optimization of Collective Communication Operations in MPICH", sections 4.1 to 4.5: rings).
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}


class Exchange(NamedTuple):
    """What devices along some axes of the mesh exchange in a step."""

    kind: str
    axes: tuple[str, ...]
    num_bytes: int  # of the whole tensor, each time
    count: int  # times in a step
    what: str


@dataclass(frozen=True)
class Place:
    """Where a device of a topology lies; mesh_utils orders such stand-ins as it orders devices."""

    id: int
    coords: tuple[int, ...]  # of its chip in the torus
    core_on_chip: int
    process_index: int
    slice_index: int
    device_kind: str
    platform: str


KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite",
         "tpu7x": "TPU7x"}  # fmt: skip


def places(topology: Topology) -> list[Place]:
    """The devices of a topology, in JAX's order."""
    chip, found = topology.chip, []
    kind = KINDS.get(chip.name, chip.name)
    if chip.platform == "tpu":
        shape = (*topology.shape, 1, 1)[:3]
        for part, z, y, x, core in itertools.product(
            *map(range, (topology.slices, *shape[::-1], chip.devices))
        ):
            found.append(Place(len(found), (x, y, z), core, 0, part, kind, chip.platform))
        return found
    hosts, each = topology.shape if chip.platform == "gpu" else (1, *topology.shape)
    for part, host, number in itertools.product(range(topology.slices), range(hosts), range(each)):
        place = part * hosts + host
        found.append(Place(len(found), (number,), 0, place, part, kind, chip.platform))
    return found


def arrange(topology: Topology, mesh: MeshConfig) -> np.ndarray:
    """The devices of a topology as they lie on a mesh."""
    return make_mesh(mesh, places(topology)).devices


def bandwidth(group: Sequence[Any], topology: Topology) -> float:
    """Bytes a second at which each of a group of devices can send to the others, of a tensor that
    goes to all of them, in rings in every direction that there is.
    """
    chip = topology.chip
    parts = len({device.slice_index for device in group})
    apart = {(device.slice_index, device.process_index) for device in group}
    if parts > 1:
        return _through(chip.outside, len(group), parts)
    if chip.platform == "gpu" and len(apart) > 1:
        return min(chip.link, _through(chip.outside, len(group), len(apart)))
    if chip.platform != "tpu":
        return chip.link
    spread = [len({device.coords[way] for device in group}) for way in range(len(topology.shape))]
    ring = 4 if chip.dimensions == 3 else 16  # whose ends are joined
    rates = [
        (2 if size == whole and whole % ring == 0 else 1) * chip.link
        for size, whole in zip(spread, topology.shape, strict=True)
        if size > 1
    ]
    return sum(rates) or 2 * chip.link  # the cores of one chip


def _through(outside: float, devices: int, places: int) -> float:
    """Of a group in several hosts or slices: all its devices in one of them share what comes in."""
    inside = devices / places
    return outside * inside * ((devices - 1) / devices) / ((places - 1) / places)


def seconds(kind: str, num_bytes: float, group: Sequence[Any], topology: Topology) -> float:
    """For a tensor that is so large where it is whole."""
    if len(group) < 2:
        return 0.0
    return SENT[kind](len(group)) * num_bytes / bandwidth(group, topology)


def group_along(grid: np.ndarray, names: Sequence[str], axes: Mapping[str, int]) -> list[Any]:
    """The first devices along some axes of a mesh."""
    index = tuple(slice(None) if name in names else 0 for name in axes)
    return list(grid[index].reshape(-1))


def exchanges(config: Config, axes: Mapping[str, int]) -> Iterator[Exchange]:
    """What the layout makes necessary: parameters gathered over fsdp, their gradients scattered and
    added up, and sums over tensor; in each accumulated part.
    """
    model, sizes, parts = config.model, sizes_of(config, axes), config.accumulate
    plan = schedule(config, axes)
    layers = turns_of(config, axes) * len(model.windows)  # of those that a device runs in a part
    itemsize = 4 if model.compute_dtype == "float32" else 2
    known = leaves(model, config.tune)
    if axes["fsdp"] > 1:
        blocks = [leaf for leaf in known if leaf.path.startswith("blocks") and "D" in leaf.letters]
        whole = itemsize * sum(share(leaf.letters, sizes, axes, IN_USE) for leaf in blocks)
        again = 1 if model.remat == "none" else 2
        L = model.num_layers
        each, times = whole // L, layers * parts
        yield Exchange("all-gather", ("fsdp",), each, again * times, "weights of a layer")
        yield Exchange("reduce-scatter", ("fsdp",), each, times, "their gradients")
        table = share("VD", sizes, axes, IN_USE)
        yield Exchange("all-gather", ("fsdp",), itemsize * table, parts, "unembedding")
        yield Exchange("all-to-all", ("fsdp",), 4 * table, parts, "gradient of the unembedding")
        stream = itemsize * share("BTD", sizes, axes, IN_USE)
        yield Exchange("all-to-all", ("fsdp",), stream, 2 * parts, "embedded tokens, and back")
        if model.positions == "learned":
            table = itemsize * share("PD", sizes, axes, IN_USE)
            yield Exchange("all-gather", ("fsdp",), table, parts, "learned positions")
            yield Exchange("all-reduce", ("fsdp",), table, parts, "their gradient")
    others = tuple(axis for axis in ("data", "context") if axes[axis] > 1)
    if others:
        kept = itemsize * sum(
            share(leaf.letters, sizes, axes, STORED) for leaf in known if leaf.count
        )
        yield Exchange("all-reduce", others, kept, parts, "gradients of all parameters")
        if model.tied_embedding:  # has two
            table = 4 * share("VD", sizes, axes, STORED)
            yield Exchange("all-reduce", others, table, parts, "gradient of the unembedding")
    # A pipeline's rows are split over its stages outside of it, and in it there are a few at once.
    in_layer = sizes | {"B": sizes["B"] // plan.microbatches * plan.stages}
    if axes["pipe"] > 1:
        passed = itemsize * share(
            "BTD", in_layer, axes, BETWEEN if model.split_residual else IN_USE
        )
        ticks = 2 * plan.ticks * parts
        yield Exchange("collective-permute", ("pipe",), passed, ticks, "rows to the next stage")
    if axes["context"] > 1:
        keys = 2 * itemsize * share("BSKH", in_layer, axes, IN_USE)
        # Keys and values, once more where they are computed again, and again with their gradients.
        again = 3 if model.remat == "none" else 4
        yield Exchange("all-gather", ("context",), keys, again * layers * parts, "keys and values")
    if axes["tensor"] > 1:
        stream = itemsize * share("BTD", in_layer, axes, IN_USE)
        width = itemsize * share("BTD", sizes, axes, IN_USE)
        again = {"none": 4, "dots": 4, "full": 5}[model.remat]
        yield Exchange("all-reduce", ("tensor",), stream, again * layers * parts, "residual stream")
        if model.split_residual:  # what a product reads is gathered once more, for its gradient
            once_more = {"none": 0, "dots": 2, "full": 1}[model.remat] * layers * parts
            yield Exchange("all-gather", ("tensor",), stream, once_more, "inputs of products")
        yield Exchange("all-reduce", ("tensor",), width, parts, "embedded tokens")
        yield Exchange("all-reduce", ("tensor",), 2 * width, parts, "gradient of the logits' input")


def mesh_axes(mesh: MeshConfig, num_devices: int) -> dict[str, int]:
    """The axes and their sizes; `data` is what the others leave."""
    others = {axis: getattr(mesh, axis) for axis in ("fsdp", "tensor", "context", "pipe")}
    return {"data": mesh.data or num_devices // math.prod(others.values())} | others
