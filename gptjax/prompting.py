"""Tasks that a language model is asked in words: choices that it scores, texts that it writes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.config import Config, ConfigError, GPTConfig, refuse
from gptjax.decoding import complete, score
from gptjax.model import Params, resolve
from gptjax.prefill import reach
from gptjax.sampling import Sampling
from gptjax.tasks import Prediction, Problems, Task
from gptjax.tasks.dialogue import Dialogue
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
    # of a text that is written; None: half as many again as the longest right text has, or half of
    # the context if there is none
    max_tokens: int | None = None
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
    begin: Callable[[], bool] = lambda: True,
) -> Answers:
    """What a language model says of every example that its context holds.

    Args:
      training: examples that shots are drawn from.
      problems: told of examples that are too long. Of a dialogue the first messages are given up.
      begin: asked before each batch; False ends it, and nothing is said of any example.
    Raises:
      ConfigError: if there are no examples for shots.
      DataError: if one is too long that is not to be left out.
    """
    if how.shots and not training:
        raise ConfigError(f"--shots {how.shots}: there are no training examples: give --task.train")
    if how.max_tokens is None:
        how = how._replace(max_tokens=_usual_length(model, task, examples))
    asker = _Asker(model, task, training, how, problems, begin)
    refuse_idle(task, examples, how)
    if examples and task.requests(examples[0]):
        return asker.choose(examples)
    return asker.write(examples)


def say_at_end(
    params: Params,
    config: Config,
    task: Task,
    examples: Sequence[Any],
    tokenizer: Tokenizer,
    begin: Callable[[], bool],
) -> list[Prediction | None]:
    """What a language model writes for examples, or chooses: the likeliest token each time.

    Args:
      params: of the model alone.
      begin: asked before each batch; False ends it, and nothing is said of any example.
    """
    platform = jax.tree.leaves(params)[0].sharding.mesh.devices.flat[0].platform
    model = Model(params, resolve(config.model, platform)[0], tokenizer)
    how = Asking(batch_size=min(config.batch_size, 16))
    return ask(model, task, examples, (), how, Problems("skip", ""), begin).predictions


def refuse_idle(task: Task, examples: Sequence[Any], how: Asking, *, by_head: bool = False) -> None:
    """Refuse ways of asking that make no difference to a task.

    Args:
      examples: of the task; the first says whether it has choices.
      by_head: whether a head answers, which is not asked in words.
    Raises:
      ConfigError: with all of them.
    """
    idle, why = (), ""
    if by_head:
        idle, why = ("shots", "beams", "temperature"), "the run answers by its head"
    elif examples and task.requests(examples[0]):
        idle, why = ("beams", "temperature"), "the answers are choices, which are scored"
    elif task.name == "dialogue":
        idle, why = ("shots",), "a dialogue is asked by its own messages"
    plain = Asking()
    refuse(
        [
            f"--{name} {given:g}: {why}: leave it out"
            for name in idle
            if (given := getattr(how, name)) != getattr(plain, name)
        ]
    )


def _usual_length(model: Model, task: Task, examples: Sequence[Any]) -> int:
    """The tokens that a text may have, if nobody says how many."""
    lengths = [len(model.tokenizer.encode(task.target(one))) for one in examples]
    half, longest = max(model.config.context_size // 2, 1), max(lengths, default=0)
    ending = max((len(model.tokenizer.encode(stop)) for stop in task.stops), default=1)
    return min(longest + longest // 2 + ending, half) if longest else half


class _Asker(NamedTuple):
    """What is asked of which model, and how; for the rest see `ask`."""

    model: Model
    task: Task
    training: Sequence[Any]
    how: Asking
    problems: Problems
    begin: Callable[[], bool] = lambda: True

    def holds(self, example: Any, length: int, at_once: int = 1) -> bool:
        """Whether so many ids are read without giving up the first, and of these so many at once;
        if not, that is told.
        """
        size = self.model.config.context_size
        if at_once <= size and (length <= size or reach(self.model.config) is not None):
            return True
        tell_too_long(self.task.config, example.where, length, size, self.problems)
        return False

    def ids(self, text: str) -> np.ndarray:
        """The ids of a text that begins a document."""
        tokenizer = self.model.tokenizer
        return np.concatenate([[tokenizer.begin], tokenizer.encode(text)]).astype(np.int32)

    def shown(self, number: int, example: Any, prompt: str, room: int) -> tuple[str, int]:
        """A prompt with its shots, and how many there are; `room` tokens are for what comes
        after.
        """
        most = self.model.config.context_size - room
        shots = [(self.task.prompt(one), self.task.target(one)) for one in self.drawn(number)]
        own = self.task.prompt(example), self.task.target(example)
        if own in shots:  # it would see its own answer
            others = self.drawn(number, shots=len(self.training))
            others = [(self.task.prompt(one), self.task.target(one)) for one in others]
            shots = [one for one in others if one != own][: self.how.shots]
        return with_shots(shots, prompt, lambda text: len(self.ids(text)) <= most)

    def drawn(self, number: int, shots: int | None = None) -> list[Any]:
        """Training examples, for the example of a number."""
        shots = self.how.shots if shots is None else shots
        if not shots:
            return []
        places = shots_of(number, len(self.training), shots, self.how.seed)
        return [self.training[one] for one in places]

    def choose(self, examples: Sequence[Any]) -> Answers:
        task = self.task
        asked: list[tuple[np.ndarray, np.ndarray]] = []
        bare: list[tuple[np.ndarray, np.ndarray]] = []
        counts, requests, shown = [], [], 0
        for number, example in enumerate(examples):
            each = task.requests(example)
            targets = [going_on(one.target, self.model.tokenizer) for one in each]
            room, prompts = max(map(len, targets)) + 1, {}
            for one in each:
                if one.prompt not in prompts:
                    prompts[one.prompt] = self.shown(number, example, one.prompt, room)
            texts = [
                (self.ids(prompts[one.prompt][0]), ids)
                for one, ids in zip(each, targets, strict=True)
            ]
            # The last id of a continuation is not read.
            longest = max(len(before) + len(ids) - 1 for before, ids in texts)
            if not self.holds(example, longest, at_once=max(map(len, targets))):
                counts.append(0)
                continue
            asked += texts
            bare += [(self.ids(one.bare), ids) for one, ids in zip(each, targets, strict=True)]
            shown += prompts[each[0].prompt][1]
            counts.append(len(each))
            requests += each
        self.problems.refuse()
        rule = task.config.score
        nats, bare_nats = self.nats(asked), None
        if rule == "unconditional":
            bare_nats = self.nats(bare)
        if nats is None or (rule == "unconditional" and bare_nats is None):
            return Answers([None] * len(examples), 0)
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

    def nats(self, texts: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray | None:
        """The log-likelihood of each continuation; None if it was ended. Batches are of one size
        and alike in length, so that little is compiled.
        """
        model, size = self.model, self.how.batch_size
        order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
        nats = np.zeros(len(texts))
        for start in range(0, len(order), size):
            here = order[start : start + size]
            rows = [*here, *here[-1:] * (size - len(here))]
            prompts, said = zip(*(texts[i] for i in rows), strict=True)
            if not self.begin():
                return None
            scores = score(model.params, prompts, said, model.config)
            nats[here] = [one.total for one in scores[: len(here)]]
        return nats

    def write(self, examples: Sequence[Any]) -> Answers:
        task, how = self.task, self.how
        stops = (BETWEEN,) * bool(how.shots) + task.stops
        # Beams know no strings that end a text: theirs is cut when it is done.
        sampling = Sampling(
            max_tokens=how.max_tokens,
            temperature=how.temperature,
            beams=how.beams,
            stop=() if how.beams > 1 else stops,
        )
        prompts: dict[int, np.ndarray] = {}
        shown = 0
        for number, example in enumerate(examples):
            ids, count = self.asked_ids(number, example)
            ahead = how.max_tokens if how.beams > 1 else 0  # beams do not go beyond the context
            if self.holds(example, len(ids) + ahead):
                prompts[number] = ids
                shown += count
        self.problems.refuse()
        texts: dict[int, str] = {}
        unended: set[int] = set()
        order = sorted(prompts, key=lambda i: len(prompts[i]))
        for start in range(0, len(order), how.batch_size):
            here = order[start : start + how.batch_size]
            if not self.begin():
                return Answers([None] * len(examples), 0)
            completions = complete(
                self.model.params,
                [prompts[i].tolist() for i in here],
                self.model.config,
                sampling,
                jax.random.key(how.seed),
                end=self.model.tokenizer.end,
                tokenizer=self.model.tokenizer,
                numbers=[how.first + i for i in here],
            )
            for i, one in zip(here, completions, strict=True):
                cut = [one.text.partition(stop)[0] for stop in stops]
                texts[i] = min([one.text, *cut], key=len)
                if one.reason == "length" and texts[i] == one.text:
                    unended.add(i)
                    why = f"{how.max_tokens:,} tokens, which --max-tokens may raise"
                    self.problems.note("a text without an end", examples[i].where, why, "cut")
        said = [
            task.from_text(example, texts[i]) | ({"cut": True} if i in unended else {})
            if i in texts
            else None
            for i, example in enumerate(examples)
        ]
        return Answers(said, shown / max(len(prompts), 1))

    def asked_ids(self, number: int, example: Any) -> tuple[np.ndarray, int]:
        """The ids after which an example's text is written, and how many shots are in them."""
        if not isinstance(example, Dialogue):
            prompt = self.task.prompt(example)
            text, count = self.shown(number, example, prompt, self.how.max_tokens)
            return self.ids(text), count
        most = max(self.model.config.context_size - self.how.max_tokens, 1)
        messages = self.task.before(example)
        ids, dropped = self.task.fitting_ids(messages, self.model.tokenizer, most)
        if dropped:
            why = f"the first {dropped:,} of {len(messages):,} messages are not shown"
            self.problems.note("too long", example.where, why, "cut")
        return ids, 0
