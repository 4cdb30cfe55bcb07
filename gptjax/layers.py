"""The layers of a block, the embedding and the heads, as Linen modules."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.attention import Mask, attend, attend_cache, to_ring
from gptjax.config import GPTConfig
from gptjax.sharding import (
    constrain,
    constrain_between,
    constrain_fed,
    constrain_looked_up,
    constrain_stored,
    from_between,
    gather,
    to_between,
)


class Layer(nn.Module):
    """A Linen module whose parameters are declared by letters."""

    config: GPTConfig

    def weight(self, name: str, letters: str, init: Callable = nn.initializers.zeros) -> jax.Array:
        """The parameter of these letters, in the compute dtype and laid out for use.

        But for tables that are looked up, as `Embedding` does, the one place that knows how
        parameters are stored (float32, by the table STORED) and how they are used.
        """
        return gather(self._stored(name, letters, init), letters)

    def _stored(self, name: str, letters: str, init: Callable) -> jax.Array:
        shape = tuple(self.config.sizes[letter] for letter in letters)
        value = self.param(
            name, nn.with_logical_partitioning(init, tuple(letters)), shape, jnp.float32
        )
        return value.astype(self.config.compute_dtype)

    def linear(
        self,
        name: str,
        x: jax.Array,
        letters: str,
        out: str,
        scale: float = 1.0,
        bias: bool = True,
    ) -> jax.Array:
        """A linear map with parameters of `letters`, to a tensor of letters `out`; initialised as
        GPT-2's, times `scale`. A bias is added if both `bias` and the config say so.
        """
        init = nn.initializers.normal(self.config.initial_scale * scale)
        # Not einsum: it sums over H before N, and so turns a weight of "NHD" first.
        given = len(letters) - len(out[2:])
        y = jnp.tensordot(x, self.weight(name, letters, init), given)
        return y + self.weight(f"{name}_bias", out[2:]) if self.config.bias and bias else y


class Norm(Layer):
    """LayerNorm (Ba et al. 2016, equation 4) or RMSNorm (Zhang and Sennrich 2019, equation 4),
    computed in float32.
    """

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> the same, of mean 0 (LayerNorm) and mean square 1 along D, scaled and
        shifted by parameters.
        """
        centred = self.config.norm == "layernorm"
        scale_D = self.weight("scale", "D", nn.initializers.ones)
        y_BTD = normalize(x_BTD, centred, self.config.norm_epsilon) * scale_D
        return y_BTD + self.weight("bias", "D") if centred and self.config.bias else y_BTD


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def normalize(x_BTD: jax.Array, centred: bool, epsilon: float) -> jax.Array:
    """x, less its mean along D if `centred`, over the root of its mean square plus epsilon.
    Statistics in float32.

    Its gradient is given by hand: two sums along D instead of the five that differentiation makes.
    """
    return _normalize(x_BTD, centred, epsilon)[0]


def _normalize(
    x_BTD: jax.Array, centred: bool, epsilon: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x = x_BTD.astype(jnp.float32)
    if centred:
        x -= x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon)
    y_BTD = (x * inverse).astype(x_BTD.dtype)
    return y_BTD, (y_BTD, inverse)


def _normalize_backward(
    centred: bool, epsilon: float, kept: tuple[jax.Array, jax.Array], dy_BTD: jax.Array
):
    y, inverse = kept[0].astype(jnp.float32), kept[1]
    dy = dy_BTD.astype(jnp.float32)
    dx = dy - y * (dy * y).mean(-1, keepdims=True)
    if centred:
        dx -= dy.mean(-1, keepdims=True)
    return ((dx * inverse).astype(dy_BTD.dtype),)


normalize.defvjp(_normalize, _normalize_backward)


