"""Laws of checkpoint.py: what is restored is what was saved, or an error says why not."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, DataConfig
from gptjax.events import Events
from gptjax.faults import arm
from gptjax.integrity import MANIFEST, NotFiniteError, read_manifest, seal
from gptjax.rundir import CheckpointError, read_run, save_run
from gptjax.tokenizer import make_tokenizer

LAYOUT = {"tokens": ("tensor", "fsdp"), "up": (None, "fsdp", "tensor"), "scale": ("fsdp",)}
SHAPES = {"tokens": (16, 8), "up": (3, 8, 32), "scale": (8,)}


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    skipped: Any


@pytest.fixture(autouse=True)
def no_faults():
    yield
    arm("")


def mesh_of(**axes: int) -> jax.sharding.Mesh:
    num_devices = int(np.prod(list(axes.values())))
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
        devices=jax.devices()[:num_devices],
    )


def make_state(seed: int = 0) -> State:
    """A small state with the optimizer of a real one; the seed decides its numbers."""
    rng = np.random.default_rng(seed)
    head = {name: jnp.zeros(SHAPES[name]) for name in ("tokens", "scale")}
    params = {"blocks": {"up": jnp.zeros(SHAPES["up"])}, "head": head}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1, mask=jax.tree.map(lambda leaf: leaf.ndim > 1, params)),
    )
    zero = jnp.int32(0)
    shapes = jax.eval_shape(lambda: State(zero, params, optimizer.init(params), zero))
    return jax.tree.map(
        lambda leaf: jnp.asarray(100 * rng.normal(size=leaf.shape), leaf.dtype), shapes
    )


def like_on(mesh: jax.sharding.Mesh, state: State) -> State:
    """What `make_state` is like on a mesh, which need not have all axes of the layout."""

    def place(path: tuple, leaf: jax.Array) -> jax.ShapeDtypeStruct:
        axes = LAYOUT.get(getattr(path[-1], "key", None), ())
        spec = PartitionSpec(*(axis if axis in mesh.axis_names else None for axis in axes))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map_with_path(place, state)


def on(mesh: jax.sharding.Mesh, state: State) -> State:
    def place(leaf: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, like.sharding, whole.__getitem__)

    return jax.tree.map(place, state, like_on(mesh, state))


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(run_dir: Path, *steps: int, **options: int) -> Checkpoints:
    with Checkpoints(run_dir, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), wait=True)
    return Checkpoints(run_dir)


def names(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


def run_python(code: str, run_dir: Path, devices: int = 1, **popen: Any) -> subprocess.Popen:
    """Code in a process of its own that begins with the names of this file."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "RUN": str(run_dir),
    }
    code = f"import os; run_dir = __import__('pathlib').Path(os.environ['RUN'])\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE, **popen
    )


# --- what is restored is what was saved ----------------------------------------------------------


@pytest.mark.parametrize(
    "axes",
    [{"fsdp": 1}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}],
)
def test_a_state_is_restored_bit_for_bit_on_any_mesh(tmp_path, axes):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, on(mesh_of(fsdp=4, tensor=2), make_state(7)))
    like = like_on(mesh_of(**axes), make_state())
    restored = Checkpoints(tmp_path).restore(like)
    assert_same(restored, make_state(7))
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(
        lambda leaf: leaf.sharding, like
    )
    params = Checkpoints(tmp_path).restore_params(like.params, 7)
    assert_same(params, make_state(7).params)


def test_a_restored_state_can_be_computed_with(tmp_path):
    """Scalars that were made on one device must not stay there."""
    mesh = mesh_of(fsdp=4, tensor=2)
    restored = saved(tmp_path, 1).restore(like_on(mesh, make_state()))
    sums = jax.jit(lambda tree: sum(leaf.sum() for leaf in jax.tree.leaves(tree)))(restored)
    assert np.isfinite(sums)


