"""Named entities: a tag for each word, carried to tokens and back."""

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, Self

import numpy as np

from gptjax.config import TaskConfig, did_you_mean
from gptjax.tasks.cells import Flaw, Record, cell, kind_of_value, sound
from gptjax.tasks.metrics import entity_counts, entity_figures
from gptjax.tasks.problems import Problems
from gptjax.tasks.prompts import filled
from gptjax.tasks.records import read_examples
from gptjax.tasks.tags import (
    Entity,
    Scheme,
    entities,
    first_broken,
    head_tags,
    plain_tag,
    write_tags,
)
from gptjax.tasks.task import (
    Encoded,
    Prediction,
    Request,
    balanced,
    delimiters,
    going_on,
    going_on_each,
    joined,
    space_between,
    tell_too_long,
    windows,
)
from gptjax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Tagged:
    """The words of a sentence, and their tags in IOB2."""

    where: str
    words: tuple[str, ...]
    tags: tuple[str, ...] | None  # None if they are not known


@dataclass(frozen=True, kw_only=True)
class Entities:
    """Which words are names, and of what. Tags are IOB2 inside, whatever the files have."""

    config: TaskConfig
    labels: tuple[str, ...] = ()  # O, and B and I of each kind; or others that a head has
    weights: tuple[float, ...] = ()  # of the labels; (): all weigh the same

    name = "entities"
    head: Literal["label"] = "label"
    several = False
    stops = ()

    def read(
        self, paths: Iterable[str], problems: Problems, *, labelled: bool = True
    ) -> Iterator[Tagged]:
        make = functools.partial(self._example, problems=problems, labelled=labelled)
        return read_examples(self.config, paths, problems, make)

    def _example(self, record: Record, problems: Problems, labelled: bool) -> Tagged:
        """From columns of CoNLL, or from a table whose cells are lists of words and tags."""
        config = self.config
        if isinstance(record.value, dict):
            words = self._list(record.value, config.text_column or "words")
            tags = self._tag_list(record.value, labelled)
            where = [record.where] * len(words)
        elif not _in_lines(record.value):
            raise Flaw(
                "no words",
                f"{kind_of_value(record.value)}; give lines of a word and its tag, by "
                "--task.file-format conll, or objects with lists of words and of tags",
            )
        else:
            file = record.where.rpartition(":")[0]
            where = [f"{file}:{number}" for number, _ in record.value]
            words = self._column(record.value, config.text_column or "1")
            _refuse_numbers(words, config, len(record.value[0][1]))
            _note_language(words, record.where, problems)
            tags = self._tag_column(record.value, labelled)
        if tags is not None and len(tags) != len(words):
            if labelled:
                raise Flaw("broken tags", f"{len(words)} words, but {len(tags)} tags")
            tags = None
        kept = [i for i, word in enumerate(words) if self._sound_word(word, where[i], problems)]
        if not kept:
            raise Flaw("empty text", "there are no words")
        words, where = [words[i] for i in kept], [where[i] for i in kept]
        if tags is not None:
            try:
                tags = self._sound_tags([tags[i] for i in kept], where, problems)
            except Flaw:
                if labelled:
                    raise
                tags = None  # they are not needed
        return Tagged(record.where, tuple(word.strip() for word in words), tags)

    def _sound_word(self, word: Any, where: str, problems: Problems) -> bool:
        """Whether a word is kept: an empty one may be left out of its sentence."""
        if not isinstance(word, str):
            raise Flaw("no text", f"{word!r} is a word, but not a string")
        try:
            sound(word, "the word")
        except Flaw as flaw:
            if not problems.repairs:
                raise Flaw(flaw.kind, f"line {where.rpartition(':')[2]}: {flaw}") from None
            problems.note(flaw.kind, where, f"{flaw}, and left out of its sentence", "repaired")
            return False
        return True

    def _column(self, lines: list, column: str) -> list[str]:
        found = []
        for number, columns in lines:
            try:
                found.append(cell(columns, column))
            except Flaw as flaw:
                raise Flaw(flaw.kind, f"line {number}: {flaw}") from None
        return found

    def _tag_column(self, lines: list, labelled: bool) -> list[str] | None:
        column = self.config.label_column or "-1"
        if not labelled and (len(lines[0][1]) == 1 or column == "-1"):
            # Without labels the last column may be anything.
            return None
        try:
            return self._column(lines, column)
        except Flaw:
            if labelled:
                raise
            return None

    def _tag_list(self, value: dict, labelled: bool) -> list[str] | None:
        try:
            return [self._tag(one) for one in self._list(value, self.config.label_column or "tags")]
        except Flaw:
            if labelled:
                raise
            return None

    def _list(self, value: dict, column: str) -> list:
        found = cell(value, column)
        if not isinstance(found, list):
            raise Flaw(
                "no words",
                f"column {column!r} is {kind_of_value(found)}, not a list: give lists of the words "
                "and tags of each sentence, or a word and its tag in each line by "
                "--task.file-format conll; places of characters need to be made tags first",
            )
        return found

    def _tag(self, tag: Any) -> str:
        """A tag by its name; a number is its place among `config.labels`."""
        if isinstance(tag, str):
            return tag.strip()
        labels, first = self.config.labels, self.config.first_label
        if isinstance(tag, int) and not isinstance(tag, bool) and 0 <= tag - first < len(labels):
            return labels[tag - first]
        raise Flaw(
            "broken tags",
            f"{json.dumps(tag)} is a tag, and no string; give the names of tags in the order of "
            "their numbers, as in --task.labels O B-PER I-PER",
        )

    def _sound_tags(
        self, tags: Sequence[str], where: Sequence[str], problems: Problems
    ) -> tuple[str, ...]:
        scheme = self.config.scheme
        plain = [plain_tag(tag.strip(), scheme) for tag in tags]
        if scheme == "io":  # it has no letter but I, so a tag of another scheme is no kind of it
            plain = [
                None if tag.startswith("B-") else one for tag, one in zip(tags, plain, strict=True)
            ]
        if None in plain:
            place = plain.index(None)
            line = where[place].rpartition(":")[2]
            raise Flaw(
                "broken tags",
                f"line {line}: {tags[place]!r} is no tag of {scheme}{_fitting(tags, scheme)}; give "
                "--task.scheme, or another column with --task.label-column, and that of the words "
                "with --task.text-column",
            )
        found = entities(plain)
        place = first_broken(plain, scheme)
        if place is not None:
            before = plain[place - 1] if place else "the beginning"
            why = f"{plain[place]} after {before} is not {scheme}{_fitting(tags, scheme)}"
            if not problems.repairs:
                raise Flaw("broken tags", f"line {where[place].rpartition(':')[2]}: {why}")
            problems.note("broken tags", where[place], why, "repaired")
        tags = tuple(write_tags(found, len(plain), "iob2"))
        kinds = head_tags(self.labels).kinds
        for one in found:
            if self.labels and one.kind not in kinds:
                hint = did_you_mean(one.kind, kinds)
                raise Flaw("unknown label", f"no entity {one.kind!r} was in training.{hint}")
        return tags

    def fitted(self, examples: Sequence[Tagged]) -> Self:
        kinds = {one.kind for example in examples for one in entities(example.tags or ())}
        found = ("O", *(f"{letter}-{kind}" for kind in sorted(kinds) for letter in "BI"))
        fitted = replace(self, labels=self.labels or self.config.labels or found)
        if self.config.class_weights == "balanced":
            tags = (head_tags(fitted.labels).numbers(one.tags or ()) for one in examples)
            counts = Counter(number for numbers in tags for number in numbers)
            fitted = replace(fitted, weights=balanced(counts, len(fitted.labels)))
        return fitted

    # --- tokens and outputs --------------------------------------------------------------------

    def encode(
        self, example: Tagged, tokenizer: Tokenizer, size: int, problems: Problems
    ) -> list[Encoded]:
        """The beginning and the words; of `config.repeat`, twice. No token is of two words, and the
        tag of a word is said at its last token, which sees all of it.
        """
        units = self._units(example.words, tokenizer)
        if self.config.repeat:
            separator = going_on(self.config.separator, tokenizer)
            room = (size - self.config.delimit - len(separator)) // 2
        else:
            separator, room = np.zeros(0, np.int32), size - self.config.delimit
        sizes = np.array([len(unit) for unit in units])
        found = windows(sizes, room, self.config.overlap)
        if found is None or (len(found) > 1 and self.config.too_long != "window"):
            length = int(sizes.sum()) * (1 + self.config.repeat) + len(separator)
            length += self.config.delimit
            tell_too_long(self.config, example.where, length, size, problems)
            return []
        numbers = example.tags and head_tags(self.labels).numbers(example.tags)
        return [self._window(numbers, units, separator, one, tokenizer) for one in found]

    def _units(self, words: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
        rest = [self._between(*pair) + pair[1] for pair in pairwise(words)]
        units = [tokenizer.encode(words[0]), *going_on_each(rest, tokenizer)]
        # A tokenizer that normalises may leave nothing of a word.
        return [unit if len(unit) else going_on("?", tokenizer) for unit in units]

    def _between(self, before: str, word: str) -> str:
        joiner = self.config.joiner
        return space_between(before, word) if joiner is None else joiner

    def _window(
        self,
        numbers: list[int] | None,
        units: list[np.ndarray],
        separator: np.ndarray,
        window: tuple[int, int, int],
        tokenizer: Tokenizer,
    ) -> Encoded:
        start, counted, stop = window
        shown = joined(units[start:stop])
        before, _ = delimiters(self.config, tokenizer)
        if self.config.repeat:
            before = joined([before, shown, separator])
        tokens = joined([before, shown])
        last = len(before) - 1 + np.cumsum([len(unit) for unit in units[start:stop]])
        places, words = last[counted - start :], np.arange(counted, stop)
        targets = np.zeros(len(tokens), np.int32)
        weights = np.zeros(len(tokens), np.float32)
        if numbers is not None:
            targets[places] = [numbers[word] for word in words]
            weights[places] = np.float32(self.weights)[targets[places]] if self.weights else 1.0
        units_of = np.stack([places, words, np.zeros_like(words)], axis=1).astype(np.int32)
        return Encoded(tokens, targets, weights, units_of)

    def decode(
        self, example: Tagged, windows: Sequence[Encoded], outputs: Sequence[np.ndarray]
    ) -> Prediction:
        tags, names = ["O"] * len(example.words), head_tags(self.labels).tags
        for one, out in zip(windows, outputs, strict=True):
            numbers = out[one.units[:, 0]].argmax(axis=1)
            for word, number in zip(one.units[:, 1], numbers, strict=True):
                tags[word] = names[number]
        return self._said(example, tags)

    def _said(self, example: Tagged, tags: Sequence[str]) -> Prediction:
        found = entities(tags)
        return {
            "words": list(example.words),
            "tags": write_tags(found, len(tags), "iob2"),
            "entities": [
                {
                    "kind": kind,
                    "start": start,
                    "stop": stop,
                    "text": self._text(example, start, stop),
                }
                for kind, start, stop in found
            ],
        }

    def _text(self, example: Tagged, start: int = 0, stop: int | None = None) -> str:
        words = example.words[start:stop]
        return words[0] + "".join(self._between(*pair) + pair[1] for pair in pairwise(words))

    # --- prompting -----------------------------------------------------------------------------

    def prompt(self, example: Tagged) -> str:
        return filled(self.config.template or "{text}\nentities:", {"text": self._text(example)})

    def target(self, example: Tagged) -> str:
        """The names with their kinds, such as ` Ann Lee (PER); Rome (LOC)`, or ` none`."""
        said = [
            f"{self._text(example, one.start, one.stop)} ({one.kind})"
            for one in entities(example.tags or ())
        ]
        return " " + ("; ".join(said) or "none")

    def requests(self, example: Tagged) -> list[Request]:
        return []

    def from_scores(self, example: Tagged, scores: np.ndarray) -> Prediction:
        raise AssertionError("entities are written, not chosen")

    def from_text(self, example: Tagged, text: str) -> Prediction:
        """The names in a list as `target` writes it, where the sentence has them: the first that is
        free for each.
        """
        kinds = head_tags(self.labels).kinds
        found: list[Entity] = []
        taken = [False] * len(example.words)
        for name, kind in re.findall(r"\s*([^;\n]+?) \(([^()]+)\)", text.strip().split("\n")[0]):
            if kind not in kinds:
                continue
            for start, stop in self._places(example, name):
                if not any(taken[start:stop]):
                    taken[start:stop] = [True] * (stop - start)
                    found.append(Entity(kind, start, stop))
                    break
        return self._said(example, write_tags(found, len(example.words), "iob2"))

    def _places(self, example: Tagged, name: str) -> Iterator[tuple[int, int]]:
        """Where a sentence has a name, in words."""
        for start in range(len(example.words)):
            for stop in range(start + 1, len(example.words) + 1):
                text = self._text(example, start, stop)
                if text == name:
                    yield start, stop
                if len(text) >= len(name):
                    break

    # --- figures -------------------------------------------------------------------------------

    def metrics(
        self, examples: Sequence[Tagged], predictions: Sequence[Prediction]
    ) -> dict[str, float]:
        truth, said = [one.tags for one in examples], [one["tags"] for one in predictions]
        return entity_figures(truth, said)

    def measure(
        self, examples: Sequence[Tagged], predictions: Sequence[Prediction]
    ) -> tuple[str, np.ndarray | None]:
        truth, said = [one.tags for one in examples], [one["tags"] for one in predictions]
        return "f1", entity_counts(truth, said)


def _in_lines(value: Any) -> bool:
    """Whether a record is the lines of a sentence."""
    return isinstance(value, list) and all(isinstance(one, tuple) for one in value)


def _refuse_numbers(words: Sequence[Any], config: TaskConfig, columns: int) -> None:
    """Raises:
    Flaw: if the first of several columns numbers the words, and nobody says that it has them.
    """
    numbered = any(
        [*words] == [str(number) for number in range(first, len(words) + first)] for first in (0, 1)
    )
    if config.text_column is None and columns > 2 and len(words) > 1 and numbered:
        raise Flaw(
            "no words",
            "the first column numbers the words: give --task.text-column, as in 2, and "
            "--task.label-column",
        )


def _note_language(words: Sequence[str], where: str, problems: Problems) -> None:
    """Tell of a language before each word, as in en:Rome, which WikiANN's files have."""
    prefix = re.match(r"[a-z-]{2,12}:", words[0])
    if prefix and len(words) > 1 and all(word.startswith(prefix[0]) for word in words):
        why = f"{words[0]!r}; `sed 's/^{prefix[0]}//'` takes it off"
        problems.note("perhaps a language before words", where, why, "kept")


def _fitting(tags: Sequence[str], scheme: Scheme) -> str:
    """Words for another scheme that tags are well formed in."""
    for other in ("iob1", "iob2", "bioes"):
        plain = [plain_tag(tag.strip(), other) for tag in tags]
        if other != scheme and None not in plain and first_broken(plain, other) is None:
            return f", but it would be --task.scheme {other}"
    return ""
