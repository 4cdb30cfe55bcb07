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

from gptjax.attention import Mask, choose, choose_across, from_ring, to_ring
from gptjax.config import GPTConfig
from gptjax.data import Batch
from gptjax.layers import (
    Embedding,
    Head,
    LabelHead,
    TransformerBlock,
    before_blocks,
    between,
    row_keys,
)
from gptjax.losses import label_losses, logits_of, unembed_loss, unembed_losses
from gptjax.sharding import constrain, parts, stored

Params = dict[str, Any]


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
    logits_BTV = logits_of(x_BTD, unembedding_VD, config)
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
    return unembed_losses(x_BTD, unembedding_VD, batch.targets_BT, config)


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

    Equal to `(batch.weights_BT * token_losses(...)).sum()`, but of lm with a gradient that costs
    less: see `losses.unembed_loss`.

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
        return loss + unembed_loss(x_BTD, unembedding_VD, following_BT, lm_weights_BT, config)
    return unembed_loss(x_BTD, unembedding_VD, batch.targets_BT, batch.weights_BT, config)


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


def init_cache(config: GPTConfig, batch_size: int, num_slots: int) -> KVCache:
    """An empty cache for rows of at most `num_slots` tokens, padding included."""
    config = _resolved(config)
    shape = (batch_size, config.sizes["K"], num_slots, config.sizes["H"])
    empty = tuple(jnp.zeros(shape, config.compute_dtype) for _ in range(config.num_layers))
    return KVCache(
        empty, empty, jnp.full((batch_size, num_slots), -1, jnp.int32), jnp.zeros((), jnp.int32)
    )


def _resolved(config: GPTConfig) -> GPTConfig:
    """For the devices of the mesh that is set, which need not be there; else for those that are."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return resolve(config, device.platform if device else jax.default_backend())[0]