def test_what_is_saved_is_read_with_one_device(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, on(mesh_of(fsdp=4, tensor=2), make_state(7)))
    code = """
from test_checkpoint import *
stored = Checkpoints(run_dir).stored()
like = like_on(mesh_of(fsdp=1), make_state())
assert jax.device_count() == 1
assert_same(Checkpoints(run_dir).restore(like), make_state(7))
print(stored.step, stored.mesh, stored.params["head"]["tokens"])
print(len(jax.tree.leaves(stored.opt_state)))
"""
    output = run_python(code, tmp_path).communicate()[0].splitlines()
    assert output == [
        "7 {'fsdp': 4, 'tensor': 2} ShapeDtypeStruct(shape=(16, 8), dtype=float32)",
        "7",
    ]


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    overwrite(jnp.ones(2**22)).block_until_ready()  # compiled before, to be quick below
    ones = jnp.ones(2**22).block_until_ready()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state()._replace(params={"up": ones}))
        for _ in range(4):
            ones = overwrite(ones)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"up": jax.ShapeDtypeStruct((2**22,), jnp.float32, sharding=sharding)}
    assert (checkpoints.restore_params(like)["up"] == 1).all()


def test_a_step_that_is_there_is_replaced(tmp_path):
    saved(tmp_path, 5, 10)
    with Checkpoints(tmp_path) as checkpoints:
        for seed in (1, 2):
            checkpoints.save(5, make_state(seed), wait=True)
    assert checkpoints.steps() == [5, 10]
    assert_same(checkpoints.restore(like_on(mesh_of(fsdp=1), make_state()), 5), make_state(2))


# --- which steps there are -----------------------------------------------------------------------


def test_the_newest_steps_and_the_multiples_are_kept(tmp_path):
    assert saved(tmp_path, 5, 10, 15, 20, 25, 30, keep_last=2, keep_every=10).steps() == [
        10,
        20,
        25,
        30,
    ]
    assert names(tmp_path) == {"10", "20", "25", "30"}
    assert saved(tmp_path, 35, keep_last=1).steps() == [35]


def test_a_saved_step_stays_even_if_later_ones_are_there(tmp_path):
    saved(tmp_path, 10, 20)
    assert saved(tmp_path, 5).steps() == [5, 10, 20]


