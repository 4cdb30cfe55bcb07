"""The GPT: embed, a stack of blocks, a head. Pure functions of a plain nested dict of parameters.

params = {"embedding": {...}, "blocks": {...}, "head": {...}}, every leaf of blocks stacked on L.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gptjax.attention import (
    UNSEEN,
    Mask,
    attend,
    attend_cache,
    choose,
    choose_across,
    from_ring,
    to_ring,
)
from gptjax.config import GPTConfig
from gptjax.data import WORD_BITS, Batch
from gptjax.sharding import (
    constrain,
    constrain_between,
    constrain_fed,
    constrain_looked_up,
    constrain_stored,
    constrain_terms,
    from_between,
    gather,
    parts,
    stored,
    to_between,
)

Params = dict[str, Any]

# Bytes of float32 logits that may exist at once on a device, when the config does not say how many
# positions.
LOGITS_BYTES = 128 * 2**20


class Places(NamedTuple):
    """What a block is told of the tokens of its rows: a pipeline gives it some rows at a time."""

    rows_B: jax.Array  # of the batch: dropout of a row is the same whatever rows are beside it
    positions_BT: jax.Array  # of each token in its document
    segments_BT: jax.Array | None  # document of each token; None: a row is one


# Takes the parameters of a layer, x_BTD, what there is to know of its rows, the layer's index and
# its window; returns x_BTD.
Block = Callable[[Params, jax.Array, Places, jax.Array | int, int | None], jax.Array]


class KVCache(NamedTuple):
    """Keys and values of the tokens so far; a value that `forward` takes and returns.

    Slots are filled in the order of the calls, `length` of them so far; each row has its own
    positions. A token after the last slot goes to the first one again: only where no layer sees
    further back than there are slots, and one token at a time.
    """

    # One array a layer, so that a step writes a few bytes and copies nothing.
    k_LBKSH: tuple[jax.Array, ...]
    v_LBKSH: tuple[jax.Array, ...]
    positions_BS: jax.Array  # of each slot's token in its row; -1 where there is none
    length: jax.Array


# --- layers --------------------------------------------------------------------------------------


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


# --- parameters ----------------------------------------------------------------------------------


def init_params(config: GPTConfig, key: jax.Array) -> Params:
    """Fresh parameters, float32: normal(initial_scale), residual outputs scaled down, biases 0,
    norm scales 1.

    The same on any mesh: a function of the config and the key alone.
    """
    return nn.unbox(_boxed_params(config, key))


def param_letters(config: GPTConfig) -> Any:
    """The tree of parameters with each leaf's letters in its place, such as "LDNH"."""
    return jax.tree.map(lambda box: "".join(box.names), _abstract_boxes(config), is_leaf=_is_box)


