"""Continuing prompts: token after token, all at once or as a stream."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.beams import search
from gptjax.config import GPTConfig
from gptjax.data import Batch
from gptjax.model import KVCache, Params, forward, token_losses
from gptjax.prefill import num_slots, on_mesh, prepare, reach, read, refuse_prompts, select_rows
from gptjax.sampling import (
    Memory,
    Rules,
    Sampling,
    Values,
    choose_token,
    penalise,
    remember,
    remember_prompts,
    settings,
)
from gptjax.sharding import whole
from gptjax.tokenizer import StreamDecoder, Tokenizer

# New tokens between two looks for a stop string: those after it were for nothing.
LOOK_EVERY = 16


class Completion(NamedTuple):
    """How a prompt went on."""

    prompt: int  # its place among the prompts
    # New ones, without an id that ended them; with those of a stop string, and what came with it.
    tokens: list[int]
    reason: str  # why it ended: "end" for an id, "stop" for a string, "length"
    text: str | None  # of the tokens, cut before a stop string; None without a tokenizer
    score: float | None  # of a beam: log-probability over length ** length_penalty
    logprobs: list[float] | None  # of each token, in nats, if asked for
    top: list[list[tuple[int, float]]] | None  # the likeliest at each place, if asked for


class Score(NamedTuple):
    """How likely a continuation is after its prompt, in nats."""

    total: float  # of all its tokens
    logprobs: list[float]  # of each token


def generate(
    params: Params,
    prompts: Sequence[Sequence[int]],
    config: GPTConfig,
    sampling: Sampling,
    key: jax.Array,
    *,
    end: int | None,
    tokenizer: Tokenizer | None = None,
) -> list[list[int]]:
    """Continue every prompt, all in one batch, each as if it were alone.

    Text may grow beyond the context: a row that has filled it gives up its first `stride` tokens,
    and what is left is read again. Where every layer has a window and positions are RoPE, nothing
    is read again and nothing given up: the cache is a ring, and prompts may be longer than the
    context.

    Args:
      params: of the model, or as `prepare` gives them; on any mesh.
      prompts: ids, at least one each, of any lengths; of a long one the last `context_size` are
        read.
      config: the model.
      sampling: how tokens are chosen. Sample j of prompt i draws from `fold_in(fold_in(key, i),
        j)`, whatever the other rows are.
      key: of the draws.
      end: the id that ends a row; it is not returned. None: rows end as `sampling` says.
      tokenizer: for stop strings, and where its vocabulary is smaller than the model's, as one
        that was padded: ids that it does not have are never chosen.
    Returns:
      the new ids of each sample of each prompt, the samples of one prompt next to each other. Of a
      row with a stop string, the id that completed it is the last.
    Raises:
      ConfigError: for an empty prompt, an id outside the vocabulary, or settings outside their
        range; all of them at once.
    """
    completions = complete(params, prompts, config, sampling, key, end=end, tokenizer=tokenizer)
    return [completion.tokens for completion in completions]


def complete(
    params: Params,
    prompts: Sequence[Sequence[int]],
    config: GPTConfig,
    sampling: Sampling,
    key: jax.Array,
    *,
    end: int | None,
    tokenizer: Tokenizer | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Completion]:
    """As `generate`, with all there is to know of each row.

    Args:
      numbers: of the prompts, by which they draw, whichever batch they come in; None: 0, 1, 2, ...
    """
    ends = _check(prompts, config, sampling, end, tokenizer)
    params = prepare(params, config)
    if sampling.beams > 1:
        return _complete_beams(params, prompts, config, sampling, ends, tokenizer)
    known = known_ids(config, tokenizer)
    work = _Work(params, prompts, config, sampling, key, ends, known, numbers)
    rows = [_Row(work.most[i], ends, sampling, tokenizer) for i in range(len(work.texts))]
    ahead = LOOK_EVERY if sampling.stop else max(work.most, default=0)
    for chosen in work.chunks(ahead):
        for i, row in enumerate(rows):
            row.take(jax.tree.map(lambda x, i=i: x[i], chosen))
            work.done_B[i] |= row.reason is not None
    return [row.completion(i // sampling.num_samples) for i, row in enumerate(rows)]


def stream(
    params: Params,
    prompt: Sequence[int],
    config: GPTConfig,
    sampling: Sampling,
    key: jax.Array,
    *,
    end: int | None,
    tokenizer: Tokenizer | None = None,
) -> Iterator[int]:
    """The tokens that `generate` returns for this prompt alone, each as soon as it is chosen.

    Closing the iterator stops it at the next token and frees its cache. Its arguments are those of
    `generate`, for one sample and no beams.
    """
    for token, _ in _stream(params, prompt, config, sampling, key, end, tokenizer):
        yield token


def stream_text(
    params: Params,
    prompt: Sequence[int],
    config: GPTConfig,
    sampling: Sampling,
    key: jax.Array,
    *,
    end: int | None,
    tokenizer: Tokenizer,
    sample: int = 0,
) -> Iterator[str]:
    """The text that `complete` returns for this prompt alone, as it comes: whole characters, and
    nothing that may be the beginning of a stop string. See `stream`.

    Args:
      sample: which of the prompt's samples it is.
    """
    shown = 0
    for _, row in _stream(params, prompt, config, sampling, key, end, tokenizer, sample):
        if len(row.text) - row.held > shown:
            yield row.text[shown : len(row.text) - row.held]
            shown = len(row.text) - row.held
    if row_text := row.final_text()[shown:]:
        yield row_text


def _stream(
    params, prompt, config, sampling, key, end, tokenizer, sample: int = 0
) -> Iterator[tuple[int, "_Row"]]:
    """Each token of one row, and the row with it."""
    problems = []
    if sampling.num_samples > 1 or sampling.beams > 1:
        problems.append(
            f"num_samples = {sampling.num_samples} and beams = {sampling.beams}: "
            "a stream has one sample and one beam"
        )
    ends = _check([prompt], config, sampling, end, tokenizer, *problems)
    known = known_ids(config, tokenizer)
    params = prepare(params, config)
    work = _Work(params, [prompt], config, sampling, key, ends, known, first_sample=sample)
    row = _Row(work.most[0], ends, sampling, tokenizer)
    for chosen in work.chunks(1):
        before = len(row.tokens)
        row.take(jax.tree.map(lambda x: x[0], chosen))
        work.done_B[0] = row.reason is not None
        for token in row.tokens[before:]:
            yield token, row


def next_token_logits(params: Params, prompt: Sequence[int], config: GPTConfig) -> np.ndarray:
    """Logits [vocab_size], float32, of the token after a prompt, of which the last `context_size`
    ids are read.
    """
    refuse_prompts([prompt], config, Sampling())
    window = list(prompt)[-(reach(config) or config.context_size) :]
    _, logits_BV = read(params, [window], config, num_slots(config, len(window)))
    return np.asarray(logits_BV[0])


def score(
    params: Params,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    config: GPTConfig,
) -> list[Score]:
    """How likely the model thinks each continuation is after its prompt.

    Args:
      params: of the model, or as `prepare` gives them; on any mesh.
      prompts: ids, at least one each, of any lengths.
      continuations: ids, one continuation for each prompt. Where both are longer than the context,
        the prompt gives up its first tokens.
      config: the model.
    Raises:
      ConfigError: for an empty prompt, an id outside the vocabulary, or a continuation that leaves
        the context no token of its prompt.
    """
    problems = []
    if len(prompts) != len(continuations):
        problems.append(
            f"{len(prompts)} prompts, but {len(continuations)} continuations: give one for each"
        )
    for row, ids in enumerate(continuations):
        if len(ids) and not 0 <= min(ids) <= max(ids) < config.vocab_size:
            problems.append(
                f"continuation {row} holds ids from {min(ids)} to {max(ids)}: "
                f"the vocabulary has 0 to {config.vocab_size - 1}"
            )
        if len(ids) > config.context_size:
            problems.append(
                f"continuation {row} has {len(ids)} ids, and the context {config.context_size}: "
                "give a shorter one"
            )
    refuse_prompts(prompts, config, Sampling(), *problems)
    texts = [
        [*prompt, *ids][-(config.context_size + 1) :]
        for prompt, ids in zip(prompts, continuations, strict=True)
    ]
    size = min(1 << max(max(map(len, texts)) - 2, 15).bit_length(), config.context_size)
    tokens_BT = np.zeros((2, len(texts), size), np.int32)
    for row, text in enumerate(texts):
        tokens_BT[:, row, : len(text) - 1] = text[:-1], text[1:]
    with on_mesh(params):
        losses_BT = np.asarray(_losses(params, *tokens_BT, config))
    scores = []
    for losses, text, ids in zip(losses_BT, texts, continuations, strict=True):
        logprobs = -losses[len(text) - 1 - len(ids) : len(text) - 1]
        scores.append(Score(float(logprobs.sum(dtype=np.float64)), logprobs.tolist()))
    return scores


@functools.partial(jax.jit, static_argnames="config")
def _losses(params, tokens_BT, targets_BT, config: GPTConfig) -> jax.Array:
    one_BT = jnp.ones_like(tokens_BT)
    places_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    batch = Batch(tokens_BT, targets_BT, one_BT.astype(jnp.float32), one_BT, places_BT)
    return whole(token_losses(params, batch, config))


# --- rows, as they come from the device ----------------------------------------------------------


class Chosen(NamedTuple):
    """Tokens of each row, [B] or [B, T], and the log-probabilities that were asked for."""

    token: Any
    logprob: Any
    top: Any
    top_logprob: Any


class _Row:
    """What a row has so far, and whether it has ended."""

    def __init__(
        self, most: int, ends: tuple[int, ...], sampling: Sampling, tokenizer: Tokenizer | None
    ):
        self.tokens: list[int] = []
        self.text = ""
        self.held = 0  # characters at the end of the text that may begin a stop string
        self.reason = "length" if most == 0 else None
        self._most, self._ends, self._sampling = most, ends, sampling
        self._logprobs, self._top = [], []
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None

    def take(self, chosen: Chosen) -> None:
        """Go on with these tokens, as far as the row goes."""
        for i, token in enumerate(chosen.token.tolist()):
            if self.reason:
                return
            if token in self._ends:
                self.reason = "end"
                return
            self.tokens.append(token)
            if chosen.logprob is not None:
                self._logprobs.append(float(chosen.logprob[i]))
            if chosen.top is not None:
                pairs = zip(chosen.top[i].tolist(), chosen.top_logprob[i].tolist(), strict=True)
                self._top.append(list(pairs))
            if self._decoder:
                self._read(self._decoder.push(token))
            if self.reason is None and len(self.tokens) == self._most:
                self.reason = "length"

    def _read(self, new: str) -> None:
        """Add to the text, and look for a stop string that ends in what is new."""
        stops, before = self._sampling.stop, len(self.text)
        self.text += new
        found = [
            place
            for stop in stops
            if (place := self.text.find(stop, max(before - len(stop) + 1, 0))) >= 0
        ]
        if found:
            self.text, self.held, self.reason = self.text[: min(found)], 0, "stop"
            return
        self.held = max(
            (
                size
                for stop in stops
                for size in range(1, len(stop))
                if self.text.endswith(stop[:size])
            ),
            default=0,
        )

    def final_text(self) -> str:
        """The text of a row that has ended."""
        return self.text if self.reason == "stop" else self.text + self._decoder.flush()

    def completion(self, prompt: int) -> Completion:
        asked = self._sampling.logprobs
        return Completion(
            prompt=prompt,
            tokens=self.tokens,
            reason=self.reason,
            text=self.final_text() if self._decoder else None,
            score=None,
            logprobs=None if asked is None else self._logprobs,
            top=self._top if asked else None,
        )


def _check(prompts, config, sampling, end, tokenizer, *problems: str) -> tuple[int, ...]:
    """The ids that end a row, if nothing is wrong."""
    problems = list(problems)
    if sampling.stop and tokenizer is None:
        problems.append(f"stop = {sampling.stop}: strings need a tokenizer; give it, or stop_ids")
    if end is not None and not 0 <= end < config.vocab_size:
        problems.append(f"end = {end}: give an id from 0 to {config.vocab_size - 1}, or None")
    refuse_prompts(prompts, config, sampling, *problems)
    return tuple(dict.fromkeys([*([] if end is None else [end]), *sampling.stop_ids]))


def known_ids(config: GPTConfig, tokenizer: Tokenizer | None) -> int | None:
    """How many ids a tokenizer has, if that is less than the model's vocabulary."""
    if tokenizer is None or tokenizer.vocab_size >= config.vocab_size:
        return None
    return tokenizer.vocab_size


