"""Tasks that a language model is asked in words: choices that it scores, texts that it writes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.config import ConfigError, GPTConfig
from gptjax.decoding import complete, score
from gptjax.model import Params
from gptjax.sampling import Sampling
from gptjax.tasks import Prediction, Task
from gptjax.tasks.prompts import BETWEEN, choice_scores, shots_of, with_shots
from gptjax.tasks.task import going_on
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

    predictions: list[Prediction]
    shots: float  # that came before, on average: fewer than asked for where they did not fit


def ask(
    model: Model, task: Task, examples: Sequence[Any], training: Sequence[Any], how: Asking
) -> Answers:
    """What a language model says of every example.

    Args:
      training: examples that shots are drawn from.
    Raises:
      ConfigError: if there are no examples for shots, or a prompt alone is too long.
    """
    if how.shots and not training:
        raise ConfigError(f"--shots {how.shots}: there are no training examples: give --task.train")
    if examples and task.requests(examples[0]):
        return _choose(model, task, examples, training, how)
    return _write(model, task, examples, training, how)


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
    return np.concatenate([[model.tokenizer.end], model.tokenizer.encode(text)]).astype(np.int32)


def _choose(
    model: Model, task: Task, examples: Sequence, training: Sequence, how: Asking
) -> Answers:
    asked: list[tuple[np.ndarray, np.ndarray]] = []
    bare: list[tuple[np.ndarray, np.ndarray]] = []
    counts, requests, shown = [], [], 0
    for number, example in enumerate(examples):
        each = task.requests(example)
        targets = [going_on(one.target, model.tokenizer) for one in each]
        room, prompts = max(map(len, targets)) + 1, {}
        for one, ids in zip(each, targets, strict=True):
            if one.prompt not in prompts:
                prompts[one.prompt] = _shown(model, task, number, one.prompt, room, training, how)
            asked.append((_ids(model, prompts[one.prompt][0]), ids))
            bare.append((_ids(model, one.bare), ids))
        shown += prompts[each[0].prompt][1]
        counts.append(len(each))
        requests += each
    rule = task.config.score
    nats = _nats(model, asked, how.batch_size)
    bare_nats = _nats(model, bare, how.batch_size) if rule == "unconditional" else None
    predictions, start = [], 0
    for example, count in zip(examples, counts, strict=True):
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
    return Answers(predictions, shown / len(examples))


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
    model: Model, task: Task, examples: Sequence, training: Sequence, how: Asking
) -> Answers:
    sampling = Sampling(
        max_tokens=how.max_tokens,
        temperature=how.temperature,
        beams=how.beams,
        stop=(BETWEEN,) if how.shots else (),
    )
    prompts, shown = [], 0
    for number, example in enumerate(examples):
        if task.name == "dialogue":
            prompts.append(task.prompt_ids(task.before(example), model.tokenizer))
            continue
        text, count = _shown(
            model, task, number, task.prompt(example), how.max_tokens, training, how
        )
        prompts.append(_ids(model, text))
        shown += count
    texts: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
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
    said = [task.from_text(example, texts[i]) for i, example in enumerate(examples)]
    return Answers(said, shown / max(len(examples), 1))
