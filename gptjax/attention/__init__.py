"""Ways to compute attention, on one device or over rows that are split on the axis context."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.attention.blocks import blockwise, scores
from gptjax.attention.kernels import cudnn, cudnn_obstacle, splash, splash_obstacle
from gptjax.attention.mask import UNSEEN, Across, Mask
from gptjax.attention.ring import from_ring, ring, to_ring
from gptjax.config import ConfigError
from gptjax.sharding import by_hand, parts

__all__ = [
    "UNSEEN",
    "Mask",
    "attend",
    "attend_cache",
    "choose",
    "choose_across",
    "from_ring",
    "to_ring",
]


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, *, implementation: str
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), with N / K query heads to
    each key/value head.

    Args:
      q_BTNH: queries.
      k_BSKH: keys.
      v_BSKH: values.
      mask: what each query sees, and how rows are split over devices.
      implementation: "xla", "blockwise", "cudnn" or "splash", as `choose` returns it.
    Returns:
      [B, T, N, H], of the dtype of the queries.
    """
    if mask.across == "ring":
        return ring(q_BTNH, k_BSKH, v_BSKH, mask)
    if mask.across == "all_gather":
        return _gathered(q_BTNH, k_BSKH, v_BSKH, mask, implementation)
    return _IMPLEMENTATIONS[implementation](q_BTNH, k_BSKH, v_BSKH, mask)


def attend_cache(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask) -> jax.Array:
    """`attend` for keys and values that are kept heads first, so that a step that reads all of
    them moves none.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4) * H**-0.5
    s_BKGTS = scores(q_BKGTH, k_BKSH, mask, slice(0, T), slice(0, k_BKSH.shape[2]))
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
        "cudnn": cudnn_obstacle(platform, dtype, head_size),
        "splash": splash_obstacle(platform, context_size, head_size),
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


def choose_across(wanted: str, attention: str, context_size: int, num_parts: int) -> Across | None:
    """How attention is computed over rows that are split on the mesh axis context.

    Args:
      wanted: "ring", "all_gather" or "auto".
      attention: the implementation on a device, as `choose` returns it.
      context_size: T, positions of a row.
      num_parts: devices along the axis.
    Returns:
      None if rows are whole. A ring has two halves on each device; where the row does not divide by
      them, keys and values are gathered. So they are for cuDNN too, unless a ring is wanted: it
      would be computed without that kernel.
    """
    if num_parts == 1:
        return None
    if context_size % (2 * num_parts) or wanted == "all_gather":
        return "all_gather"
    return "all_gather" if wanted == "auto" and attention == "cudnn" else "ring"


def _gathered(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask: Mask, implementation: str
) -> jax.Array:
    """Each device's queries over all keys and values, which are gathered: simple, any
    implementation can do it, and under a causal mask half of it is for nothing.
    """
    T = k_BTKH.shape[1]
    size = T // parts("T", T)
    if implementation == "splash" and size % 128:
        implementation = "blockwise"  # a part is too small for the kernel's blocks

    def run(q_BTNH, k_BTKH, v_BTKH, segments_BT) -> jax.Array:
        k_BSKH, v_BSKH, segments_BS = jax.tree.map(
            lambda x: jax.lax.all_gather(x, "context", axis=1, tiled=True),
            (k_BTKH, v_BTKH, segments_BT),
        )
        part = replace(
            mask,
            across=None,
            segments_BT=segments_BT,
            segments_BS=segments_BS,
            offset=jax.lax.axis_index("context") * size,
        )
        return _IMPLEMENTATIONS[implementation](q_BTNH, k_BSKH, v_BSKH, part)

    run = by_hand(run, k_BTKH.shape, "BTNH BTKH BTKH BT", "BTNH")
    return run(q_BTNH, k_BTKH, v_BTKH, mask.segments_BT)


def _xla(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask) -> jax.Array:
    """The plain one: every score exists. The others are compared with it."""
    visible = mask.visible(slice(0, q_BTNH.shape[1]), slice(0, k_BSKH.shape[1]))
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=None if visible is None else visible[:, None],
        implementation="xla",
    )
    return checkpoint_name(out_BTNH, "attention")


_IMPLEMENTATIONS = {"xla": _xla, "blockwise": blockwise, "cudnn": cudnn, "splash": splash}
