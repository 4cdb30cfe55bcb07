"""Tasks that a language model is asked in words: choices that it scores, texts that it writes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.config import ConfigError, GPTConfig
from gptjax.decoding import complete, score
from gptjax.model import Params
from gptjax.prefill import reach
from gptjax.sampling import Sampling
from gptjax.tasks import Prediction, Problems, Task
from gptjax.tasks.prompts import BETWEEN, choice_scores, shots_of, with_shots
from gptjax.tasks.task import going_on, tell_too_long
from gptjax.tokenizer import Tokenizer


class Model(NamedTuple):
    """What is asked."""

    params: Params
    config: GPTConfig
    tokenizer: Tokenizer


class Asking(NamedTuple):
    """How a task is asked."""

    shots: int = 0  # training examples that come before, or as many of them as fit
    seed: int = 0  # of their draw, and of the tokens'
    batch_size: int = 16  # texts that are scored or written together
    max_tokens: int = 64  # of a text that is written
    beams: int = 1  # of such a text; above 1: the likeliest text that a search finds
    temperature: float = 0.0  # of its tokens; 0: always the likeliest one
    first: int = 0  # number of the first example, by which it draws


class Answers(NamedTuple):
    """What a model says of examples."""

    predictions: list[Prediction | None]  # None of one that is too long
    shots: float  # that came before, on average: fewer than asked for where they did not fit


def ask(
    model: Model,
    task: Task,
    examples: Sequence[Any],
    training: Sequence[Any],
    how: Asking,
    problems: Problems,
) -> Answers:
    """What a language model says of every example that its context holds.

    Args:
      training: examples that shots are drawn from.
      problems: told of examples that are too long. Of a dialogue the first messages are given up.
    Raises:
      ConfigError: if there are no examples for shots.
      DataError: if one is too long that is not to be left out.
    """
    if how.shots and not training:
        raise ConfigError(f"--shots {how.shots}: there are no training examples: give --task.train")
    if examples and task.requests(examples[0]):
        return _choose(model, task, examples, training, how, problems)
    return _write(model, task, examples, training, how, problems)


def _holds(model: Model, task: Task, example: Any, length: int, problems: Problems) -> bool:
    """Whether so many ids are read without giving up the first; if not, that is told."""
    size = model.config.context_size
    if length <= size or reach(model.config) is not None:
        return True
    tell_too_long(task.config, example.where, length, size, problems)
    return False


def _shown(
    model: Model, task: Task, number: int, prompt: str, room: int, training: Sequence, how: Asking
) -> tuple[str, int]:
    """A prompt with its shots, and how many there are; `room` tokens are for what comes after."""
    drawn = shots_of(number, len(training), how.shots, how.seed) if how.shots else []
    shots = [(task.prompt(training[one]), task.target(training[one])) for one in drawn]
    most = model.config.context_size - room
    return with_shots(shots, prompt, lambda text: len(_ids(model, text)) <= most)


def _ids(model: Model, text: str) -> np.ndarray:
    """The ids of a text that begins a document."""
    return np.concatenate([[model.tokenizer.begin], model.tokenizer.encode(text)]).astype(np.int32)


def _choose(
    model: Model,
    task: Task,
    examples: Sequence,
    training: Sequence,
    how: Asking,
    problems: Problems,
) -> Answers:
    asked: list[tuple[np.ndarray, np.ndarray]] = []
    bare: list[tuple[np.ndarray, np.ndarray]] = []
    counts, requests, shown = [], [], 0
    for number, example in enumerate(examples):
        each = task.requests(example)
        targets = [going_on(one.target, model.tokenizer) for one in each]
        room, prompts = max(map(len, targets)) + 1, {}
        for one in each:
            if one.prompt not in prompts:
                prompts[one.prompt] = _shown(model, task, number, one.prompt, room, training, how)
        texts = [
            (_ids(model, prompts[one.prompt][0]), ids)
            for one, ids in zip(each, targets, strict=True)
        ]
        # The last id of a continuation is not read.
        longest = max(len(before) + len(ids) - 1 for before, ids in texts)
        if not _holds(model, task, example, longest, problems):
            counts.append(0)
            continue
        asked += texts
        bare += [(_ids(model, one.bare), ids) for one, ids in zip(each, targets, strict=True)]
        shown += prompts[each[0].prompt][1]
        counts.append(len(each))
        requests += each
    problems.refuse()
    rule = task.config.score
    nats = _nats(model, asked, how.batch_size)
    bare_nats = _nats(model, bare, how.batch_size) if rule == "unconditional" else None
    predictions: list[Prediction | None] = []
    start = 0
    for example, count in zip(examples, counts, strict=True):
        if not count:
            predictions.append(None)
            continue
        here = slice(start, start + count)
        scores = choice_scores(
            rule,
            nats[here],
            num_tokens=[len(ids) for _, ids in asked[here]],
            num_bytes=[len(one.target.encode()) for one in requests[here]],
            bare_nats=None if bare_nats is None else bare_nats[here],
        )
        predictions.append(task.from_scores(example, scores))
        start += count
    return Answers(predictions, shown / max(len(counts) - counts.count(0), 1))


def _nats(
    model: Model, texts: Sequence[tuple[np.ndarray, np.ndarray]], batch_size: int
) -> np.ndarray:
    """The log-likelihood of each continuation. Batches are of one size and alike in length, so that
    little is compiled.
    """
    order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
    nats = np.zeros(len(texts))
    for start in range(0, len(order), batch_size):
        here = order[start : start + batch_size]
        rows = [*here, *here[-1:] * (batch_size - len(here))]
        prompts, said = zip(*(texts[i] for i in rows), strict=True)
        scores = score(model.params, prompts, said, model.config)
        nats[here] = [one.total for one in scores[: len(here)]]
    return nats


def _write(
    model: Model,
    task: Task,
    examples: Sequence,
    training: Sequence,
    how: Asking,
    problems: Problems,
) -> Answers:
    sampling = Sampling(
        max_tokens=how.max_tokens,
        temperature=how.temperature,
        beams=how.beams,
        stop=(BETWEEN,) if how.shots else (),
    )
    prompts: dict[int, np.ndarray] = {}
    shown = 0
    for number, example in enumerate(examples):
        if task.name == "dialogue":
            most = max(model.config.context_size - how.max_tokens, 1)
            ids, count = task.fitting_ids(task.before(example), model.tokenizer, most), 0
        else:
            prompt = task.prompt(example)
            text, count = _shown(model, task, number, prompt, how.max_tokens, training, how)
            ids = _ids(model, text)
        ahead = how.max_tokens if how.beams > 1 else 0  # beams do not go beyond the context
        if _holds(model, task, example, len(ids) + ahead, problems):
            prompts[number] = ids
            shown += count
    problems.refuse()
    texts: dict[int, str] = {}
    order = sorted(prompts, key=lambda i: len(prompts[i]))
    for start in range(0, len(order), how.batch_size):
        here = order[start : start + how.batch_size]
        completions = complete(
            model.params,
            [prompts[i].tolist() for i in here],
            model.config,
            sampling,
            jax.random.key(how.seed),
            end=model.tokenizer.end,
            tokenizer=model.tokenizer,
            numbers=[how.first + i for i in here],
        )
        texts |= {i: one.text for i, one in zip(here, completions, strict=True)}
    said = [
        task.from_text(example, texts[i]) if i in texts else None
        for i, example in enumerate(examples)
    ]
    return Answers(said, shown / max(len(prompts), 1))
