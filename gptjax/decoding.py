"""Continuing prompts: prefill them into a cache, decode token after token, all at once or as a
stream.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from gptjax.config import ConfigError, GPTConfig
from gptjax.model import KVCache, Params, forward, init_cache
from gptjax.sampling import Sampling, choose_token
from gptjax.sharding import whole


def generate(
    params: Params,
    prompts: Sequence[Sequence[int]],
    config: GPTConfig,
    sampling: Sampling,
    key: jax.Array,
    *,
    end: int | None,
) -> list[list[int]]:
    """Continue every prompt, all in one batch, each as if it were alone.

    Text may grow beyond the context: a row that has filled it goes on with its last half as a new
    context.

    Args:
      params: of the model; on any mesh.
      prompts: ids, at least one each, of any lengths; of a long one the last `context_size` are
        read.
      config: the model.
      sampling: how tokens are chosen. Row i draws from `fold_in(key, i)`, whatever the other rows
        are.
      key: of the draws.
      end: the id that ends a row; it is not returned. None: rows end at max_tokens only.
    Returns:
      the new ids of each prompt.
    Raises:
      ConfigError: for an empty prompt, an id outside the vocabulary, or a setting outside its
        range.
    """
    chunks = list(_chunks(params, prompts, config, sampling, key, end, ahead=config.context_size))
    rows = np.concatenate(chunks, axis=1).tolist() if chunks else [[] for _ in prompts]
    return [row[: row.index(end)] if end in row else row for row in rows]


def stream(
    params: Params,
    prompt: Sequence[int],
    config: GPTConfig,
    sampling: Sampling,
    key: jax.Array,
    *,
    end: int | None,
) -> Iterator[int]:
    """The tokens that `generate` returns for this prompt alone, each as soon as it is chosen."""
    for chunk_BT in _chunks(params, [prompt], config, sampling, key, end, ahead=1):
        for token in chunk_BT[0].tolist():
            if token == end:
                return
            yield token


def next_token_logits(params: Params, prompt: Sequence[int], config: GPTConfig) -> np.ndarray:
    """Logits [vocab_size], float32, of the token after a prompt, of which the last `context_size`
    ids are read.
    """
    _check([prompt], config, Sampling())
    tokens_BT, positions_BT, longest = _pad([list(prompt)[-config.context_size :]], config)
    with _mesh(params):
        _, logits_BV = _prefill(params, tokens_BT, positions_BT, longest, config)
    return np.asarray(logits_BV[0])


# --- chunks of new tokens ------------------------------------------------------------------------


def _chunks(params, prompts, config, sampling, key, end, *, ahead: int) -> Iterator[np.ndarray]:
    """New tokens of all rows, [B, n], n at most `ahead`, until each row has ended or has
    max_tokens.
    """
    _check(prompts, config, sampling)
    context, left = config.context_size, sampling.max_tokens
    texts = [list(prompt) for prompt in prompts]
    starts = [
        max(0, len(text) - context) for text in texts
    ]  # of the window on each text that the model reads
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(texts)))
    done_B = np.zeros(len(texts), bool)
    while left > 0 and not done_B.all():
        for i, text in enumerate(
            texts
        ):  # by a row's own length only, so that it goes as it would alone
            if len(text) - starts[i] > context:
                starts[i] = len(text) - max(context // 2, 1)
        tokens_BT, positions_BT, longest = _pad(
            [text[start:] for text, start in zip(texts, starts, strict=True)], config
        )
        written = sampling.max_tokens - left
        with _mesh(params):
            cache, logits_BV = _prefill(params, tokens_BT, positions_BT, longest, config)
            token_B = _first(logits_BV, key_B, written, sampling)
        chunk_BT, free = np.asarray(token_B)[:, None], context - longest
        while True:
            for text, new in zip(texts, chunk_BT.tolist(), strict=True):
                text.extend(new)
            done_B |= (chunk_BT == end).any(axis=1)
            left -= chunk_BT.shape[1]
            yield chunk_BT
            steps = min(ahead, free, left)
            if steps == 0 or done_B.all():
                break
            written = sampling.max_tokens - left
            with _mesh(params):
                cache, token_B, new_BT, count = _decode(
                    params,
                    cache,
                    token_B,
                    done_B,
                    key_B,
                    written,
                    steps,
                    config,
                    sampling,
                    end,
                    ahead,
                )
            chunk_BT = np.asarray(new_BT)[:, : int(count)]
            free -= chunk_BT.shape[1]


def _pad(windows: list[list[int]], config: GPTConfig) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows that end together at the longest one's length, padded to one of a few lengths, so that
    little is compiled.

    Returns:
      tokens_BT; positions_BT, -1 at padding; and the longest row's length.
    """
    longest = max(len(window) for window in windows)
    size = min(1 << max(longest - 1, 15).bit_length(), config.context_size)
    tokens_BT = np.zeros((len(windows), size), np.int32)
    positions_BT = np.full((len(windows), size), -1, np.int32)
    for row, window in enumerate(windows):
        tokens_BT[row, longest - len(window) : longest] = window
        positions_BT[row, longest - len(window) : longest] = np.arange(len(window))
    return tokens_BT, positions_BT, longest