def abstract_params(config: GPTConfig, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the parameters as they are stored on a mesh; nothing is
    allocated.
    """
    return jax.tree.map(
        lambda box: jax.ShapeDtypeStruct(
            box.value.shape, box.value.dtype, sharding=stored(mesh, "".join(box.names))
        ),
        _abstract_boxes(config),
        is_leaf=_is_box,
    )


@functools.cache  # a run asks for it again and again, and tracing takes long
def _abstract_boxes(config: GPTConfig) -> Any:
    """Shapes and dtypes in the boxes of all parameters."""
    return jax.eval_shape(functools.partial(_boxed_params, config), jax.random.key(0))


def _is_box(node: Any) -> bool:
    return isinstance(node, nn.Partitioned)


def _boxed_params(config: GPTConfig, key: jax.Array) -> Any:
    """Parameters in boxes that hold their letters: boxes exist in this section only."""
    # No parameter depends on either.
    config = replace(config, compute_dtype="float32", attention="xla")
    embedding_key, blocks_key, head_key = jax.random.split(key, 3)
    ids_BT = jnp.zeros((1, 1), jnp.int32)
    x_BTD = jnp.zeros((1, 1, config.width), config.compute_dtype)

    def one_block(block_key: jax.Array) -> Any:
        return TransformerBlock(config).init(block_key, x_BTD, ids_BT, Mask())["params"]

    embedding = Embedding(config).init(embedding_key, ids_BT, ids_BT)["params"]
    blocks = jax.vmap(one_block)(jax.random.split(blocks_key, config.num_layers))
    blocks = jax.tree.map(lambda box: box.replace(names=("L", *box.names)), blocks, is_leaf=_is_box)
    unembedding_VD = jnp.zeros((config.sizes["V"], config.width))
    # A head without a norm whose unembedding is the embedding has no parameters.
    head = ({"params": {}} | Head(config).init(head_key, x_BTD, unembedding_VD))["params"]
    if config.head != "lm":
        head |= LabelHead(config).init(head_key, x_BTD)["params"]
    return {"embedding": embedding, "blocks": blocks, "head": head}


# --- the stack -----------------------------------------------------------------------------------


def scan_blocks(
    block: Block,
    blocks_L: Params,
    x_BTD: jax.Array,
    places: Places,
    config: GPTConfig,
    first: jax.Array | int = 0,
) -> jax.Array:
    """Run layers as one compiled block in a loop, keeping for the backward pass what
    `config.remat` says.

    Args:
      block: one layer.
      blocks_L: parameters of the layers, stacked on L.
      x_BTD: the embedded tokens.
      places: of these.
      config: the model. Layers whose windows differ are unrolled within a turn of the loop.
      first: index in the whole stack of the first of the layers; a multiple of the windows' period.
    """
    num_layers = jax.tree.leaves(blocks_L)[0].shape[0]
    windows, layers = config.windows, (blocks_L, first + jnp.arange(num_layers))
    period = len(windows)
    if period > 1:
        layers = jax.tree.map(lambda leaf: leaf.reshape(-1, period, *leaf.shape[1:]), layers)

    def turn(x_BTD: jax.Array, layers: tuple[Params, jax.Array]) -> tuple[jax.Array, None]:
        for i, window in enumerate(windows):
            # What the backward pass keeps of the parameters is then the stack itself, not a copy.
            def layer(layers, x_BTD, i=i, window=window):
                params, index = layers if period == 1 else jax.tree.map(lambda x: x[i], layers)
                return block(params, x_BTD, places, index, window=window)

            x_BTD = remat(layer, config.remat)(layers, x_BTD)
        return x_BTD, None

    return jax.lax.scan(turn, x_BTD, layers)[0]


def unroll_blocks(
    block: Block, blocks_L: Params, x_BTD: jax.Array, places: Places, config: GPTConfig
) -> jax.Array:
    """Run the stack layer after layer, each compiled for itself: for a cache, and for looking
    inside. The parameters may also be a tuple of those of each layer.
    """
    apart = isinstance(blocks_L, tuple)
    for index in range(config.num_layers):
        window = config.windows[index % len(config.windows)]
        params = blocks_L[index] if apart else jax.tree.map(lambda x, i=index: x[i], blocks_L)
        layer = remat(functools.partial(block, window=window), config.remat)
        x_BTD = layer(params, x_BTD, places, index)
    return x_BTD


def remat(function: Callable, policy: str) -> Callable:
    """The function, with what its backward pass keeps: "none" everything, "dots" products with
    weights and the attention's output (the rest is computed again), "full" only its inputs."""
    if policy == "none":
        return function
    policies = jax.checkpoint_policies
    keep = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names("attention")
    )
    return jax.checkpoint(function, policy=keep if policy == "dots" else None, prevent_cse=False)


# --- the model -----------------------------------------------------------------------------------


def resolve(config: GPTConfig, platform: str) -> tuple[GPTConfig, str]:
    """The config with nothing left to choose, and the reason for the attention it has.

    Args:
      config: `compute_dtype` and `attention` may be "auto".
      platform: "cpu", "gpu" or "tpu".
    Raises:
      ConfigError: if a named attention cannot run on that platform.
    """
    dtype = config.compute_dtype
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    head_size = config.head_size or config.width // config.num_heads
    attention, reason = choose(
        config.attention,
        platform,
        dtype=dtype,
        context_size=config.context_size,
        head_size=head_size,
    )
    return replace(config, compute_dtype=dtype, attention=attention), reason


