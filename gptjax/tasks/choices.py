"""Questions with a few continuations to choose from, by their likelihood."""

import functools
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from gptjax.config import TaskConfig
from gptjax.tasks.cells import Flaw, Record, cell, kind_of_value, sound, text_in
from gptjax.tasks.metrics import class_figures
from gptjax.tasks.pairs import check_template, encode_request, named_texts
from gptjax.tasks.problems import Problems
from gptjax.tasks.prompts import filled, last_line
from gptjax.tasks.records import read_examples
from gptjax.tasks.task import Encoded, Prediction, Request, space_between, tell_too_long
from gptjax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Choice:
    """Contexts and continuations of which one is right: one context and several continuations, or
    several contexts and one continuation.
    """

    where: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int | None  # which is right, from 0
    columns: tuple[tuple[str, str], ...]  # of its record, for the prompt


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Which of some continuations is likeliest, or after which of some contexts one is."""

    config: TaskConfig

    name = "choices"
    head: Literal["lm"] = "lm"
    labels = ()
    several = False
    stops = ()

    def read(
        self, paths: Iterable[str], problems: Problems, *, labelled: bool = True
    ) -> Iterator[Choice]:
        """The text may be a list: then it has the contexts, and the choices' column one text."""
        make = functools.partial(self._example, labelled=labelled)
        return read_examples(self.config, paths, problems, make)

    def _example(self, record: Record, labelled: bool) -> Choice:
        where, value = record
        config, column = self.config, self.config.text_column or "query"
        shown = cell(value, column)
        contexts = self._texts(shown, column) if isinstance(shown, list) else None
        contexts = contexts or (text_in(value, column),)
        texts, names = self._choices(value)
        continuations = self._texts(texts, " ".join(config.choice_columns))
        if (len(contexts) > 1) == (len(continuations) > 1):
            raise Flaw(
                "wrong number of choices",
                f"{len(contexts)} contexts and {len(continuations)} continuations: one of them "
                "must be 1, and the other more",
            )
        try:
            gold = cell(value, config.label_column or "gold")
            most = max(len(contexts), len(continuations))
            gold = _place(gold, names, most, config.first_choice)
        except Flaw:
            if labelled:
                raise
            gold = None
        columns = named_texts(value)
        check_template(self._template, columns | {"text": contexts[0]})
        return Choice(where, contexts, continuations, gold, tuple(columns.items()))

    def _choices(self, value: Any) -> tuple[list, list[str] | None]:
        """The texts of the choices, and what each is called if they have names: of several columns,
        a list, an object of lists `text` and `label`, a list of such objects, or one by name.
        """
        given = [cell(value, name) for name in self.config.choice_columns]
        if len(given) > 1 or not isinstance(given[0], list | dict):
            return given, None
        (given,) = given
        if isinstance(given, list) and all(isinstance(one, dict) for one in given):
            given = {part: [cell(one, part) for one in given] for part in ("text", "label")}
        if isinstance(given, list):
            return given, None
        if "text" not in given:
            return list(given.values()), list(given)
        texts, names = given["text"], given.get("label")
        if not isinstance(texts, list):
            raise Flaw("no text", f"the choices' 'text' is {kind_of_value(texts)}, not a list")
        if names is not None and (not isinstance(names, list) or len(names) != len(texts)):
            raise Flaw("wrong number of choices", f"{len(texts)} texts, but not as many labels")
        return texts, names and [*map(str, names)]

    def _texts(self, values: list, column: str) -> tuple[str, ...]:
        for value in values:
            if not isinstance(value, str):
                raise Flaw("no text", f"{column!r} has {kind_of_value(value)}, not a string")
            sound(value, column)
        return tuple(values)

    def fitted(self, examples: Sequence[Choice]) -> Self:
        return self

    def encode(
        self, example: Choice, tokenizer: Tokenizer, size: int, problems: Problems
    ) -> list[Encoded]:
        """What is right, as a text to be written."""
        target = None if example.gold is None else self.target(example)
        encoded = encode_request(self.prompt(example), target, tokenizer)
        if len(encoded.tokens) > size:
            tell_too_long(self.config, example.where, len(encoded.tokens), size, problems)
            return []
        return [encoded]

    def decode(
        self, example: Choice, windows: Sequence[Encoded], outputs: Sequence[np.ndarray]
    ) -> Prediction:
        raise AssertionError("choices are scored, not read from a head")

    def _prompt(self, example: Choice, number: int) -> str:
        columns = dict(example.columns) | {"text": example.contexts[number]}
        return filled(self._template, columns)

    @property
    def _template(self) -> str:
        return self.config.template or "{text}"

    def prompt(self, example: Choice) -> str:
        right = (example.gold or 0) if len(example.contexts) > 1 else 0
        return self._prompt(example, right)

    def target(self, example: Choice) -> str:
        return self.requests(example)[example.gold or 0].target

    def requests(self, example: Choice) -> list[Request]:
        several, bare = len(example.contexts) > 1, last_line(self._template)
        requests = []
        for number in range(max(len(example.contexts), len(example.continuations))):
            prompt = self._prompt(example, number if several else 0)
            said = example.continuations[0 if several else number]
            requests.append(Request(prompt, space_between(prompt, said) + said, bare))
        return requests

    def from_scores(self, example: Choice, scores: np.ndarray) -> Prediction:
        return {"choice": int(np.argmax(scores)), "scores": np.asarray(scores).tolist()}

    def from_text(self, example: Choice, text: str) -> Prediction:
        raise AssertionError("choices are scored, not written")

    def metrics(
        self, examples: Sequence[Choice], predictions: Sequence[Prediction]
    ) -> dict[str, float]:
        truth, said = [one.gold for one in examples], [one["choice"] for one in predictions]
        return {"accuracy": class_figures(truth, said)["accuracy"]}

    def measure(
        self, examples: Sequence[Choice], predictions: Sequence[Prediction]
    ) -> tuple[str, np.ndarray | None]:
        pairs = zip(examples, predictions, strict=True)
        return "accuracy", np.array([[one.gold == said["choice"]] for one, said in pairs])


def _place(gold: Any, names: list[str] | None, count: int, first: int) -> int:
    """Which choice is right, from 0: by what it is called, by a letter, or by its number.

    Raises:
      Flaw: if it is none.
    """
    said = str(gold).strip() if isinstance(gold, str | int) and not isinstance(gold, bool) else ""
    letters = string.ascii_uppercase[:count]
    if names is not None and said in names:
        return names.index(said)
    if len(said) == 1 and said.upper() in letters:
        return letters.index(said.upper())
    if names is None and said.isdecimal() and first <= int(said) < first + count:
        return int(said) - first
    there = f"{first} to {first + count - 1}" if names is None else ", ".join(names)
    hint = "; give --task.first-choice 1 if the first is 1" * (said == str(count) and not first)
    raise Flaw("unknown label", f"{gold!r} is right, but choices are {there}{hint}")
