"""A run on hardware that is not there: what fits, what uses the memory, how fast it can be."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gptjax.config import Config, check
from gptjax.metrics import peak_flops
from gptjax.model import resolve
from gptjax.plan.compiled import Compiled, compile_step
from gptjax.plan.memory import Memory, memory
from gptjax.plan.network import arrange, mesh_axes
from gptjax.plan.roofline import Time, model_flops, step_time
from gptjax.plan.topologies import Topology


@dataclass(frozen=True)
class Plan:
    """An estimate of a run."""

    config: Config  # with nothing left to choose
    reason: str  # for the attention that it has
    topology: Topology
    axes: Mapping[str, int]
    memory: Memory  # by formula
    compiled: Compiled | None  # None: the step was not compiled
    time: Time
    peak_flops: float  # of a device, FLOP/s
    price: float | None  # of a chip for an hour

    @property
    def needed(self) -> int:
        """Bytes of a device, by the compiler if it was asked."""
        return self.compiled.peak if self.compiled else self.memory.total

    @property
    def margin(self) -> float:
        """Bytes that are left of a device's memory; less than 0: it does not fit."""
        return self.topology.chip.memory - self.needed

    @property
    def step_tokens(self) -> int:
        return self.config.batch_size * self.config.model.context_size

    @property
    def num_chips(self) -> int:
        return self.topology.num_devices // self.topology.chip.devices

    def mfu(self, seconds: float) -> float:
        """The share of the peak at which a step of so many seconds does what MFU counts."""
        return model_flops(self.config) / seconds / self.topology.num_devices / self.peak_flops

    def days(self, seconds: float) -> float:
        return self.config.steps * seconds / 86_400

    def energy(self, seconds: float) -> float | None:
        """Kilowatt-hours of all steps of so many seconds."""
        watts = self.topology.chip.watts
        return watts and watts * self.num_chips * self.config.steps * seconds / 3.6e6

    def money(self, seconds: float) -> float | None:
        price = self.price
        return price and price * self.num_chips * self.config.steps * seconds / 3600


def plan(
    config: Config, topology: Topology, *, compiling: bool = True, price: float | None = None
) -> Plan:
    """Plan a run.

    Args:
      config: of the run; `mesh.data` may be None. It has a vocabulary.
      topology: the hardware, as `parse_topology` gives it.
      compiling: whether the step is compiled; else all figures are by formula.
      price: of a chip for an hour.
    Raises:
      ConfigError: if the config cannot run there, or the compiler is not installed.
    """
    if topology.slices > 1 and config.mesh.slices is None:
        config = replace(config, mesh=replace(config.mesh, slices=topology.slices))
    check(config, topology.num_devices)
    model, reason = resolve(config.model, topology.chip.platform)
    config = replace(config, model=model)
    axes = mesh_axes(config.mesh, topology.num_devices)
    compiled = compile_step(config, topology) if compiling else None
    peak = find_peak(topology, config)
    grid = arrange(topology, config.mesh)
    return Plan(
        config=config,
        reason=reason,
        topology=topology,
        axes=axes,
        memory=memory(config, axes),
        compiled=compiled,
        time=step_time(config, axes, grid, topology, peak, compiled),
        peak_flops=peak,
        price=price,
    )


def find_peak(topology: Topology, config: Config) -> float:
    """FLOP/s of a device; of a CPU as measured now, shared by its virtual devices."""
    if topology.chip.peak is not None:
        return topology.chip.peak
    import jax

    return peak_flops(jax.devices("cpu")[0], config.model.compute_dtype)
