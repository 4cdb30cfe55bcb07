"""Tasks that a language model is asked in words: choices that it scores, texts that it writes."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.config import Config, ConfigError, GPTConfig, refuse
from gptjax.decoding import Completion, complete, score
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
    # of a text that is written; None: half as many again as the longest right text has, or as
    # `most_tokens` says if there is none
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
    problems: Problems,
    begin: Callable[[], bool],
) -> list[Prediction | None]:
    """What a language model writes for examples, or chooses: the likeliest token each time.

    Args:
      params: of the model alone.
      problems: told of what is too long, and of texts that are cut.
      begin: asked before each batch; False ends it, and nothing is said of any example.
    """
    platform = jax.tree.leaves(params)[0].sharding.mesh.devices.flat[0].platform
    model = Model(params, resolve(config.model, platform)[0], tokenizer)
    how = Asking(batch_size=min(config.batch_size, 16))
    return ask(model, task, examples, (), how, problems, begin).predictions


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


def most_tokens(context_size: int) -> int:
    """The tokens that a text may have, if nothing is known of it."""
    return min(256, max(context_size // 2, 1))


def most_shown(context_size: int, max_tokens: int) -> int:
    """The tokens that a dialogue may have before a reply. What is written may go beyond the
    context, which moves then; messages are worth more.
    """
    return max(context_size - min(max_tokens, most_tokens(context_size)), 1)


class _Question(NamedTuple):
    """The choices of an example."""

    texts: list[tuple[np.ndarray, np.ndarray]]  # the ids before each, and its own
    bare: list[tuple[np.ndarray, np.ndarray]]  # the same without the example
    num_bytes: list[int]  # of each
    shots: int  # that came before


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
        if shots:
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
        questions = [self.question(number, one) for number, one in enumerate(examples)]
        self.problems.refuse()
        held, rule = [one for one in questions if one], self.task.config.score
        nats = self.nats([text for one in held for text in one.texts])
        bare_nats = nats
        if rule == "unconditional":
            bare_nats = self.nats([text for one in held for text in one.bare])
        if nats is None or bare_nats is None:
            return Answers([None] * len(examples), 0)
        predictions: list[Prediction | None] = [None] * len(examples)
        start = 0
        for number, question in enumerate(questions):
            if question is None:
                continue
            here = slice(start, start + len(question.texts))
            start = here.stop
            scores = choice_scores(
                rule,
                nats[here],
                num_tokens=[len(ids) for _, ids in question.texts],
                num_bytes=question.num_bytes,
                bare_nats=bare_nats[here],
            )
            predictions[number] = self.task.from_scores(examples[number], scores)
        return Answers(predictions, sum(one.shots for one in held) / max(len(held), 1))

    def question(self, number: int, example: Any) -> _Question | None:
        """What is to be scored of an example; None if the context does not hold it."""
        each, tokenizer = self.task.requests(example), self.model.tokenizer
        targets = [going_on(one.target, tokenizer) for one in each]
        longest_target = max(map(len, targets))
        prompts = {
            prompt: self.shown(number, example, prompt, longest_target + 1)
            for prompt in dict.fromkeys(one.prompt for one in each)
        }
        before = {prompt: self.ids(text) for prompt, (text, _) in prompts.items()}
        texts = [(before[one.prompt], ids) for one, ids in zip(each, targets, strict=True)]
        # The last id of a continuation is not read.
        longest = max(len(ids) + len(more) - 1 for ids, more in texts)
        if not self.holds(example, longest, at_once=longest):
            return None
        return _Question(
            texts=texts,
            bare=[(self.ids(one.bare), ids) for one, ids in zip(each, targets, strict=True)],
            num_bytes=[len(one.target.encode()) for one in each],
            shots=prompts[each[0].prompt][1],
        )

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

    def usual_length(self, examples: Sequence[Any]) -> int:
        """The tokens that a text may have, by the longest right one."""
        encode, size = self.model.tokenizer.encode, self.model.config.context_size
        longest = max((len(encode(self.task.target(one))) for one in examples), default=0)
        ending = max((len(encode(stop)) for stop in self.task.stops), default=1)
        usual = longest + longest // 2 + ending if longest else most_tokens(size)
        return min(usual, max(size // 2, 1))

    def write(self, examples: Sequence[Any]) -> Answers:
        if self.how.max_tokens is None:
            asker = self._replace(how=self.how._replace(max_tokens=self.usual_length(examples)))
            return asker.write(examples)
        prompts: dict[int, np.ndarray] = {}
        shots = 0
        for number, example in enumerate(examples):
            ids, count = self.asked_ids(number, example)
            if self.holds(example, len(ids) + (self.how.beams > 1)):
                prompts[number] = ids
                shots += count
        self.problems.refuse()
        said: list[Prediction | None] = [None] * len(examples)
        for number, (text, ended) in (self.texts(prompts) or {}).items():
            said[number] = self.task.from_text(examples[number], text)
            if not ended:
                said[number]["cut"] = True
                room = self.room(len(prompts[number]))
                why = f"{room:,} tokens" + ", which --max-tokens may raise" * (
                    room == self.how.max_tokens
                )
                self.problems.note("a text without an end", examples[number].where, why, "cut")
        return Answers(said, shots / max(len(prompts), 1))

    def texts(self, prompts: Mapping[int, np.ndarray]) -> dict[int, tuple[str, bool]] | None:
        """What is written after the prompts of some examples, and whether it came to an end, by the
        example's number; None if it was ended.
        """
        rooms = {number: self.room(len(ids)) for number, ids in prompts.items()}
        order = sorted(prompts, key=lambda number: (rooms[number], len(prompts[number])))
        found = {}
        for room, group in itertools.groupby(order, rooms.get):
            while here := list(itertools.islice(group, self.how.batch_size)):
                if not self.begin():
                    return None
                asked = [prompts[number].tolist() for number in here]
                numbers = [self.how.first + number for number in here]
                for number, one in zip(here, self.completed(asked, room, numbers), strict=True):
                    cut = [one.text.partition(stop)[0] for stop in self.stops]
                    text = min([one.text, *cut], key=len)
                    found[number] = text, one.reason != "length" or text != one.text
        return found

    def room(self, length: int) -> int:
        """The tokens that may be written after so many: beams do not go beyond the context, unless
        a window lets them.
        """
        most, size = self.how.max_tokens, self.model.config.context_size
        if self.how.beams == 1 or reach(self.model.config) is not None:
            return most
        return min(most, size - length)

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a text: after shots also what is between them."""
        return (BETWEEN,) * bool(self.how.shots) + self.task.stops

    def completed(
        self, prompts: Sequence[Sequence[int]], room: int, numbers: Sequence[int]
    ) -> list[Completion]:
        """What is written after prompts of ids, at most `room` tokens each; by their numbers the
        examples draw.
        """
        how, tokenizer = self.how, self.model.tokenizer
        # Beams know no strings that end a text: theirs is cut when it is done.
        sampling = Sampling(
            max_tokens=room,
            temperature=how.temperature,
            beams=how.beams,
            stop=() if how.beams > 1 else self.stops,
        )
        return complete(
            self.model.params,
            prompts,
            self.model.config,
            sampling,
            jax.random.key(how.seed),
            end=tokenizer.end,
            tokenizer=tokenizer,
            numbers=numbers,
        )

    def asked_ids(self, number: int, example: Any) -> tuple[np.ndarray, int]:
        """The ids after which an example's text is written, and how many shots are in them."""
        if not isinstance(example, Dialogue):
            prompt = self.task.prompt(example)
            text, count = self.shown(number, example, prompt, self.how.max_tokens)
            return self.ids(text), count
        most = most_shown(self.model.config.context_size, self.how.max_tokens)
        messages = self.task.before(example)
        ids, dropped = self.task.fitting_ids(messages, self.model.tokenizer, most)
        if dropped:
            why = f"the first {dropped:,} of {len(messages):,} messages are not shown"
            self.problems.note("too long", example.where, why, "cut")
        return ids, 0