def test_what_is_not_a_whole_step_is_not_one(tmp_path):
    saved(tmp_path, 5)
    folder = tmp_path / "checkpoints"
    for name in ("99", "-1", "1e3", "notes"):
        (folder / name).mkdir()
    for name in (
        "007",
        "05",
        "\u0665",
        "\u00b2",
        "5.saving",
        "6.saving.orbax-checkpoint-tmp",
        "8.deleting",
    ):
        shutil.copytree(folder / "5", folder / name)
    shutil.copytree(folder / "5", folder / "6")
    shutil.rmtree(folder / "6" / "opt_state")
    (folder / "7").write_text("a file")
    before = names(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [5]
    assert checkpoints.latest() == 5
    assert checkpoints.stored().step == 5
    assert names(tmp_path) == before, "reading must change nothing"
    assert saved(tmp_path, 10, 15, 99, keep_last=2).steps() == [15, 99]
    assert names(tmp_path) == before - {
        "5",
        "5.saving",
        "6.saving.orbax-checkpoint-tmp",
        "8.deleting",
    } | {"15"}


def test_reading_makes_no_folder(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.steps() == []
    assert checkpoints.latest() is None
    assert not (tmp_path / "run").exists()


def test_a_kill_during_a_save_leaves_the_step_before(tmp_path):
    code = """
from test_checkpoint import *
with Checkpoints(run_dir) as checkpoints:
    checkpoints.save(1, make_state(1))
    checkpoints.wait()
    checkpoints.save(2, make_state(2)._replace(params={"up": jnp.ones(2**25)}))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run_python(code, tmp_path).wait() == -signal.SIGKILL
    assert len(names(tmp_path)) == 2, "the kill came too late to test anything"
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 1
    assert_same(checkpoints.restore(like_on(mesh_of(fsdp=8), make_state())), make_state(1))
    with checkpoints:
        assert names(tmp_path) == {"1"}
        checkpoints.save(2, make_state(2))
    assert checkpoints.steps() == [1, 2]


def test_a_kill_during_a_replacement_leaves_the_old_step(tmp_path):
    saved(tmp_path, 5)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "5", folder / "5.saving")
    (folder / "5").rename(folder / "5.replaced")
    with Checkpoints(tmp_path) as checkpoints:
        assert names(tmp_path) == {"5"}
        assert checkpoints.steps() == [5]


# --- what fails says so --------------------------------------------------------------------------


def test_a_state_that_does_not_fit_is_refused_with_every_difference(tmp_path):
    checkpoints = saved(tmp_path, 5)
    like = like_on(mesh_of(fsdp=2), make_state())
    sharding = like.step.sharding
    head = {
        "tokens": jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=sharding),
        "scale": jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=sharding),
        "bias": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding),
    }
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(like._replace(params={"head": head}, opt_state=like.opt_state[1:]))
    lines = str(error.value).splitlines()
    assert lines[0].endswith(f"{len(lines) - 2}")
    assert {
        "  - params/blocks/up: stored float32[3, 8, 32], wanted nothing",
        "  - params/head/bias: stored nothing, wanted float32[8]",
        "  - params/head/scale: stored float32[8], wanted bfloat16[8]",
        "  - params/head/tokens: stored float32[16, 8], wanted float32[32, 8]",
        "  - opt_state/1/count: stored int32[], wanted nothing",
        "  - opt_state/0/count: stored nothing, wanted int32[]",
    } < set(lines)
    with pytest.raises(CheckpointError, match="differences: 4\n"):
        checkpoints.restore_params({"head": head})


def test_a_step_that_is_not_there_or_damaged_is_an_error(tmp_path):
    like = like_on(mesh_of(fsdp=1), make_state())
    with pytest.raises(CheckpointError, match="has no checkpoint: "):
        Checkpoints(tmp_path).restore(like)
    checkpoints = saved(tmp_path, 5, 10)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7: give one of 5, 10"):
        checkpoints.stored(7)
    folder = tmp_path / "checkpoints"
    (folder / "10/params/manifest.ocdbt").write_bytes(b"?")
    assert checkpoints.latest() == 5
    with pytest.raises(CheckpointError, match=r"10 is damaged.*\n.*manifest.ocdbt: 1 bytes, not"):
        checkpoints.restore(like, 10)
    for path in (folder / "5/params/ocdbt.process_0/d").iterdir():
        flip(path, 100)
    with pytest.raises(CheckpointError, match="its bytes are not those that were written"):
        checkpoints.restore(like, 5)
    with pytest.raises(CheckpointError, match="no checkpoint that is whole"):
        checkpoints.restore(like)
    with checkpoints, pytest.raises(CheckpointError, match="no checkpoint that is whole"):
        checkpoints.latest_valid()
    assert names(tmp_path) == {"5", "10"}, "the next command must not begin from scratch"


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_the_newest_whole_step_is_taken_and_damaged_ones_are_set_aside(tmp_path, caplog):
    saved(tmp_path, 5, 10, 15, keep_last=3)
    folder = tmp_path / "checkpoints"
    flip(folder / "10/_CHECKPOINT_METADATA", 3)
    shutil.rmtree(folder / "15/opt_state")
    (folder / "007").mkdir()
    (folder / "20").symlink_to(folder / "5")
    (folder / "99").mkdir()
    shutil.copytree(folder / "5", folder / "30")  # not what it says it is
    before = names(tmp_path)
    like = like_on(mesh_of(fsdp=2), make_state())
    assert_same(Checkpoints(tmp_path).restore(like), make_state(5))
    assert names(tmp_path) == before, "reading must change nothing"
    caplog.clear()
    events = Events(tmp_path)
    with Checkpoints(tmp_path, events=events) as checkpoints:
        assert checkpoints.latest_valid() == 5
        assert_same(checkpoints.restore(like, 5), make_state(5))
        assert checkpoints.latest_valid() == 5, "what is set aside is told once"
    assert names(tmp_path) == before - {"10", "15", "30"} | {"quarantine"}
    assert {path.name for path in (folder / "quarantine").iterdir()} == {"10", "15", "30"}
    text = caplog.text
    assert text.count("007, 20, 99") == text.count("step 15 is damaged, moved to") == 1
    assert "opt_state/_METADATA: missing" in text
    assert "_CHECKPOINT_METADATA: its bytes are not those" in text
    assert "it is that of step 5" in text
    assert "step 5 is taken instead" in text
    assert (tmp_path / "events.jsonl").read_text().count('"event": "refused"') == 3


def test_values_that_are_not_those_that_were_saved_are_named(tmp_path):
    """The files agree with the manifest here, as where a device or its driver went wrong."""
    saved(tmp_path, 5, 10)
    folder = tmp_path / "checkpoints/10"
    manifest = read_manifest(folder)
    path = "params/head/scale"
    leaves = manifest.leaves | {path: manifest.leaves[path]._replace(fingerprint="0" * 16)}
    (folder / MANIFEST).unlink()
    seal(folder, 10, manifest.mesh, leaves)
    like = like_on(mesh_of(fsdp=2), make_state())
    assert Checkpoints(tmp_path).verify(10) == [f"{path}: its values are not those that were saved"]
    with pytest.raises(CheckpointError, match=f"{path}: its values"):
        Checkpoints(tmp_path).restore(like, 10)
    assert_same(Checkpoints(tmp_path).restore(like), make_state(5))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=f"{path}: its values"):
            checkpoints.restore(like, checkpoints.latest_valid())
        assert checkpoints.latest_valid() == 5


def test_later_steps_are_abandoned(tmp_path):
    saved(tmp_path, 5, 10, 15, keep_last=3)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.abandon_after(5) == [10, 15]
        checkpoints.save(10, make_state(1), wait=True)
        assert checkpoints.abandon_after(5) == [10]
    assert names(tmp_path) == {"5", "abandoned"}
    assert {path.name for path in (tmp_path / "checkpoints/abandoned").iterdir()} == {
        "10",
        "10-2",
        "15",
    }


def test_prune_removes_leftovers_and_old_steps_but_never_the_newest_that_is_whole(tmp_path):
    saved(tmp_path, 5, 10, 15, keep_last=3)
    folder = tmp_path / "checkpoints"
    flip(folder / "15/_CHECKPOINT_METADATA", 3)
    for name in ("quarantine/3", "abandoned/7", "20.saving", "8.deleting"):
        shutil.copytree(folder / "5", folder / name)
    (folder / "quarantine" / "a file").write_text("x" * 6000)
    checkpoints, before = Checkpoints(tmp_path), names(tmp_path)
    told = checkpoints.prune(keep_last=1, dry_run=True)
    assert names(tmp_path) == before
    assert checkpoints.prune(keep_last=1) == told
    assert {str(path.relative_to(folder)) for path, _ in told} == {
        "quarantine/3", "quarantine/a file", "abandoned/7", "20.saving", "8.deleting", "5",
    }  # fmt: skip
    assert all(size > 5000 for _, size in told)
    assert checkpoints.candidates() == [10, 15]
    assert checkpoints.prune() == []


@contextlib.contextmanager
def small_files():
    """Within it, writes of more than a few bytes fail in all threads."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        yield
    finally:  # also when the test fails: pytest writes then
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("learn", ["poll", "wait", "save", "exit"])
def test_a_save_that_fails_later_is_reported_once_and_the_next_one_works(tmp_path, learn, caplog):
    checkpoints, failure = Checkpoints(tmp_path), r"saving step 5 in .*: File too large"
    state, next_state = make_state(5), make_state(6)  # JAX writes files too: what it compiled
    with small_files(), pytest.raises(OSError, match=failure), checkpoints:
        checkpoints.save(5, state)
        if learn == "poll":
            while True:
                checkpoints.poll()
                time.sleep(0.01)
        if learn != "exit":
            checkpoints.wait() if learn == "wait" else checkpoints.save(6, next_state)
    assert names(tmp_path) == set()
    with checkpoints:
        checkpoints.poll()
        checkpoints.save(6, next_state)
    assert checkpoints.steps() == [6]
    assert caplog.records == [], "Orbax logs hundreds of lines"


def test_a_save_that_cannot_begin_is_an_error_and_so_is_a_bad_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), Checkpoints(tmp_path / "file"):
        pass
    with Checkpoints(tmp_path / "run") as checkpoints:
        (tmp_path / "run/checkpoints").rmdir()
        (tmp_path / "run/checkpoints").write_text("")
        with pytest.raises(OSError, match="saving step 5 in"):
            checkpoints.save(5, make_state())
        (tmp_path / "run/checkpoints").unlink()
        (tmp_path / "run/checkpoints").mkdir()
        checkpoints.save(5, make_state())
    assert checkpoints.steps() == [5]


def test_a_save_that_fails_is_tried_again_with_the_state_of_that_time(tmp_path, caplog):
    with Checkpoints(tmp_path, retries=2, backoff=0.05, events=Events(tmp_path)) as checkpoints:
        checkpoints.save(1, make_state(1), wait=True)
        arm("written:enospc@1,sealed:eio@1")
        tried, step = [2], 2
        checkpoints.save(2, make_state(2))
        while checkpoints.latest() == 1:
            step += 1
            assert step < 2000, "the failure is not learnt of"
            if checkpoints.due_again(step):
                tried.append(step)
                checkpoints.save(step, make_state(step))
            time.sleep(0.005)
        assert names(tmp_path) == {"1", str(tried[-1])}
    assert len(tried) == 3
    assert_same(checkpoints.restore(like_on(mesh_of(fsdp=1), make_state())), make_state(tried[-1]))
    assert "No space left" in caplog.text
    assert "retry 1 of 2" in caplog.text
    events = (tmp_path / "events.jsonl").read_text()
    assert events.count('"save_failed"') == 2
    assert f'"errno": {errno.EIO}' in events


def test_a_save_that_fails_too_often_is_an_error_and_the_step_before_stays(tmp_path):
    with Checkpoints(tmp_path, retries=2, backoff=0.01) as checkpoints:
        checkpoints.save(1, make_state(1), wait=True)
        arm("written:enospc@1-9")
        with pytest.raises(OSError, match=r"saving step 2 .* are needed and .* are free") as error:
            checkpoints.save(2, make_state(2), wait=True)
        assert error.value.errno == errno.ENOSPC
        assert names(tmp_path) == {"1"}
        arm("")
        checkpoints.save(3, make_state(3), wait=True)
        assert checkpoints.steps() == [1, 3]


def test_the_run_does_not_end_while_its_last_save_has_failed(tmp_path):
    arm("written:eio")
    with pytest.raises(OSError, match="saving step 2"), Checkpoints(tmp_path, retries=9) as one:
        one.save(2, make_state(2))


def test_a_slow_save_is_not_waited_for_and_the_next_one_is_skipped(tmp_path):
    with Checkpoints(tmp_path, events=Events(tmp_path)) as checkpoints:
        checkpoints.prepare(make_state())
        arm("written:sleep=0.5")
        checkpoints.save(1, make_state(1))
        for step in range(2, 5):
            checkpoints.save(step, make_state(step))
            checkpoints.poll()
        assert checkpoints.steps() == [], "the first is under way"
        checkpoints.save(5, make_state(5), wait=True)
        assert checkpoints.steps() == [1, 5]
    assert (tmp_path / "events.jsonl").read_text().count('"save_skipped"') == 3


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    state = make_state(2)
    bad = state._replace(params=jax.tree.map(lambda leaf: leaf / 0, state.params))
    with Checkpoints(tmp_path, retries=3) as checkpoints:
        checkpoints.save(1, make_state(1), wait=True)
        with pytest.raises(NotFiniteError, match=r"params/head/scale \(8 of 8\)"):
            checkpoints.save(2, bad, wait=True)
        assert names(tmp_path) == {"1"}
        checkpoints.save(2, state, wait=True)
    assert checkpoints.steps() == [1, 2]


def test_an_old_step_that_cannot_be_removed_is_no_failure_of_the_save(tmp_path, caplog):
    arm("deleting:eio")
    assert saved(tmp_path, 1, 2, keep_last=1).steps() == [2]
    assert "cannot be removed" in caplog.text
    assert names(tmp_path) == {"1.deleting", "2"}
    assert saved(tmp_path, 3, keep_last=1).steps() == [3]
    assert names(tmp_path) == {"3"}


def test_a_full_disk_is_told_before_it_is_written_to(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), wait=True)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(OSError, match="1,000 are free") as error:
            checkpoints.save(2, make_state(2))
        assert error.value.errno == errno.ENOSPC
        monkeypatch.undo()
        checkpoints.save(3, make_state(3), wait=True)
    assert checkpoints.steps() == [1, 3]