class Attention(Layer):
    """Masked self-attention with N query heads and K key/value heads of size H."""

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, mask: Mask, cached: Callable | None
    ) -> jax.Array:
        """[B, T, D] -> [B, T, D].

        Args:
          x_BTD: the normalised residual stream.
          positions_BT: of each token in its document, for RoPE.
          mask: what each position sees.
          cached: takes the keys and values of these tokens, [B, T, K, H], and returns those of all
            tokens so far, [B, K, S, H].
        """
        config = self.config
        q_BTNH = self.linear("query", x_BTD, "DNH", "BTNH", bias=config.query_bias)
        k_BSKH = self.linear("key", x_BTD, "DKH", "BTKH", bias=config.query_bias)
        v_BSKH = self.linear("value", x_BTD, "DKH", "BTKH", bias=config.query_bias)
        if config.positions == "rope":
            q_BTNH, k_BSKH = (
                rotate(x, positions_BT, config.rope_base, config.rope_scaling)
                for x in (q_BTNH, k_BSKH)
            )
        if not config.scale_attention:  # by which every implementation divides
            q_BTNH *= config.sizes["H"] ** 0.5
        keys = "BTKH" if mask.across else "BSKH"
        q_BTNH, k_BSKH, v_BSKH = (
            constrain(q_BTNH, "BTNH"),
            constrain(k_BSKH, keys),
            constrain(v_BSKH, keys),
        )
        if cached:
            y_BTNH = attend_cache(q_BTNH, *cached(k_BSKH, v_BSKH), mask)
        else:
            y_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, mask, implementation=config.attention)
        return self.linear("out", y_BTNH, "NHD", "BTD", residual_scale(config))


ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class FeedForward(Layer):
    """GELU (Hendrycks and Gimpel 2016, section 2; its tanh form or the exact one), ReLU, SiLU, or
    SwiGLU (Shazeer 2020, equation 6).
    """

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        up_BTF = self.linear("up", x_BTD, "DF", "BTF")
        if self.config.activation == "swiglu":
            up_BTF *= jax.nn.silu(self.linear("gate", x_BTD, "DF", "BTF"))
        else:
            up_BTF = ACTIVATIONS[self.config.activation](up_BTF)
        return self.linear(
            "down", constrain(up_BTF, "BTF"), "FD", "BTD", residual_scale(self.config)
        )


class TransformerBlock(Layer):
    """Attention and then a feed-forward layer, each added to the residual stream: GPT-2's order,
    x + layer(norm(x)) (Radford et al. 2019, section 2.3), or GPT-1's, norm(x + layer(x)) (Radford
    et al. 2018, equation 2).
    """

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        mask: Mask,
        cached: Callable | None = None,
        keys_B: jax.Array | None = None,
    ) -> jax.Array:
        """[B, T, D] -> [B, T, D]. Keys mean training: without any nothing is dropped."""
        keys = (None, None) if keys_B is None else jax.vmap(jax.random.split, out_axes=1)(keys_B)
        attention, ffn = (
            Attention(self.config, name="attention"),
            FeedForward(self.config, name="ffn"),
        )
        in_ring = mask.across == "ring"
        x_BTD = self.add(
            x_BTD,
            lambda x: attention(x, positions_BT, mask, cached),
            "attention_norm",
            keys[0],
            in_ring,
        )
        return self.add(x_BTD, ffn, "ffn_norm", keys[1], in_ring)

    def add(
        self, x_BTD: jax.Array, layer: Callable, norm: str, keys_B: jax.Array | None, in_ring: bool
    ) -> jax.Array:
        """The residual stream with what a layer makes of it."""
        config, norm = self.config, Norm(self.config, name=norm)

        def made(x_BTD: jax.Array) -> jax.Array:
            if config.split_residual:
                y_BTD = to_between(layer(from_between(x_BTD, "BTD")), "BTD")
            else:
                y_BTD = layer(x_BTD)
            return drop(y_BTD, config.dropout, keys_B, in_ring)

        if config.norm_place == "after":
            return norm(between(x_BTD + made(x_BTD), config))
        return between(x_BTD + made(norm(x_BTD)), config)


class Embedding(Layer):
    """Tokens, and learned positions if the config asks for them, to the residual stream."""

    @nn.compact
    def __call__(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, keys_B: jax.Array | None = None
    ) -> jax.Array:
        """[B, T] ids and positions -> [B, T, D]. Positions beyond the table are the caller's
        mistake: see `forward`.
        """
        init = nn.initializers.normal(self.config.initial_scale)
        table = constrain_stored(self._stored("tokens", "VD", init), "VD")
        x_BTD = constrain_looked_up(table[tokens_BT], "BTD")
        x_BTD = constrain_fed(x_BTD, "BTD")
        if self.config.positions == "learned":
            # A small table: it is cheaper to have it whole, and to add up its gradient whole.
            x_BTD += constrain(self._stored("positions", "PD", init), "PD")[positions_BT]
        return before_blocks(drop(x_BTD, self.config.dropout, keys_B), self.config)


