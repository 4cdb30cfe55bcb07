"""Devices as they are wired: which lie along which axis, and which rows a process holds."""

import itertools
from collections import Counter
from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec
from launch import finish, start_program
from small import MODERN, PLAIN

from gptjax.config import Config, ConfigError, DataConfig, MeshConfig
from gptjax.plan.hlo import Program
from gptjax.plan.network import mesh_axes
from gptjax.sharding import AXES, local_rows, make_mesh
from gptjax.step import trace_train_step


@dataclass(frozen=True)
class Chip:
    """What a mesh asks of a TPU."""

    id: int
    process_index: int
    coords: tuple[int, int, int]
    slice_index: int
    device_kind: str
    core_on_chip: int = 0
    platform: str = "tpu"


def chips(kind, shape, host, slices):
    """Slices of chips in a torus, of which each host has a block."""
    places = [
        (slice_index, tuple(c // h for c, h in zip(coords, host, strict=True)), coords)
        for slice_index in range(slices)
        for coords in itertools.product(*map(range, shape))
    ]
    hosts = sorted({place[:2] for place in places})
    return [
        Chip(i, hosts.index(place[:2]), place[2], place[0], kind)
        for i, place in enumerate(sorted(places))
    ]


TORI = {
    "v5p": ("TPU v5", (2, 2, 4), (2, 2, 1)),
    "v5e": ("TPU v5 lite", (4, 4, 1), (2, 2, 1)),
}


@pytest.mark.parametrize("torus", TORI)
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=16, tensor=2),
        MeshConfig(data=2, fsdp=16),
        MeshConfig(data=4, fsdp=2, tensor=4, across="data"),
        MeshConfig(data=2, fsdp=8, pipe=2, across="pipe"),
        MeshConfig(data=1, fsdp=4, pipe=8, across="pipe"),
        MeshConfig(data=2, fsdp=16, across="fsdp"),
    ],
    ids=lambda mesh: f"{mesh.data}x{mesh.fsdp}x{mesh.tensor}x{mesh.pipe} {mesh.across}",
)
def test_only_one_axis_leaves_a_slice(torus, mesh):
    devices = chips(*TORI[torus], slices=2)
    across = AXES.index(mesh.across)
    inner = [getattr(mesh, axis) for axis in AXES]
    inner[across] //= 2
    outer = [2 if axis == mesh.across else 1 for axis in AXES]
    grid = make_mesh(mesh, devices[::-1]).devices
    like = mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, allow_split_physical_axes=True
    )
    np.testing.assert_array_equal(grid, like)
    for part, devices_of_slice in enumerate(np.split(grid, 2, axis=across)):
        assert {chip.slice_index for chip in devices_of_slice.flat} == {part}


def test_groups_may_be_processes():
    """As with hosts of GPUs, where the hardware says nothing."""
    devices = [replace(chip, platform="gpu", slice_index=0) for chip in chips(*TORI["v5p"], 1)]
    grid = make_mesh(MeshConfig(data=8, fsdp=2, slices=4), devices).devices
    like = mesh_utils.create_hybrid_device_mesh(
        (2, 2, 1, 1, 1), (4, 1, 1, 1, 1), devices, process_is_granule=True
    )
    np.testing.assert_array_equal(grid, like)


def test_an_axis_that_does_not_cross_the_slices_is_refused():
    with pytest.raises(ConfigError, match=r"mesh.data = 1 does not divide by 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=32), chips(*TORI["v5p"], slices=2))


@pytest.mark.parametrize("torus", TORI)
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=16), MeshConfig(tensor=4)])
def test_hosts_hold_all_rows_and_each_as_many(torus, mesh, monkeypatch):
    mesh = make_mesh(mesh, chips(*TORI[torus], slices=2))
    held = Counter()
    for process in range(8):
        monkeypatch.setattr(
            jax.NamedSharding,
            "addressable_devices_indices_map",
            lambda self, shape, process=process: {
                chip: rows
                for chip, rows in self.devices_indices_map(shape).items()
                if chip.process_index == process
            },
        )
        rows = local_rows(mesh, 64)
        assert (np.diff(rows) > 0).all()
        held.update(rows.tolist())
    copies = held.total() // 64  # where the axis `tensor` leaves a host
    assert held == Counter({row: copies for row in range(64)})


