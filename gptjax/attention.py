"""Which positions a query sees, and the ways to compute attention over them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.config import ConfigError
from gptjax.sharding import in_use_spec

# A score that no real one comes near, and whose exponential is 0; minus infinity would give NaN for
# a row that sees nothing.
UNSEEN = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query sees, as a rule; no [T, S] array exists unless an implementation makes
    one.

    Without positions, query t sees key s iff s <= t and both are of one segment; those that come
    after as well if it is not `causal`. With positions, which a cache gives, it sees the keys whose
    position is from 0 to its own. In all cases no further away than `window` positions, its own
    included.
    """

    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    segments_BT: jax.Array | None = None
    positions_BT: jax.Array | None = None  # of the queries
    positions_BS: jax.Array | None = None  # of the keys; -1 where there is none

    def visible(self, queries: slice, keys: slice) -> jax.Array:
        """The rule as an array [B or 1, T, S], true where seen, for a block of queries and one of
        keys.
        """
        if self.positions_BT is not None:
            back = self.positions_BT[:, queries, None] - self.positions_BS[:, None, keys]
            seen = (back >= 0) & (self.positions_BS[:, None, keys] >= 0)
        else:
            back = (
                jnp.arange(queries.start, queries.stop)[:, None] - jnp.arange(keys.start, keys.stop)
            )[None]
            back = back if self.causal else jnp.abs(back)
            seen = back >= 0
            if self.segments_BT is not None:
                seen &= self.segments_BT[:, queries, None] == self.segments_BT[:, None, keys]
        return seen if self.window is None else seen & (back < self.window)


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, *, implementation: str
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), with N / K query heads to
    each key/value head.

    Args:
      q_BTNH: queries.
      k_BSKH: keys.
      v_BSKH: values.
      mask: what each query sees.
      implementation: "xla", "blockwise", "cudnn" or "splash", as `choose` returns it.
    Returns:
      [B, T, N, H], of the dtype of the queries.
    """
    return _IMPLEMENTATIONS[implementation](q_BTNH, k_BSKH, v_BSKH, mask)


def attend_cache(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask) -> jax.Array:
    """`attend` for keys and values that are kept heads first, so that a step that reads all of
    them moves none.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4) * H**-0.5
    s_BKGTS = _scores(q_BKGTH, k_BKSH, mask, slice(0, T), slice(0, k_BKSH.shape[2]))
    p_BKGTS = jax.nn.softmax(s_BKGTS).astype(v_BKSH.dtype)
    out_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", p_BKGTS, v_BKSH)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)


def choose(
    wanted: str, platform: str, *, dtype: str, context_size: int, head_size: int
) -> tuple[str, str]:
    """The implementation to use, and why.

    Args:
      wanted: a name, or "auto" for the fastest that is right for the device.
      platform: "cpu", "gpu" or "tpu".
      dtype: of queries, keys and values.
      context_size: T, positions of a row.
      head_size: H.
    Raises:
      ConfigError: if the named one cannot run there.
    """
    obstacles = {
        "xla": "",
        "blockwise": "",
        "cudnn": _cudnn_obstacle(platform, dtype, head_size),
        "splash": _splash_obstacle(platform, context_size, head_size),
    }
    if wanted != "auto":
        if obstacles[wanted]:
            possible = ", ".join(name for name, obstacle in obstacles.items() if not obstacle)
            raise ConfigError(
                f"model.attention = {wanted!r} cannot run here: {obstacles[wanted]}; "
                f"give auto, or one of {possible}"
            )
        return wanted, "named in the config"
    if platform == "cpu":
        return "blockwise", "fastest measured on a CPU"
    fastest = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "xla")
    if obstacles[fastest]:
        return "xla", f"{fastest} is not possible: {obstacles[fastest]}"
    return fastest, f"fastest on a {platform.upper()}"