@functools.partial(jax.jit, static_argnames="config")
def _prefill(
    params, tokens_BT, positions_BT, longest, config: GPTConfig
) -> tuple[KVCache, jax.Array]:
    """Read the prompts into a cache of `context_size` slots; the logits of each row's next
    token.
    """
    cache = init_cache(config, len(tokens_BT), config.context_size)
    logits_BTV, cache = forward(
        params, tokens_BT, config, positions_BT=positions_BT, cache=cache, only=longest - 1
    )
    # Slots of padding after the prompts are free again: the next token goes there.
    return cache._replace(length=jnp.int32(longest)), whole(logits_BTV[:, 0])


@functools.partial(jax.jit, static_argnames="sampling")
def _first(logits_BV: jax.Array, key_B: jax.Array, written, sampling: Sampling) -> jax.Array:
    return choose_token(
        logits_BV, jax.vmap(jax.random.fold_in, (0, None))(key_B, written), sampling
    )


@functools.partial(
    jax.jit, static_argnames=("config", "sampling", "end", "size"), donate_argnames="cache"
)
def _decode(
    params,
    cache,
    token_B,
    done_B,
    key_B,
    written,
    steps,
    config,
    sampling: Sampling,
    end,
    size: int,
):
    """At most `steps` tokens after `token_B`, fewer if all rows end: the cache, the last token,
    [B, size] and their number.
    """

    def go_on(carry: tuple) -> jax.Array:
        _, _, done_B, _, count = carry
        return (count < steps) & ~done_B.all()

    def step(carry: tuple) -> tuple:
        cache, token_B, done_B, new_BT, count = carry
        logits_BTV, cache = forward(params, token_B[:, None], config, cache=cache)
        token_B = whole(_first(logits_BTV[:, 0], key_B, written + count, sampling))
        new_BT = jax.lax.dynamic_update_slice(new_BT, token_B[:, None], (0, count))
        return (
            cache,
            token_B,
            done_B if end is None else done_B | (token_B == end),
            new_BT,
            count + 1,
        )

    new_BT = jnp.zeros((len(token_B), size), jnp.int32)
    cache, token_B, _, new_BT, count = jax.lax.while_loop(
        go_on, step, (cache, token_B, done_B, new_BT, jnp.int32(0))
    )
    return cache, token_B, new_BT, count


def _mesh(params: Params) -> contextlib.AbstractContextManager:
    """The mesh that the parameters lie on, set; or nothing."""
    sharding = jax.tree.leaves(params)[0].sharding
    return (
        jax.set_mesh(sharding.mesh)
        if isinstance(sharding, NamedSharding)
        else contextlib.nullcontext()
    )


def _check(prompts: Sequence[Sequence[int]], config: GPTConfig, sampling: Sampling) -> None:
    problems = []
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
    if sampling.max_tokens < 0:
        problems.append(f"max_tokens = {sampling.max_tokens}: give 0 or more")
    if not 0 <= sampling.temperature < float("inf"):
        problems.append(
            f"temperature = {sampling.temperature}: give 0 (the likeliest token) or more"
        )
    if sampling.top_k is not None and sampling.top_k < 1:
        problems.append(f"top_k = {sampling.top_k}: give 1 or more")
    if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
        problems.append(f"top_p = {sampling.top_p}: give more than 0 and at most 1")
    if problems:
        raise ConfigError("; ".join(problems))