def forward(
    params: Params,
    tokens_BT: jax.Array,
    config: GPTConfig,
    *,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    cache: KVCache | None = None,
    key: jax.Array | None = None,
    run: Callable = scan_blocks,
    only: jax.Array | int | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Logits of the next token at every position, or of the labels that the head has.

    Args:
      params: as `init_params` makes them.
      tokens_BT: ids below `config.vocab_size` (a larger one reads the last row of the embedding:
        check ids at the door).
      config: the model. "auto" settings are resolved for `jax.default_backend()`.
      positions_BT: of each token in its document, below `config.context_size`; None counts from 0,
        or on from the cache. With a cache, -1 marks a padding token, which nothing sees.
      segments_BT: document of each token; attention stays within one. None: a row is one document.
        Not with a cache.
      cache: keys and values of the tokens before these, as `init_cache` and earlier calls return
        it.
      key: for dropout; without it nothing is dropped.
      run: who runs the stack: `scan_blocks`, `unroll_blocks` or a pipeline; a cache always
        unrolls it.
      only: the one index of T whose logits are wanted, as when a prompt is read; None: all.
    Returns:
      logits_BTV, float32, V = vocab_size (T is 1 with `only`), or logits_BTC of labels; and the
      cache with these tokens added, or None without one.
    Raises:
      ValueError: if a cache is given to a head that says the mean of a whole segment.
    """
    config = _resolved(config)
    if cache is not None and config.pool == "mean":
        raise ValueError(
            "a cache was given, but model.pool is 'mean', of all tokens of a segment: give whole "
            "segments and no cache"
        )
    x_BTD, unembedding_VD, cache = _hidden(
        params, tokens_BT, config, positions_BT, segments_BT, cache, key, run
    )
    if config.head != "lm":
        return _at(only, _label_logits(params, x_BTD, positions_BT, config)), cache
    x_BTD = _at(only, x_BTD)
    logits_BTV = _logits(x_BTD, unembedding_VD, config)
    return logits_BTV[..., : config.vocab_size], cache


def _at(only: jax.Array | int | None, x_BT_: jax.Array) -> jax.Array:
    """One index of T, or all."""
    return x_BT_ if only is None else jax.lax.dynamic_slice_in_dim(x_BT_, only, 1, axis=1)


def token_losses(
    params: Params,
    batch: Batch,
    config: GPTConfig,
    *,
    key: jax.Array | None = None,
    run: Callable = scan_blocks,
) -> jax.Array:
    """The negative log-likelihood of each target, in nats: losses_BT, float32, not weighted.
    What targets are for which head, `tasks.Encoded` says.

    Computed in pieces of T, so that the logits of all positions never exist at once;
    differentiable.
    """
    config = _resolved(config)
    x_BTD, unembedding_VD, _ = _hidden(
        params, batch.tokens_BT, config, batch.positions_BT, batch.segments_BT, None, key, run
    )
    if config.head != "lm":
        logits_BTC = _label_logits(params, x_BTD, batch.positions_BT, config)
        return label_losses(logits_BTC, batch, config)
    pieces = _pieces(x_BTD, batch.targets_BT, config=config)

    @jax.checkpoint
    def piece_losses(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _softmax(_logits(piece[0], unembedding_VD, config), piece[1])[0]

    return _join(jax.lax.map(piece_losses, pieces), config)


def weighted_loss(
    params: Params,
    batch: Batch,
    config: GPTConfig,
    *,
    key: jax.Array | None = None,
    run: Callable = scan_blocks,
    smoothing: float = 0.0,
    lm_weights_BT: jax.Array | None = None,
) -> jax.Array:
    """The sum of weights x losses over the batch, in nats: what training minimises.

    Of lm equal to `(batch.weights_BT * token_losses(...)).sum()`, but its gradient costs three
    products with the unembedding instead of four: they are made in the forward pass, while the
    logits of a piece of T exist.

    Args:
      smoothing: share of each label's target that all labels get alike (Szegedy et al. 2016,
        section 7).
      lm_weights_BT: of a head of labels, the weights with which the loss of the token that follows
        is added (Radford et al. 2018, equation 5).
    """
    config = _resolved(config)
    x_BTD, unembedding_VD, _ = _hidden(
        params, batch.tokens_BT, config, batch.positions_BT, batch.segments_BT, None, key, run
    )
    if config.head != "lm":
        logits_BTC = _label_logits(params, x_BTD, batch.positions_BT, config)
        losses_BT = label_losses(logits_BTC, batch, config, smoothing)
        loss = (batch.weights_BT * losses_BT).sum()
        if lm_weights_BT is None:
            return loss
        following_BT = jnp.roll(batch.tokens_BT, -1, axis=1)
        return loss + _unembed_loss(x_BTD, unembedding_VD, following_BT, lm_weights_BT, config)
    return _unembed_loss(x_BTD, unembedding_VD, batch.targets_BT, batch.weights_BT, config)


def _hidden(params, tokens_BT, config, positions_BT, segments_BT, cache, key, run):
    """Embed and run the stack: the normalised stream x_BTD, the unembedding, and the cache with
    these tokens.
    """
    B, T = tokens_BT.shape
    if positions_BT is None:
        start = 0 if cache is None else cache.positions_BS.max(axis=1, keepdims=True) + 1
        positions_BT = jnp.broadcast_to(start + jnp.arange(T), (B, T))
    across = None
    if cache is None:
        across = choose_across(config.context_attention, config.attention, T, parts("T", T))
    mask = Mask(causal=not config.bidirectional, across=across)
    if isinstance(params["blocks"], tuple):
        run = unroll_blocks
    if cache is not None:
        slot = cache.length % cache.positions_BS.shape[1]
        cache = cache._replace(
            positions_BS=jax.lax.dynamic_update_slice(cache.positions_BS, positions_BT, (0, slot))
        )
        mask = Mask(positions_BT=positions_BT, positions_BS=cache.positions_BS)
        positions_BT = jnp.maximum(positions_BT, 0)
        run = unroll_blocks
    keys, values, places = [], [], Places(jnp.arange(B), positions_BT, segments_BT)

    def block(
        layer: Params,
        x_BTD: jax.Array,
        places: Places,
        index: jax.Array | int,
        window: int | None,
    ) -> jax.Array:
        def cached(k_BTKH: jax.Array, v_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
            for new, old, kept in ((k_BTKH, cache.k_LBKSH, keys), (v_BTKH, cache.v_LBKSH, values)):
                new_BKTH = new.swapaxes(1, 2).astype(old[index].dtype)
                all_BKSH = jax.lax.dynamic_update_slice(old[index], new_BKTH, (0, 0, slot, 0))
                kept.append(constrain(all_BKSH, "BKSH"))
            return keys[-1], values[-1]

        return TransformerBlock(config).apply(
            {"params": layer},
            x_BTD,
            places.positions_BT,
            replace(mask, window=window, segments_BT=places.segments_BT),
            cached if cache else None,
            row_keys(key, index, places.rows_B),
        )

    x_BTD = Embedding(config).apply(
        {"params": params["embedding"]},
        tokens_BT,
        positions_BT,
        row_keys(key, config.num_layers, places.rows_B),
    )
    if across == "ring":  # the blocks have everything in its order
        x_BTD = before_blocks(to_ring(x_BTD), config)
        places = Places(places.rows_B, *jax.tree.map(to_ring, places[1:]))
    kept = config if cache is None else replace(config, remat="none")
    x_BTD = run(block, params["blocks"], x_BTD, places, kept)
    if across == "ring":
        x_BTD = between(from_ring(x_BTD), config)
    x_BTD, unembedding_VD = Head(config).apply(
        {"params": params["head"]}, x_BTD, params["embedding"]["tokens"]
    )
    if cache is not None:
        cache = cache._replace(k_LBKSH=tuple(keys), v_LBKSH=tuple(values), length=cache.length + T)
    return x_BTD, unembedding_VD, cache


def init_cache(config: GPTConfig, batch_size: int, num_slots: int) -> KVCache:
    """An empty cache for rows of at most `num_slots` tokens, padding included."""
    config = _resolved(config)
    shape = (batch_size, config.sizes["K"], num_slots, config.sizes["H"])
    empty = tuple(jnp.zeros(shape, config.compute_dtype) for _ in range(config.num_layers))
    return KVCache(
        empty, empty, jnp.full((batch_size, num_slots), -1, jnp.int32), jnp.zeros((), jnp.int32)
    )


# --- the loss ------------------------------------------------------------------------------------


def _label_logits(
    params: Params, x_BTD: jax.Array, positions_BT: jax.Array | None, config: GPTConfig
) -> jax.Array:
    """What a head of labels says of the normalised stream, [B, T, C], float32."""
    logits_BTC = LabelHead(config).apply({"params": params["head"]}, x_BTD)
    if config.pool == "last":
        return logits_BTC
    B, T, _ = logits_BTC.shape
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))

    def join(before, after):
        sums = jnp.where(after[1], after[0], before[0] + after[0])
        return sums, before[1] | after[1]

    # Not a difference of running sums, which would round by all that stands before in the row.
    first_BT1 = (positions_BT == 0)[..., None]
    sums_BTC, _ = jax.lax.associative_scan(join, (logits_BTC, first_BT1), axis=1)
    return sums_BTC / (positions_BT[..., None] + 1)


def label_losses(
    logits_BTC: jax.Array, batch: Batch, config: GPTConfig, smoothing: float = 0.0
) -> jax.Array:
    """The losses of a head of labels at each position, in nats, [B, T]."""
    match config.head:
        case "label":
            return _class_losses(logits_BTC, batch.targets_BT, smoothing)
        case "labels":
            return _label_set_losses(logits_BTC, batch.targets_BT, smoothing)
        case "span":
            return _span_losses(logits_BTC, batch.targets_BT, batch.segments_BT)
    raise AssertionError(config.head)


def _class_losses(logits_BTC: jax.Array, targets_BT: jax.Array, smoothing: float) -> jax.Array:
    logprobs_BTC = jax.nn.log_softmax(logits_BTC)
    hit_BTC = targets_BT[..., None] == jnp.arange(logits_BTC.shape[-1])
    losses_BT = -jnp.where(hit_BTC, logprobs_BTC, 0).sum(-1)
    return (1 - smoothing) * losses_BT - smoothing * logprobs_BTC.mean(-1)


def _label_set_losses(logits_BTC: jax.Array, targets_BT: jax.Array, smoothing: float) -> jax.Array:
    """The sum over the labels, of which each is there or not. Those past the first word of bits
    have theirs at the positions before.
    """
    C = logits_BTC.shape[-1]
    words_BTW = jnp.stack(
        [jnp.roll(targets_BT, number, axis=1) for number in range(-(-C // WORD_BITS))], axis=-1
    )
    label = jnp.arange(C)
    there_BTC = words_BTW[..., label // WORD_BITS] >> (label % WORD_BITS) & 1
    share_BTC = there_BTC * (1 - smoothing) + smoothing / 2
    return (jax.nn.softplus(logits_BTC) - share_BTC * logits_BTC).sum(-1)


def _span_losses(logits_BTC: jax.Array, targets_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Of bit 1, that the passage begins here and nowhere else in the segment; of bit 2, that it
    ends here; of both, their mean.
    """
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    seen_BTTC = jnp.where(same_BTT[..., None], logits_BTC[:, None], UNSEEN)
    losses_BTC = jax.nn.logsumexp(seen_BTTC, axis=2) - logits_BTC
    bits_BTC = targets_BT[..., None] >> jnp.arange(2) & 1
    return (bits_BTC * losses_BTC).sum(-1) / jnp.maximum(bits_BTC.sum(-1), 1)