def _complete_beams(params, prompts, config, sampling, ends, tokenizer) -> list[Completion]:
    known = known_ids(config, tokenizer)
    found = search(params, prompts, config, sampling, ends, known)
    scores = [None] * len(found)
    if sampling.logprobs is not None:
        given = [prompts[beam.prompt] for beam in found]
        scores = [one.logprobs for one in score(params, given, [b.tokens for b in found], config)]
    return [
        Completion(
            prompt=beam.prompt,
            tokens=beam.tokens,
            reason="end" if beam.ended else "length",
            text=tokenizer.decode(beam.tokens) if tokenizer else None,
            score=beam.score,
            logprobs=logprobs,
            top=None,
        )
        for beam, logprobs in zip(found, scores, strict=True)
    ]


# --- the work on the device ----------------------------------------------------------------------


class Progress(NamedTuple):
    """Where rows are: a value that every step takes and returns."""

    token_B: jax.Array  # the last one
    count: jax.Array  # new tokens of each row
    memory: Memory
    key_B: jax.Array


class _Work:
    """Rows that are continued together: their texts here, the rest on the device."""

    def __init__(
        self, params, prompts, config, sampling, key, ends, known, numbers=None, first_sample=0
    ):
        self.params, self.config, self.sampling = params, config, sampling
        self.texts = [list(prompt) for prompt in prompts for _ in range(sampling.num_samples)]
        lengths = [len(text) for text in self.texts]
        self.most = [sampling.most(length) for length in lengths]
        self.rules, self.values = settings(sampling, lengths, ends, known)
        self.done_B = np.array([most == 0 for most in self.most])  # the caller adds to them
        self._span = reach(config) or config.context_size  # tokens of a text that are read
        self._starts = [0] * len(self.texts)  # of what is read of each
        longest, most = max(lengths), max(self.most)
        self._num_slots = num_slots(config, min(longest, self._span) + most)
        text_BS = np.full((len(lengths), _size(longest + most)), config.vocab_size, np.int32)
        for row, text in enumerate(self.texts):
            text_BS[row, longest - len(text) : longest] = text
        rows, samples = np.divmod(np.arange(len(lengths)), sampling.num_samples)
        rows = rows if numbers is None else np.asarray(numbers)[rows]
        samples += first_sample
        with on_mesh(params):
            self._progress = _begin(key, rows, samples, text_BS, longest, config, self.rules)

    def chunks(self, ahead: int) -> Iterator[Chosen]:
        """New tokens of all rows, [B, n], n at most `ahead`, until each row is done."""
        left = max(self.most)
        while left > 0 and not self.done_B.all():
            cache, chosen, free = self._read()
            while True:
                left -= chosen.token.shape[1]
                steps = min(ahead, free, left)
                following = None
                if ahead == 1 and steps:  # the device goes on while this token is looked at
                    following = self._decode(cache, steps, ahead)
                chosen = jax.device_get(chosen)
                for text, new in zip(self.texts, chosen.token.tolist(), strict=True):
                    text.extend(new)
                yield chosen
                if steps == 0 or self.done_B.all():
                    break
                cache, chosen = following or self._decode(cache, steps, ahead)
                free -= chosen.token.shape[1]

    def _read(self) -> tuple[KVCache, Chosen, int]:
        """A cache of the texts, or of what the context has room for; the next tokens; and how many
        steps may follow.
        """
        context, samples = self.config.context_size, self.sampling.num_samples
        kept = max(context - (self.sampling.stride or context - context // 2), 1)
        rolls = reach(self.config) is not None
        begun = int(self._progress.count) > 0
        for i, text in enumerate(self.texts):
            # By a row's own length only, so that it goes as it would alone.
            if len(text) - self._starts[i] > self._span:
                self._starts[i] = len(text) - (kept if begun else self._span)
        windows = [text[i:] for text, i in zip(self.texts, self._starts, strict=True)]
        if not begun:  # the samples of a prompt begin alike
            windows = windows[::samples]
        cache, logits_BV = read(self.params, windows, self.config, self._num_slots)
        with on_mesh(self.params):
            if samples > 1 and not begun:
                cache, logits_BV = _repeat(cache, logits_BV, samples)
            self._progress, chosen = _first(logits_BV, self._progress, self.values, self.rules)
        longest = max(map(len, windows))
        return cache, chosen, max(self.most) if rolls else context - longest

    def _decode(self, cache: KVCache, steps: int, ahead: int) -> tuple[KVCache, Chosen]:
        """At most that many steps: the cache, and what they chose."""
        size = 1 if ahead == 1 else _size(ahead)
        with on_mesh(self.params):
            cache, self._progress, chosen, count = _decode(
                self.params,
                cache,
                self._progress,
                self.done_B,
                steps,
                self.values,
                self.config,
                self.rules,
                size,
            )
        if ahead > 1:
            chosen = jax.tree.map(lambda x, n=int(count): np.asarray(x)[:, :n], chosen)
        return cache, chosen


def _size(tokens: int) -> int:
    """One of a few sizes that many tokens fit in, so that little is compiled."""
    return 1 << max(tokens - 1, 15).bit_length()


@functools.partial(jax.jit, static_argnames=("config", "rules"))
def _begin(key, rows_B, samples_B, text_BS, length, config: GPTConfig, rules: Rules) -> Progress:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows_B)
    return Progress(
        token_B=jnp.zeros(len(text_BS), jnp.int32),
        count=jnp.int32(0),
        memory=remember_prompts(text_BS, jnp.int32(length), config.vocab_size, rules),
        key_B=jax.vmap(jax.random.fold_in)(keys, samples_B),
    )


@functools.partial(jax.jit, static_argnums=2)
def _repeat(cache: KVCache, logits_BV: jax.Array, times: int) -> tuple[KVCache, jax.Array]:
    rows_B = jnp.repeat(jnp.arange(len(logits_BV)), times)
    return select_rows(cache, rows_B), logits_BV[rows_B]


@functools.partial(jax.jit, static_argnames="rules", donate_argnames="progress")
def _first(logits_BV, progress: Progress, values: Values, rules: Rules):
    progress, chosen = _take(logits_BV, progress, values, rules)
    return progress, jax.tree.map(lambda x: x[:, None], chosen)


def _take(
    logits_BV: jax.Array, progress: Progress, values: Values, rules: Rules
) -> tuple[Progress, Chosen]:
    """Choose a token for each row, and remember it."""
    _, count, memory, key_B = progress
    logprob_B = top_BI = top_logprob_BI = None
    scores_BV = penalise(logits_BV, memory, count, values, rules)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, count)
    token_B = whole(choose_token(scores_BV, keys_B, values, rules))
    if rules.logprobs is not None:
        logprobs_BV = jax.nn.log_softmax(logits_BV)
        logprob_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=1)[:, 0]
        if rules.logprobs:
            most = min(rules.logprobs, logprobs_BV.shape[1])
            top_logprob_BI, top_BI = jax.lax.top_k(logprobs_BV, most)
    chosen = Chosen(token_B, logprob_B, top_BI, top_logprob_BI)
    return Progress(token_B, count + 1, remember(memory, token_B), key_B), chosen


