"""Beam search: the likeliest texts, several at a time."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ConfigError, GPTConfig
from gptjax.model import KVCache, Params, forward
from gptjax.prefill import num_slots, on_mesh, reach, read, select_rows
from gptjax.sampling import (
    Memory,
    Rules,
    Sampling,
    Values,
    penalise,
    remember,
    remember_prompts,
    settings,
)
from gptjax.sharding import whole

# A score that no text has: what it is given to cannot be chosen.
NEVER = -1e9


class Beam(NamedTuple):
    """A text that was found."""

    prompt: int  # its place among the prompts
    tokens: list[int]  # new ones, without an id that ended them
    ended: bool  # by an id
    score: float  # log-probability over length ** length_penalty


class Texts(NamedTuple):
    """Texts of each prompt, I of them."""

    tokens_BIS: jax.Array  # new tokens; -1 where there is none
    score_BI: jax.Array
    finished_BI: jax.Array


class Search(NamedTuple):
    """Where a search is: a value that every step takes and returns."""

    cache: KVCache  # of the running texts: those of one prompt next to each other
    memory: Memory
    logits_RV: jax.Array  # of what follows each running text
    running: Texts
    best: Texts  # those that have ended
    open_B: jax.Array  # whether a running text may still come among the best
    count: jax.Array


class Ending(NamedTuple):
    """The settings of when a search ends."""

    length_penalty: np.ndarray
    early: np.ndarray  # end with as many texts as beams
    never: np.ndarray  # end when no text of any length would be better


def search(
    params: Params,
    prompts: Sequence[Sequence[int]],
    config: GPTConfig,
    sampling: Sampling,
    ends: tuple[int, ...],
    known: int | None = None,
) -> list[Beam]:
    """The best `num_samples` texts that beam search finds for each prompt, best first.

    Its rules are those of Transformers: each step keeps the likeliest continuations that have not
    ended; one that has, and is among the likeliest `beams`, may come among the best.

    Args:
      params: as `prepare` gives them.
      prompts: ids, at least one each, of any lengths.
      config: the model.
      sampling: with `beams` above 1.
      ends: ids that end a text.
      known: ids from this on do not come.
    Raises:
      ConfigError: for texts that would not fit the context: a search does not slide.
    """
    lengths = [len(prompt) for prompt in prompts]
    rules, values = settings(sampling, lengths, ends, known)
    most, longest = int(values.most_B.max()), max(lengths)
    span = reach(config) or config.context_size
    if reach(config) is None and longest + most > span + 1:
        raise ConfigError(
            f"beams = {sampling.beams} with a prompt of {longest} tokens and {most} new ones: "
            f"together they must fit the context of {span}; give fewer, or beams 1"
        )
    if most == 0:
        return [
            Beam(i, [], False, 0.0)
            for i in range(len(prompts))
            for _ in range(sampling.num_samples)
        ]
    windows = [list(prompt)[-span:] for prompt in prompts]
    cache, logits_BV = read(
        params, windows, config, num_slots(config, max(map(len, windows)) + most)
    )
    size = 1 << max(longest + most - 1, 15).bit_length()
    text_BS = np.full((len(prompts), size), config.vocab_size, np.int32)
    for row, prompt in enumerate(prompts):
        text_BS[row, longest - len(prompt) : longest] = prompt
    ending = Ending(
        np.float32(sampling.length_penalty),
        np.bool_(sampling.early_stopping is True),
        np.bool_(sampling.early_stopping == "never"),
    )
    with on_mesh(params):
        best = jax.device_get(
            _search(
                params,
                cache,
                logits_BV,
                text_BS,
                longest,
                values,
                ending,
                config,
                rules,
                sampling.beams,
                1 << max(most - 1, 15).bit_length(),
            )
        )
    found = []
    for i in range(len(prompts)):
        for j in range(sampling.num_samples):
            tokens = [token for token in best.tokens_BIS[i, j].tolist() if token >= 0]
            ended = bool(tokens) and tokens[-1] in ends
            tokens = tokens[:-1] if ended else tokens
            found.append(Beam(i, tokens, ended, float(best.score_BI[i, j])))
    return found


@functools.partial(
    jax.jit,
    static_argnames=("config", "rules", "beams", "size"),
)
def _search(
    params, cache, logits_BV, text_BS, length, values, ending, config, rules, beams: int, size: int
) -> Texts:
    """The best texts of each prompt, [B, beams]."""
    B = len(logits_BV)
    rows_R = jnp.repeat(jnp.arange(B), beams)
    nothing = Texts(
        jnp.full((B, beams, size), -1, jnp.int32),
        jnp.full((B, beams), NEVER),
        jnp.zeros((B, beams), bool),
    )
    begun = Search(
        cache=select_rows(cache, rows_R),
        memory=remember_prompts(text_BS[rows_R], jnp.int32(length), config.vocab_size, rules),
        logits_RV=logits_BV[rows_R],
        # All begin alike: only the first goes on, or all would be the same for ever.
        running=nothing._replace(score_BI=jnp.full((B, beams), NEVER).at[:, 0].set(0)),
        best=nothing,
        open_B=jnp.ones(B, bool),
        count=jnp.int32(0),
    )

    def go_on(now: Search) -> jax.Array:
        full = now.best.finished_BI.all() & ending.early
        return now.open_B.any() & ~full

    def turn(now: Search) -> Search:
        now, rows_R, token_R = _choose(now, values, ending, rules, size)
        # What follows the last tokens is not needed.
        going = go_on(now)

        def ahead(cache: KVCache) -> tuple[KVCache, jax.Array]:
            cache = select_rows(cache, rows_R)
            logits_RTV, cache = forward(params, token_R[:, None], config, cache=cache)
            return cache, whole(logits_RTV[:, 0])

        cache, logits_RV = jax.lax.cond(going, ahead, lambda c: (c, now.logits_RV), now.cache)
        return now._replace(cache=cache, logits_RV=logits_RV)

    return jax.lax.while_loop(go_on, turn, begun).best


def _choose(
    now: Search, values: Values, ending: Ending, rules: Rules, size: int
) -> tuple[Search, jax.Array, jax.Array]:
    """The search with a token more in each running text; which text each goes on from; its token.

    Its cache and logits are still those of the texts before.
    """
    running, best, count = now.running, now.best, now.count
    B, beams = running.score_BI.shape
    logprobs_RV = penalise(
        jax.nn.log_softmax(now.logits_RV), now.memory, count, _of_beams(values, beams), rules
    )
    V = logprobs_RV.shape[1]
    score_BC = (running.score_BI[:, :, None] + logprobs_RV.reshape(B, beams, V)).reshape(B, -1)
    # Enough that as many as there are beams have not ended.
    kept = max(2, 1 + len(values.ends_E)) * beams
    score_BI, place_BI = jax.lax.top_k(score_BC, kept)
    from_BI, token_BI = place_BI // V, (place_BI % V).astype(jnp.int32)
    tokens_BIS = jnp.take_along_axis(running.tokens_BIS, from_BI[:, :, None], axis=1)
    tokens_BIS = jax.lax.dynamic_update_slice(tokens_BIS, token_BI[:, :, None], (0, 0, count))
    ended_BI = (token_BI[..., None] == values.ends_E).any(-1)
    ended_BI |= (count + 1 >= values.most_B)[:, None]

    # The texts that go on.
    next_score_BI, chosen_BI = jax.lax.top_k(score_BI + ended_BI * NEVER, beams)
    pick = functools.partial(jnp.take_along_axis, indices=chosen_BI, axis=1)
    running = Texts(
        jnp.take_along_axis(tokens_BIS, chosen_BI[:, :, None], axis=1),
        next_score_BI,
        running.finished_BI,
    )
    rows_R = (jnp.arange(B)[:, None] * beams + pick(from_BI)).reshape(-1)
    token_R = pick(token_BI).reshape(-1)

    # The texts that have ended.
    among_BI = ended_BI & (jnp.arange(kept) < beams)
    shut_B = (best.finished_BI.all(1) & ending.early) | ~now.open_B
    final_BI = score_BI / (count + 1).astype(jnp.float32) ** ending.length_penalty
    final_BI += shut_B[:, None] * NEVER + ~among_BI * NEVER
    merged = Texts(
        jnp.concatenate([best.tokens_BIS, tokens_BIS], axis=1),
        jnp.concatenate([best.score_BI, final_BI], axis=1),
        jnp.concatenate([best.finished_BI, among_BI], axis=1),
    )
    best_score_BI, best_BI = jax.lax.top_k(merged.score_BI, beams)
    best = Texts(
        jnp.take_along_axis(merged.tokens_BIS, best_BI[:, :, None], axis=1),
        best_score_BI,
        jnp.take_along_axis(merged.finished_BI, best_BI, axis=1),
    )

    # Whether the first running text, at the length that suits it, would be better than the worst.
    far = ending.never & (ending.length_penalty > 0)
    length_B = jnp.where(far, values.most_B, count + 1).astype(jnp.float32)
    hope_B = running.score_BI[:, 0] / length_B**ending.length_penalty
    worst_BI = jnp.where(best.finished_BI, best.score_BI.min(1, keepdims=True), NEVER)
    stuck_B = ended_BI.all(1)
    now = now._replace(
        memory=remember(_rows(now.memory, rows_R), token_R),
        running=running,
        best=best,
        open_B=now.open_B & (hope_B[:, None] > worst_BI).any(1) & ~stuck_B,
        count=count + 1,
    )
    return now, rows_R, token_R


def _of_beams(values: Values, beams: int) -> Values:
    """The values, with a row for each beam where they have one for each prompt."""
    return values._replace(
        most_B=jnp.repeat(values.most_B, beams), least_B=jnp.repeat(values.least_B, beams)
    )


def _rows(memory: Memory, rows_R: jax.Array) -> Memory:
    """The memory of these rows."""
    *states, length = memory
    return Memory(*(None if state is None else state[rows_R] for state in states), length)
