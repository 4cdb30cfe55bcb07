"""What the compiler of an absent machine says of a run's step."""

import re
import time
from collections.abc import Sequence
from typing import NamedTuple

from gptjax.compiled import configured
from gptjax.config import Config
from gptjax.plan.flops import count_flops
from gptjax.plan.hlo import Collective, Program
from gptjax.plan.topologies import Topology, compiler_options, find_devices
from gptjax.sharding import AXES, make_mesh
from gptjax.step import trace_train_step


class Compiled(NamedTuple):
    """A step as it was compiled, for one device."""

    peak: int  # bytes that are in use at once, at most
    arguments: int  # bytes of the state and the batch
    padding: int  # bytes more that they take, as TPUs lay them out in tiles
    flops: int | None  # of all devices, counted in what JAX traced
    moved: int | None  # bytes read from memory and written to it; None: it did not fit
    collectives: Sequence[Collective]
    seconds: float  # that it took to trace and to compile


def compile_step(config: Config, topology: Topology) -> Compiled:
    """Compile the step that training runs, for devices that need not be there.

    Raises:
      ConfigError: if the compiler is not installed.
    """
    began = time.monotonic()
    mesh = make_mesh(config.mesh, find_devices(topology))
    traced = trace_train_step(config, mesh)
    flops = sum(count_flops(traced.jaxpr.jaxpr).values())
    lowered = traced.lower()
    try:
        # A program that was kept names the lines of the source it was compiled from.
        with configured({"jax_compilation_cache_include_metadata_in_key": True}):
            compiled = lowered.compile(compiler_options=compiler_options(topology))
    except Exception as error:  # of the compiler's own kind
        used = _used(str(error))
        if used is None:
            raise
        return Compiled(used, 0, 0, flops, None, (), time.monotonic() - began)
    stats = compiled.memory_analysis()
    program = Program(compiled.as_text())
    arguments = program.argument_bytes()
    aside = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    aside += stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Compiled(
        # The compiler of CPUs leaves out of the peak what it sets aside for the whole step.
        peak=aside if topology.chip.platform == "cpu" else stats.peak_memory_in_bytes,
        arguments=arguments,
        padding=stats.argument_size_in_bytes - arguments,
        flops=flops,
        moved=program.bytes_moved(),
        collectives=program.collectives({axis: mesh.shape[axis] for axis in AXES}),
        seconds=time.monotonic() - began,
    )


def _used(message: str) -> int | None:
    """Bytes that a program needs, at least, that its device does not have, by the TPU compiler's
    words, of which it has two sets.
    """
    match = re.search(r"(?:Used |\()([\d.]+)([KMGT]?)\w*(?: of|\) exceeds)", message)
    if "RESOURCE_EXHAUSTED" not in message or not match:
        return None
    return round(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))