def _cudnn_obstacle(platform: str, dtype: str, head_size: int) -> str:
    if platform != "gpu":
        return f"cudnn needs an NVIDIA GPU, and this is a {platform}"
    if dtype == "float32":
        return "cudnn needs compute_dtype bfloat16, and it is float32"
    if head_size % 8 or head_size > 128:
        return f"cudnn needs a head_size that is a multiple of 8, up to 128, and it is {head_size}"
    return ""


def _splash_obstacle(platform: str, context_size: int, head_size: int) -> str:
    if platform != "tpu":
        return f"splash needs a TPU, and this is a {platform}"
    if context_size % 128:
        return f"splash needs a context_size that is a multiple of 128, and it is {context_size}"
    if head_size % 64:
        return f"splash needs a head_size that is a multiple of 64, and it is {head_size}"
    return ""


# --- xla and cudnn -------------------------------------------------------------------------------


def _xla(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask) -> jax.Array:
    """The plain one: every score exists. The others are compared with it."""
    visible = mask.visible(slice(0, q_BTNH.shape[1]), slice(0, k_BSKH.shape[1]))
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=visible[:, None], implementation="xla"
    )
    return checkpoint_name(out_BTNH, "attention")


def _cudnn(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask) -> jax.Array:
    """NVIDIA's fused kernel: no scores in memory. Causality and window are its own; segments reach
    it as a mask [B, 1, T, S].
    """
    segments = None
    if mask.segments_BT is not None:
        segments = (mask.segments_BT[:, :, None] == mask.segments_BT[:, None, :])[:, None]
    window = None
    if mask.window is not None:
        window = (mask.window - 1, 0 if mask.causal else mask.window - 1)
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=segments,
        is_causal=mask.causal,
        local_window_size=window,
        implementation="cudnn",
    )


# --- blockwise -----------------------------------------------------------------------------------


def _blockwise(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask) -> jax.Array:
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