@functools.partial(
    jax.jit,
    static_argnames=("config", "rules", "size"),
    donate_argnames=("cache", "progress"),
)
def _decode(params, cache, progress, done_B, steps, values, config, rules, size: int):
    """At most `steps` tokens of each row, fewer if all rows are done: the cache, the progress,
    what was chosen, [B, size], and its number.
    """

    def step(cache: KVCache, progress: Progress):
        logits_BTV, cache = forward(params, progress.token_B[:, None], config, cache=cache)
        progress, chosen = _take(whole(logits_BTV[:, 0]), progress, values, rules)
        return cache, progress, chosen

    def go_on(carry: tuple) -> jax.Array:
        _, _, done_B, _, i = carry
        return (i < steps) & ~done_B.all()

    def turn(carry: tuple) -> tuple:
        cache, progress, done_B, all_chosen, i = carry
        cache, progress, chosen = step(cache, progress)
        all_chosen = jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, axis=1),
            all_chosen,
            chosen,
        )
        ended_B = (chosen.token[:, None] == values.ends_E).any(1)
        done_B |= ended_B | (progress.count >= values.most_B)
        return cache, progress, done_B, all_chosen, i + 1

    shapes = jax.eval_shape(step, cache, progress)[2]
    nothing = jax.tree.map(lambda x: jnp.zeros((len(done_B), size, *x.shape[1:]), x.dtype), shapes)
    carry = (cache, progress, done_B, nothing, jnp.int32(0))
    cache, progress, _, all_chosen, count = jax.lax.while_loop(go_on, turn, carry)
    return cache, progress, all_chosen, count
