"""Classes of a text, or of two together: one of several, or any number."""

import ast
import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np

from gptjax.config import TaskConfig, did_you_mean
from gptjax.data import WORD_BITS
from gptjax.tasks.cells import Flaw, Record, cell, kind_of_value, text_in
from gptjax.tasks.formats import by_number
from gptjax.tasks.metrics import class_figures, label_set_figures
from gptjax.tasks.problems import Problems
from gptjax.tasks.prompts import filled, last_line
from gptjax.tasks.records import read_examples
from gptjax.tasks.task import (
    Encoded,
    Prediction,
    Request,
    balanced,
    delimiters,
    going_on,
    joined,
    space_between,
    tell_too_long,
    windows,
)
from gptjax.tokenizer import Tokenizer

# What sets write where an example has no label.
NONE_OFTEN = {"-", "-1", "?", "n/a", "na", "nan", "none", "null", "unlabeled", "unsup"}


@dataclass(frozen=True)
class Classified:
    """A text, and its labels."""

    where: str
    text: str
    second: str | None
    labels: tuple[str, ...] | None  # one, or of several any number; None if they are not known


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Which label a text has; of `config.several`, which labels."""

    config: TaskConfig
    labels: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()  # of the labels; (): all weigh the same

    name = "classify"
    head: Literal["label"] = "label"

    @property
    def several(self) -> bool:
        return self.config.several

    @property
    def stops(self) -> tuple[str, ...]:
        """Several labels are written in a line."""
        return ("\n",) if self.several else ()

    def read(
        self, paths: Iterable[str], problems: Problems, *, labelled: bool = True
    ) -> Iterator[Classified]:
        make = functools.partial(self._example, labelled=labelled)
        examples = self._noting(read_examples(self.config, paths, problems, make), problems)
        known = self.labels or not labelled  # a name of a column is none of the labels
        if known or self.config.header != "auto" or not by_number(self.config):
            return examples
        return self._without_a_header(examples, problems)

    def _noting(self, examples: Iterable[Classified], problems: Problems) -> Iterator[Classified]:
        """The same examples. A label that often means that there is none, or that may be a score,
        is told, for it is kept, unless the labels are given.
        """
        for one in examples:
            for label in () if self.labels or self.config.labels else one.labels or ():
                if label.lower() in NONE_OFTEN:
                    why = f"{label!r}; if it is no label give all others by --task.labels"
                    problems.note("perhaps no label", one.where, why, "kept")
                elif re.fullmatch(r"-?\d+\.\d*[1-9]\d*", label):
                    why = f"{label!r}; each is a class of its own, for scores are not learnt"
                    problems.note("perhaps a score", one.where, why, "kept")
            yield one

    def _without_a_header(
        self, examples: Iterable[Classified], problems: Problems
    ) -> Iterator[Classified]:
        """The same examples. That the first may be the names of columns is told, for it is kept."""
        first, seen = None, set()
        for one in examples:
            seen |= {*one.labels} if first else set()
            first = first or one
            yield one
        if seen and first.labels and not seen & {*first.labels}:
            why = f"no other has its label {first.labels[0]!r}; give --task.header yes if so"
            problems.note("perhaps names of columns", first.where, why, "kept")

    def _example(self, record: Record, labelled: bool) -> Classified:
        config, value = self.config, record.value
        text = text_in(value, config.text_column or "text")
        second = text_in(value, config.second_column) if config.second_column else None
        try:
            labels = self._labels(value)
        except Flaw:
            if labelled:
                raise
            labels = None
        return Classified(record.where, text, second, labels)

    def _labels(self, record: Any) -> tuple[str, ...]:
        if self.config.label_columns:
            names = tuple(name for name in self.config.label_columns if _is_on(record, name))
        elif self.several:
            names = self._names(self._list(cell(record, self._label_column)))
        else:
            names = (self._named(cell(record, self._label_column)),)
            if not names[0]:
                raise Flaw("no label", f"column {self._label_column!r} is empty")
        for name in names:
            if self.labels and name not in self.labels:
                hint = did_you_mean(name, self.labels)
                if name == str(len(self.labels)) and not self.config.first_label:
                    hint = " Give --task.first-label 1 if numbers of labels begin at 1."
                raise Flaw("unknown label", f"no label {name!r} was in training.{hint}")
        return names

    def _list(self, value: Any) -> list:
        """Several labels: a list, or a cell that is one, or has separators."""
        if isinstance(value, list):
            return value
        text = self._spelled(value)
        if text[:1] + text[-1:] != "[]":
            return text.split(self.config.label_separator)
        try:  # as pandas writes a list
            return list(ast.literal_eval(text))
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # as its documents say
            raise Flaw("no label", f"{text[:80]!r} is no list") from None

    def _names(self, found: list) -> tuple[str, ...]:
        """Several labels; of a 0 or 1 for each label, as some sets have them, those with a 1."""
        known = self.labels or self.config.labels
        digits = len(found) > 1 and all(
            not isinstance(one, str | list | dict) and one in (0, 1) for one in found
        )
        if digits and len(found) == len(known):
            return tuple(label for label, one in zip(known, found, strict=True) if one)
        if digits and not known:
            raise Flaw(
                "no label",
                f"{json.dumps(found)[:80]} may be numbers of labels, or a 0 or 1 for each label: "
                "give the names of all by --task.labels",
            )
        return tuple(dict.fromkeys(filter(None, map(self._named, found))))

    def _named(self, value: Any) -> str:
        """A label by its name; a number is a place among `config.labels`, if these have none."""
        name, labels = self._spelled(value), self.config.labels
        if not name.isdecimal() or any(map(str.isdecimal, labels)):
            return name
        place = int(name) - self.config.first_label
        return labels[place] if 0 <= place < len(labels) else name

    @property
    def _label_column(self) -> str:
        return self.config.label_column or "label"

    def _spelled(self, value: Any) -> str:
        """A label as text: what is not a string as JSON has it."""
        if isinstance(value, str):
            return value.strip()
        if value is None or isinstance(value, list | dict) or value != value:
            hint = "; give --task.several for several labels" * isinstance(value, list)
            hint += "; no labels are []" * (value is None and self.several)
            raise Flaw("no label", f"column {self._label_column!r} is {kind_of_value(value)}{hint}")
        return json.dumps(value)

    def fitted(self, examples: Sequence[Classified]) -> Self:
        counts = Counter(label for one in examples for label in one.labels or ())
        labels = self.labels or self.config.labels or self.config.label_columns
        labels = labels or tuple(sorted(counts, key=_natural))
        weights = ()
        if self.config.class_weights == "balanced":
            of_label = Counter({number: counts[label] for number, label in enumerate(labels)})
            weights = balanced(of_label, len(labels))
        return replace(self, labels=labels, weights=weights)

    # --- tokens and outputs --------------------------------------------------------------------

    def encode(
        self, example: Classified, tokenizer: Tokenizer, size: int, problems: Problems
    ) -> list[Encoded]:
        """Beginning, text, end-of-text: the label is said at the last, which sees it all."""
        first, rest = tokenizer.encode(example.text), np.zeros(0, np.int32)
        begin, end = delimiters(self.config, tokenizer)
        if example.second is not None:
            rest = going_on(self.config.separator + example.second, tokenizer)
        words = -(-len(self.labels) // WORD_BITS) if self.several else 1
        room = size - len(begin) - len(end) - len(rest)
        if len(first) <= room:
            parts = [(0, len(first))]
        elif self.config.too_long != "window" or room < 1 or example.second is not None:
            length = len(first) + size - room
            tell_too_long(self.config, example.where, length, size, problems)
            return []
        else:
            found = windows(np.ones(len(first), int), room, self.config.overlap)
            parts = [(one.start, one.stop) for one in found]
        encoded = []
        for start, stop in parts:  # together they weigh as much as one that is short
            tokens = joined([begin, first[start:stop], rest, end])
            # Words of bits need as many tokens, and a label one.
            missing = np.full(max(words - len(tokens), 0), tokenizer.end)
            tokens = joined([missing, tokens])
            encoded.append(self._encoded(example, tokens, share=1 / len(parts)))
        return encoded

    def _encoded(self, example: Classified, tokens: np.ndarray, share: float) -> Encoded:
        last, targets = len(tokens) - 1, np.zeros(len(tokens), np.int32)
        weights = np.zeros(len(tokens), np.float32)
        if example.labels is not None:
            numbers = [self.labels.index(label) for label in example.labels]
            if self.several:
                for number in numbers:
                    targets[last - number // WORD_BITS] |= 1 << number % WORD_BITS
            else:
                targets[last] = numbers[0]
            weights[last] = share
            if self.weights and numbers:
                weights[last] *= np.mean([self.weights[number] for number in numbers])
        return Encoded(tokens, targets, weights, np.int32([[last, 0, 0]]))

    def decode(
        self, example: Classified, windows: Sequence[Encoded], outputs: Sequence[np.ndarray]
    ) -> Prediction:
        """Logarithms of probabilities are averaged over the windows, and their sum made 1 again; of
        several labels those of there and not there, which is to average the logits.
        """
        logits = np.stack(
            [out[one.units[0, 0]] for one, out in zip(windows, outputs, strict=True)]
        ).astype(np.float64)
        if self.several:
            return self._said(np.exp(-np.logaddexp(0, -logits.mean(axis=0))))
        return self.from_scores(example, log_softmax(logits).mean(axis=0))

    def _said(self, probabilities: np.ndarray) -> Prediction:
        chosen = [
            label for label, share in zip(self.labels, probabilities, strict=True) if share >= 0.5
        ]
        shares = dict(zip(self.labels, probabilities.tolist(), strict=True))
        return {"labels": chosen, "probabilities": shares}

    # --- prompting -----------------------------------------------------------------------------

    @property
    def _template(self) -> str:
        shown = "{text}\n{second}" if self.config.second_column else "{text}"
        return self.config.template or f"{shown}\nlabel:"

    def _word(self, label: str) -> str:
        words = self.config.words
        return words[self.labels.index(label)] if words else label

    def prompt(self, example: Classified) -> str:
        columns = {"text": example.text, "second": example.second or ""}
        return filled(self._template, columns)

    def target(self, example: Classified) -> str:
        word = ", ".join(map(self._word, example.labels or ()))
        return space_between(self._template, word) + word

    def requests(self, example: Classified) -> list[Request]:
        """Of several labels none: they are written."""
        if self.several:
            return []
        prompt, bare = self.prompt(example), last_line(self._template)
        words = map(self._word, self.labels)
        return [Request(prompt, space_between(prompt, word) + word, bare) for word in words]

    def from_scores(self, example: Classified, scores: np.ndarray) -> Prediction:
        shares = np.exp(log_softmax(np.asarray(scores, np.float64)))
        label = self.labels[int(np.argmax(shares))]
        shares = dict(zip(self.labels, shares.tolist(), strict=True))
        return {"label": label, "probabilities": shares}

    def from_text(self, example: Classified, text: str) -> Prediction:
        """The labels whose words a continuation begins with; "" if it is none of them."""
        said = text.strip().split("\n")[0]
        by_word = {self._word(label): label for label in self.labels}
        if self.several:  # a word may have commas
            words = sorted(filter(None, by_word), key=len, reverse=True)
            each = "|".join(map(re.escape, words)) or r"(?!)"
            found = re.findall(rf"(?:^|,)\s*({each})(?=\s*(?:,|$))", said)
            return {"labels": [by_word[word] for word in dict.fromkeys(found)]}
        fits = [word for word in by_word if said.startswith(word)]
        return {"label": by_word[max(fits, key=len)] if fits else ""}

    # --- figures -------------------------------------------------------------------------------

    def metrics(
        self, examples: Sequence[Classified], predictions: Sequence[Prediction]
    ) -> dict[str, float]:
        if self.several:
            truth, said = self._sets(examples, predictions)
            return label_set_figures(truth, said)
        truth = [one.labels[0] for one in examples]
        return class_figures(truth, [one["label"] for one in predictions])

    def _sets(
        self, examples: Sequence[Classified], predictions: Sequence[Prediction]
    ) -> tuple[np.ndarray, np.ndarray]:
        truth = [[label in one.labels for label in self.labels] for one in examples]
        said = [[label in one["labels"] for label in self.labels] for one in predictions]
        return np.array(truth, bool), np.array(said, bool)

    def measure(
        self, examples: Sequence[Classified], predictions: Sequence[Prediction]
    ) -> tuple[str, np.ndarray | None]:
        if self.several:
            truth, said = self._sets(examples, predictions)
            counts = [(truth & said).sum(1), said.sum(1), truth.sum(1)]
            return "micro_f1", np.stack(counts, axis=1)
        pairs = zip(examples, predictions, strict=True)
        return "accuracy", np.array([[one.labels[0] == said["label"]] for one, said in pairs])


def _is_on(record: Any, column: str) -> bool:
    """Whether a column says that a record has the label that it is called by.

    Raises:
      Flaw: if it says neither that nor that it has not.
    """
    said = cell(record, column)
    text = said.strip().lower() if isinstance(said, str) else said
    for value, spelled in ((True, ("1", "1.0", "true")), (False, ("0", "0.0", "false"))):
        if text in spelled or (isinstance(text, int | float) and text == value):
            return value
    shown = repr(said) if isinstance(said, str) else json.dumps(said, default=str)[:80]
    raise Flaw("no label", f"column {column!r} is {shown}, not 0 or 1")


def _natural(label: str) -> tuple:
    """Numbers before words, by their size."""
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
