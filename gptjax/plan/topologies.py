"""Hardware that need not be here: chips by their data sheets, and how they are joined."""

import difflib
import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from gptjax.config import ConfigError
from gptjax.metrics import PEAK_FLOPS

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What one device is and how it is joined to others; bytes, bytes/s, FLOP/s and watts."""

    name: str
    platform: str  # "tpu", "gpu" or "cpu"
    peak: float | None  # bfloat16 FLOP/s, dense; None: to be measured
    memory: float  # that a program can have
    bandwidth: float | None  # of the memory
    link: float  # one way, of a TPU's link to a neighbour, or of all NVLinks of a GPU together
    outside: float  # one way, of a device's share of the network between hosts, or between slices
    watts: float | None = None  # with its share of the host; None: not published
    dimensions: int = 1  # of a TPU's torus
    per_host: int = 8  # devices that share the fast network of a GPU host
    devices: int = 1  # that JAX sees of one chip


# TPUs: docs.cloud.google.com/tpu/docs, the page of each; links and the network of the data centre:
# Austin et al. 2025, "How to Scale Your Model", chapter 2. Memory is what libtpu leaves to a
# program, as its message says when a program has not enough. Watts of v4: Jouppi et al. 2023, "TPU
# v4", table 4, the mean.
# GPUs: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and B200 (HGX); the network and
# the watts are an eighth of those of a DGX A100, H100, H200 and B200, by its user guide. Memory is
# what the driver leaves to a program.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4", platform="tpu", peak=PEAK_FLOPS["TPU v4"], memory=30.75 * GIB,
            bandwidth=1.228e12, link=4.5e10, outside=6.25e9, watts=170, dimensions=3,
        ),
        Chip(
            name="v5e", platform="tpu", peak=PEAK_FLOPS["TPU v5e"], memory=15.75 * GIB,
            bandwidth=8.19e11, link=4.5e10, outside=3.125e9, dimensions=2,
        ),
        Chip(
            name="v5p", platform="tpu", peak=PEAK_FLOPS["TPU v5p"], memory=95.74 * GIB,
            bandwidth=2.765e12, link=9e10, outside=6.25e9, dimensions=3,
        ),
        Chip(
            name="v6e", platform="tpu", peak=PEAK_FLOPS["TPU v6e"], memory=31.25 * GIB,
            bandwidth=1.64e12, link=9e10, outside=1.25e10, dimensions=2,
        ),
        Chip(  # its two devices share links and network
            name="tpu7x", platform="tpu", peak=PEAK_FLOPS["TPU7x"], memory=94.75 * GIB,
            bandwidth=7.38e12 / 2, link=1e11 / 2, outside=1.25e10 / 2, dimensions=3, devices=2,
        ),
        Chip(
            name="a100", platform="gpu", peak=PEAK_FLOPS["NVIDIA A100"], memory=85_094_825_984,
            bandwidth=2.039e12, link=3e11, outside=2.5e10, watts=6500 / 8,
        ),
        Chip(
            name="h100", platform="gpu", peak=PEAK_FLOPS["NVIDIA H100"], memory=84_942_979_072,
            bandwidth=3.35e12, link=4.5e11, outside=5e10, watts=10_200 / 8,
        ),
        Chip(
            name="h200", platform="gpu", peak=PEAK_FLOPS["NVIDIA H200"], memory=150_039_945_216,
            bandwidth=4.8e12, link=4.5e11, outside=5e10, watts=10_200 / 8,
        ),
        Chip(
            name="b200", platform="gpu", peak=PEAK_FLOPS["NVIDIA B200"], memory=191_503_138_816,
            bandwidth=8e12, link=9e11, outside=5e10, watts=14_300 / 8,
        ),
        Chip(
            name="cpu", platform="cpu", peak=None, memory=math.inf, bandwidth=None, link=1e10,
            outside=1e9,
        ),
    )
}  # fmt: skip

# What XLA's compiler asks of a GPU (the message GpuTargetConfigProto). NVIDIA's tuning guides of
# Ampere, Hopper and Blackwell: shared memory, registers, threads; data sheets: the other numbers.
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {most_shared}
  cuda_compute_capability {{ major: {major} minor: 0 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{title}"
"""
AMPERE = {"major": 8, "shared": 167_936, "most_shared": 166_912, "units": 64, "clock": 1.41}
HOPPER = {"major": 9, "shared": 233_472, "most_shared": 232_448, "units": 128, "clock": 1.98}
BLACKWELL = {"major": 10, "shared": 233_472, "most_shared": 232_448, "units": 128, "clock": 1.965}
TARGETS = {
    "a100": AMPERE | {"title": "NVIDIA A100-SXM4-80GB", "cores": 108, "cache": 40 * 2**20},
    "h100": HOPPER | {"title": "NVIDIA H100 80GB HBM3", "cores": 132, "cache": 50 * 2**20},
    "h200": HOPPER | {"title": "NVIDIA H200", "cores": 132, "cache": 60 * 2**20},
    "b200": BLACKWELL | {"title": "NVIDIA B200", "cores": 148, "cache": 126 * 2**20},
}

# The slices that Cloud TPU documents, by their chips.
SHAPES = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {
        4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
        512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Topology:
    """Devices that a run is planned for."""

    chip: Chip
    shape: tuple[int, ...]  # of a slice of TPUs; hosts and their GPUs; CPUs
    slices: int

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape) * self.chip.devices * self.slices

    def __str__(self) -> str:
        return f"{self.slices} x {self.name}" if self.slices > 1 else self.name


