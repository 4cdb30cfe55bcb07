"""The kernels that come with JAX: cuDNN's on NVIDIA GPUs and splash on TPUs."""

import functools
import math

import jax

from gptjax.attention.mask import Mask
from gptjax.sharding import by_hand


def cudnn_obstacle(platform: str, dtype: str, head_size: int) -> str:
    if platform != "gpu":
        return f"cudnn needs an NVIDIA GPU, and this is a {platform}"
    if dtype == "float32":
        return "cudnn needs compute_dtype bfloat16, and it is float32"
    if head_size % 8 or head_size > 128:
        return f"cudnn needs a head_size that is a multiple of 8, up to 128, and it is {head_size}"
    return ""


def splash_obstacle(platform: str, context_size: int, head_size: int) -> str:
    if platform != "tpu":
        return f"splash needs a TPU, and this is a {platform}"
    if context_size % 128:
        return f"splash needs a context_size that is a multiple of 128, and it is {context_size}"
    if head_size % 64:
        return f"splash needs a head_size that is a multiple of 64, and it is {head_size}"
    return ""


def cudnn(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask) -> jax.Array:
    """NVIDIA's fused kernel: no scores in memory. Causality and window are its own; segments reach
    it as a mask [B, 1, T, S], and so does everything where queries are a part of the row, and a
    window to both sides, which the kernel has not.
    """
    attend = functools.partial(
        jax.nn.dot_product_attention, q_BTNH, k_BSKH, v_BSKH, implementation="cudnn"
    )
    if mask.offset is not None or (mask.window is not None and not mask.causal):
        visible = mask.visible(slice(0, q_BTNH.shape[1]), slice(0, k_BSKH.shape[1]))
        return attend(mask=None if visible is None else visible[:, None])
    segments = None
    if mask.segments_BT is not None:
        segments = (mask.segments_BT[:, :, None] == mask.segments_BT[:, None, :])[:, None]
    window = None
    if mask.window is not None:
        window = (mask.window - 1, 0)
    return attend(mask=segments, is_causal=mask.causal, local_window_size=window)


def splash(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, *, interpret: bool = False
) -> jax.Array:
    """The TPU kernel that comes with JAX, which skips blocks that no query sees; on each device's
    own rows and heads.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    segments = [mask.segments_BT, mask.segments_BS]
    if segments[1] is None:
        segments[1] = segments[0]
    run = functools.partial(
        _splash_rows, window=mask.window, causal=mask.causal, interpret=interpret
    )
    if mask.offset is not None:  # the kernel skips by what is known before it runs: one for each
        places = [functools.partial(run, offset=offset) for offset in range(0, S, T)]
        return jax.lax.switch(mask.offset // T, places, q_BTNH, k_BSKH, v_BSKH, *segments)
    # A kernel is opaque to the partitioner, so it is given its part by hand.
    run = by_hand(run, k_BSKH.shape, "BSNH BSKH BSKH BS BS", "BSNH")
    return run(q_BTNH, k_BSKH, v_BSKH, *segments)


def _splash_rows(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    segments_BT,
    segments_BS,
    *,
    window: int | None,
    causal: bool,
    interpret: bool,
    offset: int = 0,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, T, N, H = q_BTNH.shape
    shape = (T, k_BSKH.shape[1])
    if window is not None:
        reach = (window - 1, 0 if causal else window - 1)
        one_head = splash.LocalMask(shape, window_size=reach, offset=offset)
    else:
        one_head = splash.CausalMask(shape, offset) if causal else splash.FullMask(shape)
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
    segments = None if segments_BT is None else splash.SegmentIds(segments_BT, segments_BS)
    return jax.vmap(kernel)(*heads_first, segments).swapaxes(1, 2)
