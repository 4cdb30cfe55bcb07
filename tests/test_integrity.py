"""Laws of integrity.py: no byte of a step and no bit of a value changes without notice."""

import hashlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from mutations import damaged_copy
from test_checkpoint import assert_same, like_on, make_state, mesh_of, on, saved

from gptjax import integrity
from gptjax.checkpoint import Checkpoints
from gptjax.integrity import MANIFEST, damage, describe, jit_fingerprint, read_manifest
from gptjax.rundir import CheckpointError


def fingerprints(tree):
    return np.asarray(jit_fingerprint(tree)(tree))


# --- values --------------------------------------------------------------------------------------

KINDS = ("float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool")


def leaf_of(kind: str) -> np.ndarray:
    drawn = np.random.default_rng(0).normal(size=(4, 6)) * 100
    return drawn > 0 if kind == "bool" else np.asarray(jnp.asarray(drawn).astype(kind))


def test_a_fingerprint_is_the_same_on_every_mesh():
    state = make_state(1)
    expected = fingerprints(state)
    for axes in ({"fsdp": 1}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 4}):
        assert np.array_equal(fingerprints(on(mesh_of(**axes), state)), expected), axes


@pytest.mark.parametrize("kind", KINDS)
def test_any_flipped_bit_changes_both_sums(kind):
    leaf = leaf_of(kind)
    sums = jit_fingerprint([jnp.asarray(leaf)])
    before = np.asarray(sums([jnp.asarray(leaf)]))[0]
    for place in range(leaf.size):
        for bit in range(1 if kind == "bool" else 8 * leaf.itemsize):
            bytes_of = bytearray(leaf.tobytes())
            byte, within = divmod(bit, 8)
            bytes_of[place * leaf.itemsize + byte] ^= 1 << within
            other = np.frombuffer(bytes(bytes_of), leaf.dtype).reshape(leaf.shape)
            after = np.asarray(sums([jnp.asarray(other)]))[0]
            assert (after[:2] != before[:2]).all(), (place, bit)


def test_elements_that_change_places_change_the_sums():
    leaf = jnp.arange(24.0).reshape(4, 6)
    sums = fingerprints([leaf, leaf[::-1], leaf[:, ::-1], leaf.at[0, 0].set(1).at[0, 1].set(0)])
    assert len({tuple(row) for row in sums[:, :2].tolist()}) == 4


def test_numbers_that_are_not_finite_are_counted():
    leaf = jnp.arange(16.0).at[3].set(jnp.nan).at[5].set(-jnp.inf)
    mesh = mesh_of(fsdp=4)
    placed = jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("fsdp")))
    copied = jax.device_put(leaf, NamedSharding(mesh, PartitionSpec()))
    assert fingerprints([placed, copied, jnp.arange(3)])[:, 2].tolist() == [2, 2, 0]
    assert fingerprints([placed, copied])[:, 2].tolist() == [2, 2]


def test_keys_of_random_numbers_have_fingerprints():
    first, second = (jax.random.split(jax.random.key(seed), 3) for seed in (0, 1))
    sums = fingerprints([first, second])
    assert (sums[0, :2] != sums[1, :2]).all()
    assert str(describe([first, second], sums)["0"]) == "key<fry>[3]"


def test_numbers_of_eight_bytes_have_fingerprints():
    with jax.enable_x64(True):
        leaf = jnp.arange(6, dtype=jnp.float64)
        low = jnp.asarray(np.asarray(leaf) + np.spacing(np.float64(5)) * (np.arange(6) == 5))
        placed = jax.device_put(
            leaf.reshape(2, 3), NamedSharding(mesh_of(fsdp=2), PartitionSpec("fsdp"))
        )
        assert (fingerprints([leaf])[0] != fingerprints([low])[0]).tolist() == [True, True, False]
        assert fingerprints([placed]).tolist() == fingerprints([leaf.reshape(2, 3)]).tolist()


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    saved(run_dir, 5, 10)
    return run_dir


def test_every_file_is_in_the_manifest_with_its_sum(run_dir):
    folder = run_dir / "checkpoints/10"
    manifest = read_manifest(folder)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {*manifest.files} == files - {MANIFEST}
    for name, (size, digest) in manifest.files.items():
        content = (folder / name).read_bytes()
        assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
    assert damage(folder, hashes=True) == []


def test_no_byte_of_a_manifest_can_change_without_notice(run_dir, tmp_path):
    content = (run_dir / "checkpoints/10" / MANIFEST).read_bytes()
    draw = random.Random(0)
    for place in draw.sample(range(len(content)), 100):
        changed = bytearray(content)
        changed[place] = draw.choice([*{*range(256)} - {content[place]}])
        (tmp_path / MANIFEST).write_bytes(changed)
        with pytest.raises(CheckpointError, match="damaged"):
            read_manifest(tmp_path)
    for other in (content + b" ", content[:-1], b"", b"[]", b"[" * 10**5):
        (tmp_path / MANIFEST).write_bytes(other)
        with pytest.raises(CheckpointError, match="damaged"):
            read_manifest(tmp_path)


def test_a_manifest_of_another_format_says_so(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(integrity, "FORMAT", "gptjax-9")
    with pytest.raises(CheckpointError, match=r"format 'gptjax-2', but .* reads 'gptjax-9'"):
        read_manifest(run_dir / "checkpoints/10")
    with pytest.raises(CheckpointError, match="older version"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("times", [12, pytest.param(500, marks=pytest.mark.slow)])
def test_damage_is_found_and_the_step_before_is_restored(run_dir, tmp_path, times):
    """And the verdict of `verify` is that of `restore`."""
    like, draw = like_on(mesh_of(fsdp=1), make_state()), random.Random(times)
    for time in range(times):
        copy = tmp_path / "copy"
        what = damaged_copy(run_dir, copy, 10, draw)
        checkpoints = Checkpoints(copy)
        assert checkpoints.verify(10), what
        with pytest.raises(CheckpointError, match="is damaged"):
            checkpoints.restore(like, 10)
        if time % 5 == 0:
            assert_same(checkpoints.restore(like), make_state(5))
    assert Checkpoints(run_dir).verify(10) == []
    assert_same(Checkpoints(run_dir).restore(like), make_state(10))


@pytest.mark.slow
def test_readers_get_a_whole_step_while_the_trainer_replaces_and_removes_them(tmp_path):
    stop, like = threading.Event(), like_on(mesh_of(fsdp=1), make_state())

    def rotate():
        with Checkpoints(tmp_path, keep_last=1) as checkpoints:
            while not stop.is_set():
                for step in (1, 2, 3):
                    checkpoints.save(step, make_state(step), wait=True)
                checkpoints.abandon_after(2)

    saved(tmp_path, 1)
    with ThreadPoolExecutor(1) as trainer:
        rotating = trainer.submit(rotate)
        try:
            for _ in range(60):
                state = Checkpoints(tmp_path).restore(like)
                assert any(same(state, make_state(step)) for step in (1, 2, 3))
        finally:
            stop.set()
        rotating.result()


def same(left, right) -> bool:
    try:
        assert_same(left, right)
    except AssertionError:
        return False
    return True
