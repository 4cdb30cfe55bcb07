"""How long a step takes at least: by the devices' sheets, as if nothing were ever waited for."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from gptjax.config import Config
from gptjax.metrics import flops_per_token
from gptjax.plan.compiled import Compiled
from gptjax.plan.flops import executed_flops
from gptjax.plan.liveness import kept
from gptjax.plan.memory import leaves, measure_of, schedule, share, sizes_of, turns_of
from gptjax.plan.network import exchanges, group_along, seconds
from gptjax.plan.topologies import Topology
from gptjax.sharding import STORED

ASSUMPTIONS = (
    "matrix products at the chip's published dense peak; other arithmetic takes no time",
    "each kernel reads its arguments from memory once and writes its results once, at the "
    "published bandwidth",
    "exchanges by rings over all links there are, at their published bandwidth, without latency",
    "at least: compute, memory and network fully overlap; at most: they never do",
    "a program can have all memory of a device; of a GPU's JAX takes three quarters, unless "
    "XLA_PYTHON_CLIENT_MEM_FRACTION says more",
    "no time for input, evaluation, checkpoints, restarts or kernels that are not at their best",
)


class Time(NamedTuple):
    """Seconds of a step."""

    compute: float
    memory: float | None  # None: the bandwidth is not known
    network: Mapping[str, float]  # by the axes of the mesh
    source: str  # of bytes and exchanges: "compiler" or "formula"

    @property
    def least(self) -> float:
        return max(self.compute, self.memory or 0, sum(self.network.values()))

    @property
    def most(self) -> float:
        return self.compute + (self.memory or 0) + sum(self.network.values())


def model_flops(config: Config) -> float:
    """Of a step on all devices, as MFU counts them."""
    return flops_per_token(config.model) * config.batch_size * config.model.context_size


def formula_flops(config: Config, axes: Mapping[str, int]) -> float:
    """Of a step on all devices, with what is computed again, and in a pipeline's bubble."""
    tokens = config.batch_size * config.model.context_size
    return executed_flops(config.model, schedule(config, axes).bubble) * tokens


def step_time(
    config: Config,
    axes: Mapping[str, int],
    grid: np.ndarray,
    topology: Topology,
    peak: float,
    compiled: Compiled | None = None,
) -> Time:
    """The seconds of a step.

    Args:
      config: with nothing left to choose.
      axes: the mesh's axes and their sizes.
      grid: where its devices lie.
      peak: FLOP/s of a device.
      compiled: None: bytes and exchanges are those of the layout by formula.
    """
    bandwidth = topology.chip.bandwidth
    network: dict[str, float] = defaultdict(float)
    if compiled and compiled.moved is not None:
        places = grid.reshape(-1)
        for one in compiled.collectives:
            group = [places[number] for number in one.group]
            each = seconds(one.kind, one.num_bytes, group, topology)
            network[one.axis] += one.count * each
        moved, source = compiled.moved, "compiler"
    else:
        for one in exchanges(config, axes):
            group = group_along(grid, one.axes, axes)
            each = seconds(one.kind, one.num_bytes, group, topology)
            network["+".join(one.axes)] += one.count * each
        moved, source = formula_moved(config, axes), "formula"
    return Time(
        compute=formula_flops(config, axes) / math.prod(axes.values()) / peak,
        memory=moved / bandwidth if bandwidth else None,
        network=dict(network),
        source=source,
    )


def formula_moved(config: Config, axes: Mapping[str, int]) -> float:
    """Bytes that a device reads and writes in a step, by what its tensors are computed from."""
    model, sizes = config.model, sizes_of(config, axes)
    measure = measure_of(config, axes)
    traces = kept(model)
    in_layer = measure_of(config, axes, in_layer=True)
    turns = turns_of(config, axes)
    pieces = model.context_size // sizes["Q"]
    part = turns * (traces.forward.moved(in_layer) + traces.backward.moved(in_layer))
    part += pieces * traces.loss.moved(measure)
    update = sum(
        28 * share(leaf.letters, sizes, axes, STORED) for leaf in leaves(model, config.tune)
    )
    return config.accumulate * part + update
