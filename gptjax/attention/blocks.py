"""Attention a block of queries at a time, in XLA: memory linear in the positions."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.attention.mask import UNSEEN, Mask


def blockwise(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask) -> jax.Array:
    """Attention a block of queries at a time, over just the keys that the block can see.

    Keeps the output and the logarithm of each softmax's sum for the backward pass, not the
    probabilities, and computes them again there (Dao et al. 2022, "FlashAttention", algorithm 4).
    Half the scores are never computed.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4) * H**-0.5
    out_BKGTH = _blocks(q_BKGTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), mask)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@jax.custom_vjp
def _blocks(q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask) -> jax.Array:
    return _blocks_forward(q_BKGTH, k_BKSH, v_BKSH, mask)[0]


def _blocks_forward(q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask):
    out_BKGTH, log_sums_BKGT1 = attend_blocks(q_BKGTH, k_BKSH, v_BKSH, mask, dtype=v_BKSH.dtype)
    out_BKGTH = checkpoint_name(out_BKGTH, "attention")
    log_sums_BKGT1 = checkpoint_name(log_sums_BKGT1, "attention")
    return out_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, mask, out_BKGTH, log_sums_BKGT1)


def _blocks_backward(kept, dout_BKGTH: jax.Array):
    q_BKGTH, k_BKSH, v_BKSH, mask, out_BKGTH, log_sums_BKGT1 = kept
    gradients = blocks_gradients(
        q_BKGTH,
        k_BKSH,
        v_BKSH,
        mask,
        log_sums_BKGT1,
        delta_of(out_BKGTH, dout_BKGTH),
        dout_BKGTH,
        dtype=q_BKGTH.dtype,
    )
    return *(gradient.astype(q_BKGTH.dtype) for gradient in gradients), None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def attend_blocks(
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    mask: Mask,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """The output, of `dtype`, and the logarithm of each softmax's sum [B, K, G, T, 1], float32.

    Queries are scaled already. One that sees nothing has a logarithm so small that its output
    weighs nothing beside any other.
    """
    outs, log_sums = [], []
    for queries, keys in _spans(q_BKGTH.shape[3], k_BKSH.shape[2], mask):
        s_BKGTS = scores(q_BKGTH, k_BKSH, mask, queries, keys)
        most = s_BKGTS.max(-1, keepdims=True)
        p_BKGTS = jnp.exp(s_BKGTS - most)
        sums = p_BKGTS.sum(-1, keepdims=True)
        out = jnp.einsum(
            "BKGTS,BKSH->BKGTH",
            p_BKGTS.astype(v_BKSH.dtype),
            v_BKSH[:, :, keys],
            preferred_element_type=jnp.float32,
        )
        outs.append((out / sums).astype(dtype))
        log_sums.append(most + jnp.log(sums))
    return jnp.concatenate(outs, axis=3), jnp.concatenate(log_sums, axis=3)


def blocks_gradients(
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    mask: Mask,
    log_sums_BKGT1: jax.Array,
    delta_BKGT1: jax.Array,
    dout_BKGTH: jax.Array,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of queries, of `dtype`, of keys and of values, float32.

    Args:
      log_sums_BKGT1: of each query, over all the keys that it sees, of which these may be a part.
      delta_BKGT1: as `delta_of` returns it, of the output for all these keys.
      dout_BKGTH: the gradient of that output.
    """
    dq, dk_BKSH, dv_BKSH = (
        [],
        jnp.zeros(k_BKSH.shape, jnp.float32),
        jnp.zeros(v_BKSH.shape, jnp.float32),
    )
    for queries, keys in _spans(q_BKGTH.shape[3], k_BKSH.shape[2], mask):
        s_BKGTS = scores(q_BKGTH, k_BKSH, mask, queries, keys)
        p_BKGTS = jnp.exp(s_BKGTS - log_sums_BKGT1[..., queries, :])
        dout = dout_BKGTH[..., queries, :]
        dp_BKGTS = jnp.einsum(
            "BKGTH,BKSH->BKGTS", dout, v_BKSH[:, :, keys], preferred_element_type=jnp.float32
        )
        ds_BKGTS = (p_BKGTS * (dp_BKGTS - delta_BKGT1[..., queries, :])).astype(q_BKGTH.dtype)
        dq.append(
            jnp.einsum(
                "BKGTS,BKSH->BKGTH", ds_BKGTS, k_BKSH[:, :, keys], preferred_element_type=dtype
            )
        )
        dk = jnp.einsum(
            "BKGTS,BKGTH->BKSH",
            ds_BKGTS,
            q_BKGTH[..., queries, :],
            preferred_element_type=jnp.float32,
        )
        dv = jnp.einsum(
            "BKGTS,BKGTH->BKSH",
            p_BKGTS.astype(dout.dtype),
            dout,
            preferred_element_type=jnp.float32,
        )
        dk_BKSH = dk_BKSH.at[:, :, keys].add(dk)
        dv_BKSH = dv_BKSH.at[:, :, keys].add(dv)
    return jnp.concatenate(dq, axis=3), dk_BKSH, dv_BKSH


def delta_of(out_BKGTH: jax.Array, dout_BKGTH: jax.Array) -> jax.Array:
    """The sum of each output times its gradient, float32 [B, K, G, T, 1]."""
    return (dout_BKGTH.astype(jnp.float32) * out_BKGTH).sum(-1, keepdims=True)


def scores(
    q_BKGTH: jax.Array, k_BKSH: jax.Array, mask: Mask, queries: slice, keys: slice
) -> jax.Array:
    """Products of some queries and some keys, float32; `UNSEEN` where the mask hides the key."""
    s_BKGTS = jnp.einsum(
        "BKGTH,BKSH->BKGTS",
        q_BKGTH[..., queries, :],
        k_BKSH[:, :, keys],
        preferred_element_type=jnp.float32,
    )
    seen = mask.visible(queries, keys)
    return s_BKGTS if seen is None else jnp.where(seen[:, None, None], s_BKGTS, UNSEEN)


def _spans(T: int, S: int, mask: Mask) -> list[tuple[slice, slice]]:
    """Blocks of queries, each with the keys that any of them sees, as far as is known before the
    program runs: at least 128 positions, and no more than 16 blocks.
    """
    size, reach = max(128, -(-T // 16)), S if mask.window is None else mask.window - 1
    ahead = 0 if mask.causal else reach
    blocks = [slice(start, min(start + size, T)) for start in range(0, T, size)]
    if mask.offset is not None:
        return [(queries, slice(0, S)) for queries in blocks]
    return [
        (queries, slice(max(0, queries.start - reach), min(queries.start + size + ahead, S)))
        for queries in blocks
    ]