def test_an_error_in_the_run_is_not_replaced_by_that_of_a_save(tmp_path):
    state, checkpoints = make_state(), Checkpoints(tmp_path)
    with small_files(), pytest.raises(ZeroDivisionError) as error, checkpoints:
        checkpoints.save(5, state)
        raise ZeroDivisionError
    assert "saving step 5" in error.value.__notes__[0]


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_save_together_and_both_learn_of_a_failure(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = """
import sys, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{PORT}", 2, INDEX)
from test_checkpoint import *
mesh = mesh_of(fsdp=2, tensor=2)
with Checkpoints(run_dir, keep_last=2) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, on(mesh, make_state(step)), wait=True)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
    like = like_on(mesh_of(data=2, fsdp=2), make_state())
    params = checkpoints.restore(like).params["head"]["tokens"]
    whole = np.asarray(make_state(3).params["head"]["tokens"])
    for shard in params.addressable_shards:
        assert np.array_equal(shard.data, whole[shard.index])
    if INDEX == 0:  # and there alone steps are sealed
        arm("written:eio")
    checkpoints.save(3, on(mesh, make_state(4)))
    try:
        checkpoints.wait()
    except OSError as error:
        print("failed:", error)
    checkpoints.wait()
print("done", checkpoints.steps())
"""
    processes = [
        run_python(
            code.replace("PORT", str(port)).replace("INDEX", str(index)), tmp_path, devices=2
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    assert all("failed:" in output and "done [2, 3]" in output for output in outputs), outputs
    whole = Checkpoints(tmp_path).restore(like_on(mesh_of(fsdp=8), make_state()))
    assert_same(whole.opt_state, make_state(3).opt_state)


# --- the run directory ---------------------------------------------------------------------------


def test_a_run_is_read_as_it_was_saved(tmp_path):
    tokenizer = make_tokenizer(DataConfig())
    for config in (Config(name="a"), Config(name="b", data=DataConfig(path=("text",)))):
        save_run(tmp_path / "run", config, tokenizer)
        read, read_tokenizer = read_run(tmp_path / "run")
        assert read == config
        assert read_tokenizer.fingerprint == tokenizer.fingerprint
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "tokenizer"}


def test_a_folder_that_is_no_run_is_an_error_that_helps(tmp_path):
    save_run(tmp_path / "tiny", Config(), make_tokenizer(DataConfig()))
    with pytest.raises(
        CheckpointError, match=r"tinny: there is no such folder. Did you mean 'tiny'\?"
    ):
        read_run(tmp_path / "tinny")
    with pytest.raises(CheckpointError, match=r"no config\.json: give one of .*tiny"):
        read_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"no config\.json: give the folder"):
        read_run(tmp_path / "tiny/tokenizer")
    shutil.rmtree(tmp_path / "tiny/tokenizer")
    with pytest.raises(CheckpointError, match=r"tokenizer.*: there is no such file"):
        read_run(tmp_path / "tiny")
    (tmp_path / "tiny/config.json").write_text('{"stepz": 1}')
    with pytest.raises(CheckpointError, match=r"no such field. Did you mean 'steps'\?"):
        read_run(tmp_path / "tiny")
