"""How the next token is chosen from its logits."""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Logits are summed in columns of this many, which a processor does at once.
LANES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a text goes on, and where it ends.

    The settings are those of Transformers' `generate`, in its order: penalties, n-grams, minimum
    length; then, unless `temperature` is 0, temperature, top_k, top_p, min_p and a draw. What they
    count are the tokens of the text, never padding.
    """

    max_tokens: int | None = None  # new tokens of each text; None: max_length says it, or 200
    max_length: int | None = None  # tokens of prompt and text together; max_tokens goes before it
    min_tokens: int = 0  # new tokens before which no text ends by an id
    min_length: int = 0  # tokens of prompt and text together, before which no text ends by an id
    temperature: float = 1.0  # logits are divided by it; 0 takes the likeliest token
    top_k: int | None = None  # choose among the k likeliest, and those as likely as the last
    # Choose among the fewest likeliest that hold this probability (Holtzman et al. 2020,
    # section 3.1).
    top_p: float | None = None
    min_p: float | None = None  # among those at least this share as likely as the likeliest
    # Logits of tokens in prompt or text are divided by it if positive, else multiplied (Keskar et
    # al. 2019, section 4.1); 1 changes nothing.
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # taken from the logits of tokens that the text has
    frequency_penalty: float = 0.0  # and this for each time that it has them
    no_repeat_ngram: int | None = None  # no sequence of this many tokens comes twice
    num_samples: int = 1  # texts of each prompt; with beams, the best ones
    stop: tuple[str, ...] = ()  # strings that end a text, which is cut before them
    stop_ids: tuple[int, ...] = ()  # ids that end a text, besides the tokenizer's end
    beams: int = 1  # above 1: beam search for the likeliest text; temperature must be 0
    # The sum of a text's log-probabilities is divided by its length to this power.
    length_penalty: float = 1.0
    # With beams, when a search ends: True, with as many texts as beams; False, when no beam of the
    # length it has would be better than the worst of these; "never", of any length.
    early_stopping: bool | Literal["never"] = False
    # Log-probabilities, of the model's own distribution, to return: None none, 0 those of the
    # chosen tokens, n also those of the n likeliest.
    logprobs: int | None = None
    # Tokens that a window gives up when a text has filled the context, and the rest of it is read
    # again; None: half of the context.
    stride: int | None = None

    def most(self, prompt: int) -> int:
        """New tokens that a prompt of this length may get."""
        if self.max_tokens is not None:
            return self.max_tokens
        return 200 if self.max_length is None else max(self.max_length - prompt, 0)

    def least(self, prompt: int) -> int:
        """New tokens that a prompt of this length must get, ids of an end being none."""
        return self.min_tokens or max(self.min_length - prompt, 0)


def violations(sampling: Sampling, vocab_size: int, context_size: int) -> Iterator[str]:
    """What is wrong with the settings: what was given, and what is allowed."""

    def must(name: str, right: bool, allowed: str) -> Iterator[str]:
        if not right:
            yield f"{name} = {getattr(sampling, name)}: give {allowed}"

    s, infinity = sampling, float("inf")
    for name in ("max_tokens", "max_length", "logprobs"):
        value = getattr(s, name)
        yield from must(name, value is None or value >= 0, "0 or more")
    for name in ("min_tokens", "min_length"):
        yield from must(name, getattr(s, name) >= 0, "0 or more")
    for name in ("top_k", "no_repeat_ngram"):
        value = getattr(s, name)
        yield from must(name, value is None or value >= 1, "1 or more")
    for name in ("num_samples", "beams"):
        yield from must(name, getattr(s, name) >= 1, "1 or more")
    fine = 0 <= s.temperature < infinity
    yield from must("temperature", fine, "0 (the likeliest token) or more")
    for name, value in (("top_p", s.top_p), ("min_p", s.min_p)):
        fine = value is None or 0 < value <= 1
        yield from must(name, fine, "more than 0 and at most 1")
    fine = 0 < s.repetition_penalty < infinity
    yield from must("repetition_penalty", fine, "more than 0; 1 changes nothing")
    for name in ("presence_penalty", "frequency_penalty", "length_penalty"):
        yield from must(name, abs(getattr(s, name)) < infinity, "a number; 0 changes nothing")
    fine = all(0 <= token < vocab_size for token in s.stop_ids)
    yield from must("stop_ids", fine, f"ids from 0 to {vocab_size - 1}")
    yield from must("stop", all(s.stop), "strings that are not empty")
    fine = s.stride is None or 1 <= s.stride < max(context_size, 2)
    yield from must("stride", fine, f"1 to {context_size - 1}, less than the context has")
    fine = s.early_stopping in (True, False, "never")
    yield from must("early_stopping", fine, "True, False or 'never'")
    if s.beams > 1 and s.temperature:
        yield f"beams = {s.beams} with temperature = {s.temperature}: beams want temperature 0"
    if s.beams > 1 and s.stop:
        yield f"beams = {s.beams} with stop = {s.stop}: give stop_ids, or beams 1"
    if s.beams > 1 and s.logprobs:
        yield f"beams = {s.beams} with logprobs = {s.logprobs}: give logprobs 0, or beams 1"
    if 1 < s.beams < s.num_samples:
        yield f"num_samples = {s.num_samples} with beams = {s.beams}: give at most {s.beams}"


# --- what is compiled, and what is not -----------------------------------------------------------


class Rules(NamedTuple):
    """The settings that are on: a program is compiled for these, and takes the values."""

    greedy: bool
    top_k: bool
    among: int  # so many of the likeliest have all that top_k leaves; 0: any number may
    top_p: bool
    min_p: bool
    repetition: bool
    counted: bool  # presence or frequency
    ngram: int
    least: bool  # a minimum length
    logprobs: int | None
    known: int | None  # ids from this on stand for nothing, and do not come


class Values(NamedTuple):
    """The values of the settings, on the device."""

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    repetition: np.ndarray
    presence: np.ndarray
    frequency: np.ndarray
    ends_E: np.ndarray  # ids that end a text
    most_B: np.ndarray  # new tokens of each row
    least_B: np.ndarray


class Memory(NamedTuple):
    """What the penalties count of each row; None for what no rule needs."""

    seen_BV: jax.Array | None  # tokens of prompt and text
    counts_BV: jax.Array | None  # how often the text has a token
    # Prompt and text, which end together at `length`; V where there is none.
    text_BS: jax.Array | None
    length: jax.Array


def settings(
    sampling: Sampling, lengths: list[int], ends: tuple[int, ...], known: int | None = None
) -> tuple[Rules, Values]:
    """The rules and the values, for rows whose prompts have these lengths.

    Args:
      known: the size of the tokenizer's vocabulary, where the model's is larger.
    """
    s = sampling
    least_B = np.array([s.least(length) for length in lengths], np.int32)
    rules = Rules(
        greedy=s.temperature == 0,
        top_k=s.top_k is not None,
        among=0 if s.top_k is None or s.top_k > 1024 else max(LANES, 1 << s.top_k.bit_length()),
        top_p=s.top_p is not None and s.top_p < 1,
        min_p=s.min_p is not None,
        repetition=s.repetition_penalty != 1,
        counted=bool(s.presence_penalty or s.frequency_penalty),
        ngram=s.no_repeat_ngram or 0,
        least=bool(least_B.any() and ends),
        logprobs=s.logprobs,
        known=known,
    )
    values = Values(
        temperature=np.float32(s.temperature),
        top_k=np.int32(min(s.top_k or 1, 2**31 - 1)),
        top_p=np.float32(s.top_p or 1),
        min_p=np.float32(s.min_p or 0),
        repetition=np.float32(s.repetition_penalty),
        presence=np.float32(s.presence_penalty),
        frequency=np.float32(s.frequency_penalty),
        ends_E=np.array(ends, np.int32),
        most_B=np.array([s.most(length) for length in lengths], np.int32),
        least_B=least_B,
    )
    return rules, values


def remember_prompts(
    text_BS: jax.Array, length: jax.Array, vocab_size: int, rules: Rules
) -> Memory:
    """The memory of rows that have no text yet."""
    B, seen_BV, counts_BV = len(text_BS), None, None
    if rules.repetition:
        rows = jnp.arange(B)[:, None]
        seen_BV = jnp.zeros((B, vocab_size), bool).at[rows, text_BS].set(True, mode="drop")
    if rules.counted:
        counts_BV = jnp.zeros((B, vocab_size), jnp.int32)
    return Memory(seen_BV, counts_BV, text_BS if rules.ngram else None, length)


def remember(memory: Memory, token_B: jax.Array) -> Memory:
    """The memory with a token more in each row."""
    seen_BV, counts_BV, text_BS, length = memory
    rows = jnp.arange(len(token_B))
    if seen_BV is not None:
        seen_BV = seen_BV.at[rows, token_B].set(True)
    if counts_BV is not None:
        counts_BV = counts_BV.at[rows, token_B].add(1)
    if text_BS is not None:
        text_BS = jax.lax.dynamic_update_slice(text_BS, token_B[:, None], (0, length))
    return Memory(seen_BV, counts_BV, text_BS, length + 1)


# --- from logits to a token ----------------------------------------------------------------------


def penalise(
    logits_BV: jax.Array, memory: Memory, count: jax.Array, values: Values, rules: Rules
) -> jax.Array:
    """The logits after penalties, and minus infinity for what must not come.

    Args:
      logits_BV: of the next token.
      memory: of the tokens before it.
      count: new tokens before it.
      values: of the settings.
      rules: the settings that are on.
    """
    if rules.repetition:
        weaker = jnp.where(
            logits_BV < 0, logits_BV * values.repetition, logits_BV / values.repetition
        )
        logits_BV = jnp.where(memory.seen_BV, weaker, logits_BV)
    if rules.counted:
        counts_BV = memory.counts_BV
        logits_BV -= values.frequency * counts_BV + values.presence * (counts_BV > 0)
    if rules.ngram:
        banned_BV = _completes_ngram(memory, logits_BV.shape[1], rules.ngram)
        logits_BV = jnp.where(banned_BV, -jnp.inf, logits_BV)
    if rules.least:
        early_B = count < values.least_B
        ended_BV = logits_BV.at[:, values.ends_E].set(-jnp.inf)
        logits_BV = jnp.where(early_B[:, None], ended_BV, logits_BV)
    if rules.known is not None:
        logits_BV = logits_BV.at[:, rules.known :].set(-jnp.inf)
    return logits_BV


def _completes_ngram(memory: Memory, vocab_size: int, size: int) -> jax.Array:
    """True for the tokens that would make the last `size` ones a sequence that was there before."""
    text_BS, length = memory.text_BS, memory.length
    B, S = text_BS.shape
    if size > S:
        return jnp.zeros((B, vocab_size), bool)
    starts = jnp.arange(S - size + 1)
    same_BS = jnp.broadcast_to(starts + size <= length, (B, S - size + 1))
    for i in range(size - 1):
        last_B1 = jax.lax.dynamic_slice_in_dim(text_BS, length - size + 1 + i, 1, axis=1)
        same_BS &= text_BS[:, i : i + len(starts)] == last_B1
    next_BS = jnp.where(same_BS, text_BS[:, size - 1 :], vocab_size)
    banned_BV = jnp.zeros((B, vocab_size), bool)
    banned_BV = banned_BV.at[jnp.arange(B)[:, None], next_BS].set(True, mode="drop")
    return banned_BV & (length >= size)


def choose_token(logits_BV: jax.Array, key_B: jax.Array, values: Values, rules: Rules) -> jax.Array:
    """Draw an id for each row [B] from its logits, with a key a row."""
    if rules.greedy:
        return logits_BV.argmax(-1).astype(jnp.int32)
    if not rules.among:
        return draw(weights_of(logits_BV, values, rules), key_B)
    # Of a few all that follows is quick.
    logits_BI, token_BI = jax.lax.top_k(logits_BV, min(rules.among, logits_BV.shape[1]))
    place_B = draw(weights_of(logits_BI, values, rules), key_B)
    return jnp.take_along_axis(token_BI, place_B[:, None], axis=1)[:, 0].astype(jnp.int32)


def weights_of(logits_BV: jax.Array, values: Values, rules: Rules) -> jax.Array:
    """Weights that tokens are drawn with, [B, V / LANES, LANES], rounded up; 0 for those that
    are left out. The likeliest has 1.
    """
    B, V = logits_BV.shape
    padding = ((0, 0), (0, -V % LANES))
    logits_BCM = jnp.pad(logits_BV, padding, constant_values=-jnp.inf).reshape(B, -1, LANES)
    most = logits_BCM.max(1, keepdims=True).max(2, keepdims=True)
    weights_BCM = jnp.exp((logits_BCM - most) / values.temperature)
    if rules.top_k:  # fewer than k are likelier
        order_BCM = _order(logits_BCM)
        weights_BCM = jnp.where(
            order_BCM
            >= _least(
                order_BCM, lambda t: (order_BCM > t).sum((1, 2), keepdims=True) < values.top_k
            ),
            weights_BCM,
            0,
        )
    if rules.top_p:  # those that are likelier hold less
        weights_BCM = jax.lax.optimization_barrier(weights_BCM)
        order_BCM, enough = _order(weights_BCM), values.top_p * _total(weights_BCM)
        weights_BCM = jnp.where(
            order_BCM
            >= _least(
                order_BCM, lambda t: _total(jnp.where(order_BCM > t, weights_BCM, 0)) < enough
            ),
            weights_BCM,
            0,
        )
    if rules.min_p:
        weights_BCM = jnp.where(weights_BCM >= values.min_p, weights_BCM, 0)
    return weights_BCM


def draw(weights_BCM: jax.Array, key_B: jax.Array) -> jax.Array:
    """An id for each row, with probabilities proportional to its weights: a column by their sums,
    and then one of it. So the weights are read once and no more, and two random numbers suffice.
    """
    random_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(key_B)
    column_B = _pick(weights_BCM.sum(1), random_B2[:, 0])
    weights_BC = jnp.take_along_axis(weights_BCM, column_B[:, None, None], axis=2)[..., 0]
    return (_pick(weights_BC, random_B2[:, 1]) * LANES + column_B).astype(jnp.int32)


def _pick(weights_BI: jax.Array, random_B: jax.Array) -> jax.Array:
    """The index at which the running sum of the weights passes that share of their total."""
    sums_BI = jnp.cumsum(weights_BI, axis=1)
    there_BI = weights_BI > 0  # what is left out is never drawn, however sums are rounded
    passed_BI = there_BI & (sums_BI > random_B[:, None] * sums_BI[:, -1:])
    last_B = jnp.where(there_BI, jnp.arange(weights_BI.shape[1]), 0).max(1)
    return jnp.where(passed_BI.any(1), passed_BI.argmax(1), last_B)


def _total(x_BCM: jax.Array) -> jax.Array:
    return x_BCM.sum(1, keepdims=True).sum(2, keepdims=True)


def _order(x: jax.Array) -> jax.Array:
    """Integers that are in the order of these float32 numbers."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _least(order_BCM: jax.Array, holds) -> jax.Array:
    """The least integer of each row, [B, 1, 1], from which on `holds` is true; it is for the
    greatest of the row. Found by halving: 32 sums over a row are quicker than sorting it.
    """

    def halve(_, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their sum might not be an int32
        right = holds(middle)
        return jnp.where(right, low, middle), jnp.where(right, middle, high)

    least, most = order_BCM.min((1, 2), keepdims=True), order_BCM.max((1, 2), keepdims=True)
    return jax.lax.fori_loop(0, 32, halve, (least - 1, most))[1]
