"""Laws of integrity.py: no byte of a step and no bit of a value changes without notice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_checkpoint import make_state, mesh_of, on

from gptjax.integrity import describe, jit_fingerprint


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