# Two processes of two devices, which are wired in turns: rows 0, 1, 4, 5 and 2, 3, 6, 7.
IN_TURNS = """
import sys
import jax
import numpy as np
from gptjax import MeshConfig, make_mesh
from gptjax.sharding import local_rows, to_devices
from gptjax.watchdog import join_processes

me = int(sys.argv[2])
join_processes(sys.argv[1], 2, me)
one, two, three, four = jax.devices()
mesh = make_mesh(MeshConfig(), [one, three, two, four])
mine = local_rows(mesh, 8)
assert mine.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]][me], mine
x = to_devices(mesh, np.arange(24).reshape(8, 3)[mine], 8)
whole = jax.jit(lambda x: x + 0, out_shardings=jax.NamedSharding(mesh, jax.P()))(x)
np.testing.assert_array_equal(whole.addressable_data(0), np.arange(24).reshape(8, 3))
"""


def test_rows_of_processes_that_are_wired_in_turns(tmp_path):
    for process in start_program(tmp_path, IN_TURNS, 2, devices=2):
        finish(process)


# --- what moves ----------------------------------------------------------------------------------


@pytest.fixture
def compiling():
    """Programs are compiled, not found where one like them was kept: only then XLA says how."""
    before = jax.config.jax_enable_compilation_cache
    # JAX looks at the setting once, until the cache is reset.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def test_xla_says_what_is_whole_only_to_be_split_again(compiling, capfd):
    """What the next test looks for is there to be found."""

    def move(x):
        x = jax.lax.with_sharding_constraint(2 * x, PartitionSpec(("data", "fsdp")))
        return 2 * jax.lax.with_sharding_constraint(x, PartitionSpec(None, None, "fsdp"))

    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=4))):
        jax.jit(move).lower(jax.ShapeDtypeStruct((8, 8, 8), np.float32)).compile()
    assert "rematerialization" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("mesh", "model"),
    [
        (MeshConfig(data=2, fsdp=4), PLAIN),
        (MeshConfig(data=2, fsdp=2, tensor=2), PLAIN),
        (MeshConfig(fsdp=4, tensor=2), replace(MODERN, split_residual=True)),
        (MeshConfig(fsdp=2, tensor=2, context=2), MODERN),
        (MeshConfig(data=2, fsdp=2, pipe=2, microbatches=2), PLAIN),
    ],
    ids=["data-fsdp", "tensor", "split", "context", "pipe"],
)
def test_nothing_is_whole_on_each_device_only_to_be_split_again(mesh, model, compiling, capfd):
    """XLA says so where it finds no other way from one layout to the next."""
    config = Config(data=DataConfig(path=("any text",)), model=model, batch_size=8, mesh=mesh)
    trace_train_step(config, make_mesh(mesh)).lower().compile()
    assert "rematerialization" not in capfd.readouterr().err


def test_tables_of_tokens_are_added_up_in_slices():
    """Over the fsdp axis there is no sum of the whole gradient of the embedding or unembedding."""
    mesh = MeshConfig(data=2, fsdp=4)
    config = Config(data=DataConfig(path=("any text",)), model=PLAIN, batch_size=8, mesh=mesh)
    compiled = trace_train_step(config, make_mesh(mesh)).lower().compile()
    sent = Program(compiled.as_text()).collectives(mesh_axes(mesh, 8))
    sums = [one for one in sent if one.kind == "all-reduce"]
    table = 4 * PLAIN.sizes["V"] * PLAIN.width  # bytes
    assert any(one.axis == "data" and one.num_bytes >= table / 4 for one in sums)
    outside = [one for one in sums if "fsdp" in one.axis and "TransformerBlock" not in one.op]
    assert all(one.num_bytes < table for one in outside)