class Head(Layer):
    """The last norm if there is one, and the unembedding: its own, or the embedding when they are
    tied.
    """

    @nn.compact
    def __call__(self, x_BTD: jax.Array, embedding_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, T, D], [V, D] -> the normalised stream and the unembedding to multiply it with; of a
        head of labels that is the embedding in any case.
        """
        if self.config.norm_place == "before":
            x_BTD = Norm(self.config, name="norm")(x_BTD)
        if self.config.tied_embedding or self.config.head != "lm":
            return x_BTD, gather(embedding_VD.astype(self.config.compute_dtype), "VD")
        return x_BTD, self.weight(
            "unembedding", "VD", nn.initializers.normal(self.config.initial_scale)
        )


class LabelHead(Layer):
    """What a head says that is no token: a logit for each label, or of a span for its beginning
    and its end.
    """

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D], as `Head` normalised it -> [B, T, C], float32."""
        init = nn.initializers.normal(self.config.initial_scale)
        logits_BTC = jnp.einsum(
            "BTD,DC->BTC",
            x_BTD,
            self.weight("label", "DC", init),
            preferred_element_type=jnp.float32,
        )
        return logits_BTC + self.weight("label_bias", "C") if self.config.bias else logits_BTC


def residual_scale(config: GPTConfig) -> float:
    """1 / sqrt(number of additions to the residual stream): Radford et al. 2019, section 2.3."""
    return (2 * config.num_layers) ** -0.5


def between(x_BTD: jax.Array, config: GPTConfig) -> jax.Array:
    """The residual stream where it lies between blocks."""
    return (constrain_between if config.split_residual else constrain)(x_BTD, "BTD")


def before_blocks(x_BTD: jax.Array, config: GPTConfig) -> jax.Array:
    """The same before the first block, where every stage of a pipeline has all rows."""
    return constrain_fed(x_BTD, "BTD", between=config.split_residual)


def drop(
    x_BTD: jax.Array, rate: float, keys_B: jax.Array | None, in_ring: bool = False
) -> jax.Array:
    """Dropout: each number is 0 with probability `rate`, else divided by 1 - rate. Nothing without
    keys, of which each row has its own. The same ones for positions in the ring's order as for
    those in their own.
    """
    if keys_B is None or rate == 0:
        return x_BTD
    keep = functools.partial(jax.random.bernoulli, p=1 - rate, shape=x_BTD.shape[1:])
    kept_BTD = jax.vmap(keep)(keys_B)
    kept_BTD = to_ring(kept_BTD) if in_ring else kept_BTD
    return jnp.where(kept_BTD, x_BTD / (1 - rate), 0).astype(x_BTD.dtype)


def row_keys(key: jax.Array | None, layer: jax.Array | int, rows_B: jax.Array) -> jax.Array | None:
    """The key of each row for the dropout of a layer; of the embedding after the last one."""
    if key is None:
        return None
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, layer)))(rows_B)


def rotate(
    x_BTNH: jax.Array,
    positions_BT: jax.Array,
    base: float,
    scaling: tuple[float, float, float, int] | None = None,
) -> jax.Array:
    """RoPE (Su et al. 2021, equation 34) on pairs H/2 apart. Angles in float32: bfloat16 would
    round 257 to 256.
    """
    half = x_BTNH.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling:
        frequencies = stretch(frequencies, *scaling)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def stretch(
    frequencies: jax.Array, factor: float, low: float, high: float, context_size: int
) -> jax.Array:
    """RoPE's frequencies for a longer context, as Llama 3.1 has them: those that turn less than
    `low` times within the old context are divided by `factor`, those that turn more than `high`
    times are kept, and those between are in between.
    """
    turns = frequencies * context_size / (2 * jnp.pi)
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / factor)