def _logits(x_BTD: jax.Array, unembedding_VD: jax.Array, config: GPTConfig) -> jax.Array:
    """Float32 logits with the vocabulary's padding at minus infinity, as far as a float goes."""
    logits_BTV = jnp.einsum(
        "BTD,VD->BTV", x_BTD, unembedding_VD, preferred_element_type=jnp.float32
    )
    logits_BTV = constrain(logits_BTV, "BTV")
    if config.vocab_size == config.sizes["V"]:
        return logits_BTV
    return jnp.where(
        jnp.arange(config.sizes["V"]) < config.vocab_size, logits_BTV, jnp.finfo(jnp.float32).min
    )


def _softmax(
    logits_BTV: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Negative log-likelihoods of the targets [B, T], the softmax before its division [B, T, V],
    and its divisor [B, T].
    """
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    most_BT = logits_BTV.max(axis=-1)
    # Without the barrier XLA computes the exponentials twice, for the sum and for the gradient:
    # half of the time that this function takes.
    exp_BTV = jax.lax.optimization_barrier(jnp.exp(logits_BTV - most_BT[..., None]))
    sums_BT = exp_BTV.sum(axis=-1)
    return most_BT + jnp.log(sums_BT) - picked_BT, exp_BTV, sums_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _unembed_loss(x_BTD, unembedding_VD, targets_BT, weights_BT, config: GPTConfig) -> jax.Array:
    def piece_loss(piece: tuple[jax.Array, ...]) -> jax.Array:
        x, targets, weights = piece
        return (_softmax(_logits(x, unembedding_VD, config), targets)[0] * weights).sum()

    return jax.lax.map(piece_loss, _pieces(x_BTD, targets_BT, weights_BT, config=config)).sum()


def _unembed_loss_forward(x_BTD, unembedding_VD, targets_BT, weights_BT, config: GPTConfig):
    """The loss, and its gradients, made while the logits of a piece exist.

    The softmax is never divided by its sums: that scales rows, so it is left to the products with
    D, which is much smaller than V. The gradient of the unembedding has a term for each device's
    rows R and positions S, which are added up once, after the last piece: each piece would else
    wait for a sum over the network that is larger than itself.
    """
    B, T, _ = x_BTD.shape
    R, S = parts("B", B), parts("T", T)

    def piece_gradients(dunembedding_RSDV: jax.Array, piece: tuple[jax.Array, ...]):
        x, targets, weights = piece
        logits_BTV = _logits(x, unembedding_VD, config)
        losses, exp_BTV, sums = _softmax(logits_BTV, targets)
        hit_BTV = targets[..., None] == jnp.arange(config.sizes["V"])
        dlogits_BTV = jnp.where(hit_BTV, exp_BTV - sums[..., None], exp_BTV)
        dlogits_BTV = constrain(dlogits_BTV.astype(x.dtype), "BTV")
        scale = (weights / sums)[..., None]
        dx = jnp.einsum(
            "BTV,VD->BTD", dlogits_BTV, unembedding_VD, preferred_element_type=jnp.float32
        )
        # As DV, not VD: that would transpose the larger factor of the product.
        x_RbStD, dlogits_RbStV = (
            y.reshape(R, B // R, S, -1, y.shape[-1])
            for y in ((x * scale).astype(x.dtype), dlogits_BTV)
        )
        dunembedding_RSDV += jnp.einsum(
            "RbStD,RbStV->RSDV", x_RbStD, dlogits_RbStV, preferred_element_type=jnp.float32
        )
        dunembedding_RSDV = constrain(dunembedding_RSDV, "BTDV")
        return dunembedding_RSDV, ((dx * scale).astype(x.dtype), (losses * weights).sum())

    pieces = _pieces(x_BTD, targets_BT, weights_BT, config=config)
    zeros_RSDV = constrain(jnp.zeros((R, S, *unembedding_VD.shape[::-1]), jnp.float32), "BTDV")
    dunembedding_RSDV, (dx, losses) = jax.lax.scan(piece_gradients, zeros_RSDV, pieces)
    dunembedding_RSDV = constrain_terms(dunembedding_RSDV, "BTDV")
    dunembedding_VD = constrain_stored(dunembedding_RSDV.sum((0, 1)).T, "VD")
    return losses.sum(), (_join(dx, config), dunembedding_VD.astype(unembedding_VD.dtype))


def _unembed_loss_backward(
    config: GPTConfig, gradients: tuple[jax.Array, jax.Array], dloss: jax.Array
):
    dx_BTD, dunembedding_VD = (gradient * dloss.astype(gradient.dtype) for gradient in gradients)
    return dx_BTD, dunembedding_VD, None, None


_unembed_loss.defvjp(_unembed_loss_forward, _unembed_loss_backward)


def _pieces(x_BTD: jax.Array, *others_BT: jax.Array, config: GPTConfig) -> tuple[jax.Array, ...]:
    """Arrays [B, T, ...] cut along T: [pieces, B, T / pieces, ...].

    Of positions that are split over devices, a piece has its share from each, so that none moves.
    """
    B, T, _ = x_BTD.shape
    mesh = jax.sharding.get_abstract_mesh()
    bytes_at_once = B * config.sizes["V"] * 4 // max(mesh.size, 1)
    size = min(config.loss_piece or max(LOGITS_BYTES // max(bytes_at_once, 1), 1), T)
    apart = parts("T", T, between=config.split_residual)
    pieces = next(n for n in range(-(-T // size), T + 1) if T % (n * apart) == 0)
    return tuple(_cut(x, apart, pieces) for x in (x_BTD, *others_BT))


def _cut(x_BT: jax.Array, apart: int, pieces: int) -> jax.Array:
    B, T, *rest = x_BT.shape
    x = x_BT.reshape(B, apart, pieces, T // apart // pieces, *rest)
    return jnp.moveaxis(x, 2, 0).reshape(pieces, B, T // pieces, *rest)


def _join(pieces: jax.Array, config: GPTConfig) -> jax.Array:
    """The inverse of `_pieces`, for one array."""
    n, B, size, *rest = pieces.shape
    apart = parts("T", n * size, between=config.split_residual)
    x = jnp.moveaxis(pieces.reshape(n, B, apart, size // apart, *rest), 0, 2)
    return x.reshape(B, n * size, *rest)


def _resolved(config: GPTConfig) -> GPTConfig:
    """For the devices of the mesh that is set, which need not be there; else for those that are."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return resolve(config, device.platform if device else jax.default_backend())[0]
