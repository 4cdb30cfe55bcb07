"""A text to another: translation, summaries, instructions and their answers."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from gptjax.config import ConfigError, TaskConfig
from gptjax.tasks.cells import Flaw, Record, text_in
from gptjax.tasks.metrics import text_figures
from gptjax.tasks.problems import Problems
from gptjax.tasks.prompts import filled
from gptjax.tasks.records import read_examples
from gptjax.tasks.task import (
    Encoded,
    Prediction,
    Request,
    going_on,
    joined,
    next_tokens,
    space_between,
    tell_too_long,
)
from gptjax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Pair:
    """A text that is given, and one to be written."""

    where: str
    source: str
    target: str | None
    columns: tuple[tuple[str, str], ...]  # of its record, for the prompt


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What is to be written for a text. The loss is on that alone."""

    config: TaskConfig

    name = "pairs"
    head: Literal["lm"] = "lm"
    labels = ()
    several = False
    stops = ()

    def read(
        self, paths: Iterable[str], problems: Problems, *, labelled: bool = True
    ) -> Iterator[Pair]:
        make = functools.partial(self._example, labelled=labelled)
        return read_examples(self.config, paths, problems, make, labelled=labelled)

    def _example(self, record: Record, labelled: bool) -> Pair:
        source = text_in(record.value, self.config.source_column)
        target = self._target(record.value, labelled)
        columns = named_texts(record.value) | {"source": source}
        check_template(self._template, columns)
        return Pair(record.where, source, target, tuple(columns.items()))

    def _target(self, value: Any, labelled: bool) -> str | None:
        try:
            return text_in(value, self.config.target_column)
        except Flaw:
            if labelled:
                raise
            return None

    def fitted(self, examples: Sequence[Pair]) -> Self:
        return self

    def encode(
        self, example: Pair, tokenizer: Tokenizer, size: int, problems: Problems
    ) -> list[Encoded]:
        """End-of-text, the prompt, and what is to be written, with the end-of-text after it."""
        target = self.target(example) if example.target is not None else None
        encoded = encode_request(self.prompt(example), target, tokenizer)
        if len(encoded.tokens) > size:
            tell_too_long(self.config, example.where, len(encoded.tokens), size, problems)
            return []
        return [encoded]

    def decode(
        self, example: Pair, windows: Sequence[Encoded], outputs: Sequence[np.ndarray]
    ) -> Prediction:
        raise AssertionError("texts are written, not read from a head")

    @property
    def _template(self) -> str:
        return self.config.template or "{source}\n"

    def prompt(self, example: Pair) -> str:
        return filled(self._template, dict(example.columns))

    def target(self, example: Pair) -> str:
        text = example.target or ""
        return space_between(self.prompt(example), text) + text

    def requests(self, example: Pair) -> list[Request]:
        return []

    def from_scores(self, example: Pair, scores: np.ndarray) -> Prediction:
        raise AssertionError("texts are written, not chosen")

    def from_text(self, example: Pair, text: str) -> Prediction:
        return {"source": example.source, "text": text.strip()}

    def metrics(
        self, examples: Sequence[Pair], predictions: Sequence[Prediction]
    ) -> dict[str, float]:
        """BLEU and chrF; right are all targets that the examples have for the same prompt, and
        `references` says how many these are on average, if they are more than one.
        """
        right: dict[str, list[str]] = {}
        for one in examples:
            right.setdefault(self.prompt(one), []).append(one.target or "")
        references = [list(dict.fromkeys(right[self.prompt(one)])) for one in examples]
        texts = [one["text"] for one in predictions]
        figures = text_figures(references, texts, self.config.bleu_tokens)
        mean = sum(map(len, references)) / max(len(references), 1)
        return figures | ({"references": mean} if mean > 1 else {})

    def measure(
        self, examples: Sequence[Pair], predictions: Sequence[Prediction]
    ) -> tuple[str, np.ndarray | None]:
        return "chrf", None


def named_texts(value: Any) -> dict[str, str]:
    """The columns of a record that have names and hold text or a number; null is an empty text."""
    found = value.items() if isinstance(value, dict) else ()
    return {
        name: "" if one is None else str(one)
        for name, one in found
        if one is None or (isinstance(one, str | int | float) and not isinstance(one, bool))
    }


def check_template(template: str, columns: Mapping[str, str]) -> None:
    """Raises:
    Flaw: if a template names a column that a record does not have.
    """
    try:
        filled(template, columns)
    except ConfigError as error:
        raise Flaw("no such column", str(error)) from None


def encode_request(prompt: str, target: str | None, tokenizer: Tokenizer) -> Encoded:
    """A prompt and what comes after it; no token is of both, so a prompt alone has the same ids.

    Without a target, the prompt with weights of 0.
    """
    shown = joined([np.int32([tokenizer.begin]), tokenizer.encode(prompt)])
    said = np.zeros(0, np.int32) if target is None else going_on(target, tokenizer)
    ids = joined([shown, said, np.int32([tokenizer.end])])
    counts = np.arange(len(ids)) >= len(shown)
    return next_tokens(ids, counts & (target is not None))