def _spans(T: int, mask: Mask) -> list[tuple[slice, slice]]:
    """Blocks of queries, each with the keys that any of them sees: at least 128 positions, and no
    more than 16 blocks.
    """
    size, reach = max(128, -(-T // 16)), T if mask.window is None else mask.window - 1
    ahead = 0 if mask.causal else reach
    return [
        (
            slice(start, min(start + size, T)),
            slice(max(0, start - reach), min(start + size + ahead, T)),
        )
        for start in range(0, T, size)
    ]


def _scores(
    q_BKGTH: jax.Array, k_BKSH: jax.Array, mask: Mask, queries: slice, keys: slice
) -> jax.Array:
    s_BKGTS = jnp.einsum(
        "BKGTH,BKSH->BKGTS",
        q_BKGTH[..., queries, :],
        k_BKSH[:, :, keys],
        preferred_element_type=jnp.float32,
    )
    return jnp.where(mask.visible(queries, keys)[:, None, None], s_BKGTS, UNSEEN)


def _blocks_forward(q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask):
    outs, log_sums = [], []
    for queries, keys in _spans(q_BKGTH.shape[3], mask):
        s_BKGTS = _scores(q_BKGTH, k_BKSH, mask, queries, keys)
        most = s_BKGTS.max(-1, keepdims=True)
        p_BKGTS = jnp.exp(s_BKGTS - most)
        sums = p_BKGTS.sum(-1, keepdims=True)
        out = jnp.einsum(
            "BKGTS,BKSH->BKGTH",
            p_BKGTS.astype(v_BKSH.dtype),
            v_BKSH[:, :, keys],
            preferred_element_type=jnp.float32,
        )
        outs.append((out / sums).astype(v_BKSH.dtype))
        log_sums.append(most + jnp.log(sums))
    out_BKGTH = checkpoint_name(jnp.concatenate(outs, axis=3), "attention")
    log_sums_BKGT1 = checkpoint_name(jnp.concatenate(log_sums, axis=3), "attention")
    return out_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, mask, out_BKGTH, log_sums_BKGT1)


def _blocks_backward(kept, dout_BKGTH: jax.Array):
    q_BKGTH, k_BKSH, v_BKSH, mask, out_BKGTH, log_sums_BKGT1 = kept
    dtype = q_BKGTH.dtype
    delta_BKGT1 = (dout_BKGTH.astype(jnp.float32) * out_BKGTH).sum(-1, keepdims=True)
    dq, dk_BKSH, dv_BKSH = (
        [],
        jnp.zeros(k_BKSH.shape, jnp.float32),
        jnp.zeros(v_BKSH.shape, jnp.float32),
    )
    for queries, keys in _spans(q_BKGTH.shape[3], mask):
        s_BKGTS = _scores(q_BKGTH, k_BKSH, mask, queries, keys)
        p_BKGTS = jnp.exp(s_BKGTS - log_sums_BKGT1[..., queries, :])
        dout = dout_BKGTH[..., queries, :]
        dp_BKGTS = jnp.einsum(
            "BKGTH,BKSH->BKGTS", dout, v_BKSH[:, :, keys], preferred_element_type=jnp.float32
        )
        ds_BKGTS = (p_BKGTS * (dp_BKGTS - delta_BKGT1[..., queries, :])).astype(dtype)
        dq.append(jnp.einsum("BKGTS,BKSH->BKGTH", ds_BKGTS, k_BKSH[:, :, keys]))
        dk = jnp.einsum(
            "BKGTS,BKGTH->BKSH",
            ds_BKGTS,
            q_BKGTH[..., queries, :],
            preferred_element_type=jnp.float32,
        )
        dv = jnp.einsum(
            "BKGTS,BKGTH->BKSH", p_BKGTS.astype(dtype), dout, preferred_element_type=jnp.float32
        )
        dk_BKSH = dk_BKSH.at[:, :, keys].add(dk)
        dv_BKSH = dv_BKSH.at[:, :, keys].add(dv)
    return jnp.concatenate(dq, axis=3), dk_BKSH.astype(dtype), dv_BKSH.astype(dtype), None


_blocks.defvjp(_blocks_forward, _blocks_backward)


# --- splash --------------------------------------------------------------------------------------


def _splash(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, *, interpret: bool = False
) -> jax.Array:
    """The TPU kernel that comes with JAX, which skips blocks that no query sees; on each device's
    own rows and heads.
    """
    run = functools.partial(
        _splash_rows, window=mask.window, causal=mask.causal, interpret=interpret
    )
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:  # a kernel is opaque to the partitioner, so it is given its part by hand
        segments = None if mask.segments_BT is None else in_use_spec("BT")
        run = jax.shard_map(
            run,
            in_specs=(in_use_spec("BTNH"), in_use_spec("BSKH"), in_use_spec("BSKH"), segments),
            out_specs=in_use_spec("BTNH"),
            check_vma=False,
        )
    return run(q_BTNH, k_BSKH, v_BSKH, mask.segments_BT)


def _splash_rows(
    q_BTNH, k_BSKH, v_BSKH, segments_BT, *, window: int | None, causal: bool, interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, T, N, H = q_BTNH.shape
    if window is not None:
        reach = (window - 1, 0 if causal else window - 1)
        one_head = splash.LocalMask((T, T), window_size=reach, offset=0)
    else:
        one_head = splash.CausalMask((T, T)) if causal else splash.FullMask((T, T))
    block = math.gcd(T, 512)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([one_head] * N),
        block_sizes=splash.BlockSizes(
            **{
                name: block
                for name in (
                    "block_q",
                    "block_kv",
                    "block_kv_compute",
                    "block_q_dkv",
                    "block_kv_dkv",
                    "block_kv_dkv_compute",
                    "block_q_dq",
                    "block_kv_dq",
                )
            }
        ),
        interpret=interpret,
    )
    heads_first = [x.swapaxes(1, 2) for x in (q_BTNH * H**-0.5, k_BSKH, v_BSKH)]
    segments = None if segments_BT is None else splash.SegmentIds(segments_BT, segments_BT)
    return jax.vmap(kernel)(*heads_first, segments).swapaxes(1, 2)


_IMPLEMENTATIONS = {"xla": _xla, "blockwise": _blockwise, "cudnn": _cudnn, "splash": _splash}