def parse_topology(name: str, slices: int = 1) -> Topology:
    """The hardware that a name stands for.

    Args:
      name: of TPUs CHIP:AxB or CHIP:AxBxC, or CHIP:N for the slice of N chips that is offered; of
        GPUs CHIP:N, or CHIP:HOSTSxN with N for each host; cpu:N.
      slices: so many of them, joined by the slower network.
    Raises:
      ConfigError: with the nearest names.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name.lower())
    chip = CHIPS.get(match[1]) if match else None
    shape = tuple(map(int, match[2].split("x"))) if match else ()
    if chip and chip.platform == "tpu" and len(shape) == 1:
        known = SHAPES[chip.dimensions].get(shape[0], "0")
        shape = tuple(map(int, known.split("x")))
    if chip and chip.platform == "gpu" and len(shape) == 1:
        hosts, rest = divmod(shape[0], chip.per_host)
        shape = (hosts, chip.per_host) if hosts and not rest else (1, shape[0])
    lengths = {"tpu": chip.dimensions, "gpu": 2, "cpu": 1} if chip else {}
    usable = chip and len(shape) == lengths[chip.platform] and all(shape)
    if usable and chip.platform == "gpu" and shape[1] > chip.per_host:
        usable = False
    if not usable:
        raise ConfigError(f"topology {name!r}: there is none of this name. {_nearest(name)}")
    return Topology(chip, shape, slices)


def names() -> list[str]:
    """Names of topologies that are offered as they are."""
    found = []
    for chip in CHIPS.values():
        if chip.platform == "tpu":
            found += [f"{chip.name}:{shape}" for shape in SHAPES[chip.dimensions].values()]
        elif chip.platform == "gpu":
            found += [f"{chip.name}:{8 * 2**power}" for power in range(10)]
        else:
            found += [f"{chip.name}:{2**power}" for power in range(7)]
    return found


def _nearest(name: str) -> str:
    """What to give instead: of the chip that was meant, shapes of about as many."""
    chip, rest = re.match(r"([a-z]*-?\d*[a-z]*)(.*)", name.lower(), re.DOTALL).groups()
    sizes = re.findall(r"\d+", rest)
    chip = chip.replace("-", "")
    chips = [chip] if chip in CHIPS else difflib.get_close_matches(chip, CHIPS, n=3, cutoff=0.5)
    wanted = math.prod(map(int, sizes)) or 1

    def distance(one: str) -> tuple[bool, int, float]:
        found = parse_topology(one)
        another = len(sizes) > 1 and len(sizes) != found.chip.dimensions
        far = abs(math.log(math.prod(found.shape) / wanted))
        return another, chips.index(found.chip.name), far

    near = sorted((one for one in names() if one.partition(":")[0] in chips), key=distance)[:3]
    return (
        f"Nearest: {', '.join(near) or 'none'}; give CHIP:SHAPE with a chip of "
        f"{', '.join(CHIPS)}, such as v5p:8x8x8, v5e:16x16, h100:64x8 or cpu:8"
    )


# --- the compilers -------------------------------------------------------------------------------


def missing(topology: Topology) -> str:
    """What must be installed to compile for it, or nothing."""
    modules = {"tpu": ("libtpu", "tpu"), "gpu": ("jax_plugins.xla_cuda13", "plan-gpu")}
    if topology.chip.platform not in modules:
        return ""
    module, extra = modules[topology.chip.platform]
    top = module.partition(".")[0]
    if importlib.util.find_spec(top) and importlib.util.find_spec(module):
        return ""
    return (
        f"topology {topology}: the compiler of its hardware, {module}, is not installed -- "
        f"pip install 'gptjax[{extra}]', or give --no-compile"
    )


def find_devices(topology: Topology) -> Sequence[Any]:
    """Stand-ins for its devices, which can be compiled for; of a CPU the devices themselves.

    Raises:
      ConfigError: if its compiler is not installed, or refuses the shape.
    """
    chip = topology.chip
    if chip.platform == "cpu":
        devices = jax.devices("cpu")[: topology.num_devices]
        if len(devices) < topology.num_devices:
            raise ConfigError(
                f"topology {topology}: this process has {len(devices)} virtual CPU devices: give "
                f"cpu:{len(devices)}"
            )
        return devices
    if problem := missing(topology):
        raise ConfigError(problem)
    try:
        if chip.platform == "tpu":
            return _tpu_devices(topology)
        return _gpu_devices(topology)
    except ConfigError:
        raise
    except Exception as error:  # of the compiler's own kind
        words = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"topology {topology}: its compiler refuses it: {words}. {_nearest(topology.name)}"
        ) from error


def _tpu_devices(topology: Topology) -> Sequence[Any]:
    shape = "x".join(map(str, topology.shape))
    more = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if math.prod(topology.shape) < 4:  # less than the chips of a host
        bounds = (*topology.shape, 1, 1)[:3]
        more |= {"chips_per_host_bounds": bounds}
    return topologies.get_topology_desc(
        f"{topology.chip.name}:{shape}", platform="tpu", **more
    ).devices


def _gpu_devices(topology: Topology) -> Sequence[Any]:
    hosts, each = topology.shape
    chip = topology.chip
    target = TARGET.format(
        bandwidth=round(chip.bandwidth), memory=round(chip.memory), **TARGETS[chip.name]
    )
    return topologies.get_topology_desc(
        chip.name,
        platform="cuda",
        target_config=target,
        topology=f"{topology.slices}x{hosts}x{each}",
    ).devices


def compiler_options(topology: Topology) -> dict[str, Any] | None:
    """Without a GPU nothing can be timed, so the compiler takes its first choice of each kernel."""
    return {"xla_gpu_autotune_level": 0} if topology.chip.platform == "gpu" else None
