"""Reading prompts: rows of any lengths into a cache that has room for what follows."""

import contextlib
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from gptjax.config import ConfigError, GPTConfig
from gptjax.model import KVCache, Params, forward, init_cache, resolve
from gptjax.sampling import Sampling, violations
from gptjax.sharding import whole


@functools.partial(jax.jit, static_argnums=1)
def _apart(params: Params, config: GPTConfig) -> Params:
    blocks_L = jax.tree.map(lambda leaf: leaf.astype(config.compute_dtype), params["blocks"])
    layers = tuple(
        jax.tree.map(lambda leaf, i=index: leaf[i], blocks_L) for index in range(config.num_layers)
    )
    others = {name: params[name] for name in ("embedding", "head")}
    return jax.tree.map(lambda leaf: leaf.astype(config.compute_dtype), others) | {"blocks": layers}


def prepare(params: Params, config: GPTConfig) -> Params:
    """The parameters as decoding reads them: each layer's apart, in the compute dtype.

    Whatever generates takes them as well as those of `init_params`, and then need not copy these
    itself at every call.

    Args:
      params: of the model, on any mesh.
      config: the model, whose compute dtype must not be "auto" (see `resolve`), or float32 or
        bfloat16 is chosen for `jax.default_backend()`.
    """
    if isinstance(params["blocks"], tuple):
        return params
    with on_mesh(params):
        return _apart(params, resolve(config, jax.default_backend())[0])


def on_mesh(params: Params) -> contextlib.AbstractContextManager:
    """The mesh that the parameters lie on, set; or nothing."""
    sharding = jax.tree.leaves(params)[0].sharding
    return (
        jax.set_mesh(sharding.mesh)
        if isinstance(sharding, NamedSharding)
        else contextlib.nullcontext()
    )


def refuse_prompts(
    prompts: Sequence[Sequence[int]], config: GPTConfig, sampling: Sampling, *others: str
) -> None:
    """Raise one ConfigError for all that is wrong with the prompts and the settings.

    Args:
      others: more that is wrong.
    """
    problems = list(others)
    if config.head != "lm":
        problems.append(
            f"the model has a head of kind {config.head!r}, which writes no text: give a model "
            "whose head is lm, or ask for predictions with gptjax predict RUN FILE --out FILE"
        )
    if not prompts:
        problems.append("no prompt was given: give at least one")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            problems.append(f"prompt {row} is empty: begin it with the tokenizer's end-of-text id")
        elif not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            problems.append(
                f"prompt {row} holds ids from {min(prompt)} to {max(prompt)}: "
                f"the vocabulary has 0 to {config.vocab_size - 1}"
            )
    problems += violations(sampling, config.vocab_size, config.context_size)
    if problems:
        raise ConfigError("; ".join(problems))


def reach(config: GPTConfig) -> int | None:
    """How many of a text's last tokens the next one depends on, where the model can read a text
    of any length: with RoPE, and a window in every layer. None: the context is all that it reads.
    """
    if config.positions != "rope" or None in config.windows:
        return None
    return config.num_layers * (config.windows[0] - 1) + 1


def num_slots(config: GPTConfig, tokens: int) -> int:
    """Slots of a cache for rows of that many tokens: one of a few sizes, so that little is
    compiled, and no more than the model looks back.
    """
    size = 64
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3  # 64, 96, 128, 192, ...
    if reach(config) is None:
        return min(size, config.context_size)
    return min(size, -(-config.windows[0] // 64) * 64)


def pad(windows: list[list[int]], config: GPTConfig) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows that end together at the longest one's length, padded to one of a few lengths, so that
    little is compiled.

    Returns:
      tokens_BT; positions_BT, -1 at padding; and the longest row's length.
    """
    longest = max(len(window) for window in windows)
    size = 1 << max(longest - 1, 15).bit_length()
    if reach(config) is None:
        size = min(size, config.context_size)
    tokens_BT = np.zeros((len(windows), size), np.int32)
    positions_BT = np.full((len(windows), size), -1, np.int32)
    for row, window in enumerate(windows):
        tokens_BT[row, longest - len(window) : longest] = window
        positions_BT[row, longest - len(window) : longest] = np.arange(len(window))
    return tokens_BT, positions_BT, longest


def read(
    params: Params, windows: list[list[int]], config: GPTConfig, num_slots: int
) -> tuple[KVCache, jax.Array]:
    """Read rows into a cache of that many slots, in which they end together; and the logits [B, V]
    of each row's next token.
    """
    tokens_BT, positions_BT, longest = pad(windows, config)
    with on_mesh(params):
        cache, logits_BV = _prefill(params, tokens_BT, positions_BT, longest, config)
        return _fit(cache, longest, num_slots), logits_BV


@functools.partial(jax.jit, static_argnames="config")
def _prefill(params, tokens_BT, positions_BT, longest, config: GPTConfig):
    # A slot for each token that is read: what follows needs more, but attention need not see them.
    cache = init_cache(config, *tokens_BT.shape)
    logits_BTV, cache = forward(
        params, tokens_BT, config, positions_BT=positions_BT, cache=cache, only=longest - 1
    )
    return cache, whole(logits_BTV[:, 0])


@functools.partial(jax.jit, static_argnames="num_slots")
def _fit(cache: KVCache, longest, num_slots: int) -> KVCache:
    """The first `longest` tokens of a cache, or as many of their last as there are slots, each in
    the slot where a decode step would have put it.
    """
    # The last token whose slot it is; before the first one there is none.
    place_S = longest - 1 - (longest - 1 - jnp.arange(num_slots)) % num_slots
    taken_S = jnp.clip(place_S, 0, cache.positions_BS.shape[1] - 1)
    k_LBKSH, v_LBKSH = jax.tree.map(
        lambda x_BKSH: jnp.take(x_BKSH, taken_S, axis=2), (cache.k_LBKSH, cache.v_LBKSH)
    )
    positions_BS = jnp.where(place_S >= 0, cache.positions_BS[:, taken_S], -1)
    return KVCache(k_LBKSH, v_LBKSH, positions_BS, jnp.int32(longest))


def select_rows(cache: KVCache, rows_B: jax.Array) -> KVCache:
    """The cache of these rows, in this order; a row may come more than once."""
    k_LBKSH, v_LBKSH, positions_BS = jax.tree.map(lambda x: x[rows_B], tuple(cache[:3]))
    return KVCache(k_LBKSH, v_LBKSH, positions_BS, cache.length)
