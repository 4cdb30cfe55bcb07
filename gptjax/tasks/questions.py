"""Questions whose answers are passages of a text: SQuAD 1.1 and 2.0, CMRC 2018."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from gptjax.config import TaskConfig
from gptjax.sources import DataError
from gptjax.tasks.cells import Flaw, kind_of_value, sound
from gptjax.tasks.formats import load_whole
from gptjax.tasks.metrics import answer_figures, answer_scores
from gptjax.tasks.problems import Problems
from gptjax.tasks.prompts import filled
from gptjax.tasks.records import find_files, read_records
from gptjax.tasks.task import (
    Encoded,
    Prediction,
    Request,
    delimiters,
    encode_with_places,
    joined,
    tell_too_long,
    windows,
)
from gptjax.tokenizer import Tokenizer


class Span(NamedTuple):
    """A passage of a text, in characters."""

    start: int
    stop: int


@dataclass(frozen=True)
class Question:
    """A question about a text."""

    where: str
    id: str
    question: str
    context: str
    answers: tuple[str, ...] | None  # all that are right; () if there is none; None: not known
    spans: tuple[Span, ...]  # where they are, of those that are where their file says


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Where a text answers a question, and of "squad2" whether it does."""

    config: TaskConfig

    name = "questions"
    head: Literal["span"] = "span"
    labels = ()
    several = False
    stops = ()

    def read(
        self, paths: Iterable[str], problems: Problems, *, labelled: bool = True
    ) -> Iterator[Question]:
        """Of JSON as SQuAD has it, `{"data": [{"paragraphs": [{"context", "qas"}]}]}`; or of a
        list, JSONL and Parquet with `context`, `question` and `answers`, as Hugging Face has it, or
        with `context` and `qas`, as MRQA has it after a line of a `header`.

        An answer that is not where its file says is counted; it still counts as right when a
        model's is compared with it, but cannot be learnt, unless it is repaired: moved to the
        nearest place that has it.
        """
        for source, kind, key in find_files(self.config, paths, problems.split):
            if kind == "json":
                yield from self._squad(source.where, key or "data", problems, labelled)
            else:
                yield from self._flat(source.where, problems, labelled)

    def _squad(
        self, where: str, key: str, problems: Problems, labelled: bool
    ) -> Iterator[Question]:
        value = load_whole(where, "json")
        articles = value.get(key) if isinstance(value, dict) else value
        if not isinstance(articles, list):
            raise DataError(
                f"{where}: {kind_of_value(value)} without a list {key!r}, which SQuAD's JSON has "
                "as 'data'; give FILE@KEY for another, or --task.file-format jsonl for a question "
                "in each line"
            )
        for number, article in enumerate(articles, 1):
            paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
            for place, paragraph in enumerate(paragraphs or [article], 1):
                here = f"{where}: article {number}, paragraph {place}"
                yield from self._paragraph(paragraph, here, problems, labelled)

    def _paragraph(
        self, paragraph: Any, where: str, problems: Problems, labelled: bool
    ) -> Iterator[Question]:
        asked = paragraph.get("qas") if isinstance(paragraph, dict) else None
        if asked is None and isinstance(paragraph, dict) and "question" in paragraph:
            asked = [paragraph]  # a question with its own context
        if not isinstance(asked, list):
            problems.read += 1
            why = "there is no list 'qas', and no 'question' with a 'context'"
            problems.bad("no questions", where, why)
            return
        for number, one in enumerate(asked, 1):
            problems.read += 1
            here = f"{where}, question {number}"
            if isinstance(one, dict):
                here = f"{where}, question {one.get('id', one.get('qid', number))}"
                one = one | {name: paragraph[name] for name in ("context",) if name in paragraph}
            try:
                yield self._example(one, here, problems, labelled)
            except Flaw as flaw:
                problems.bad(flaw.kind, here, str(flaw))

    def _flat(self, path: str, problems: Problems, labelled: bool) -> Iterator[Question]:
        for where, value in read_records(self.config, (path,), problems):
            if isinstance(value, dict) and ("qas" in value or [*value] == ["header"]):
                problems.read -= 1  # its questions count
                if "qas" in value:
                    yield from self._paragraph(value, where, problems, labelled)
                continue
            try:
                yield self._example(value, where, problems, labelled)
            except Flaw as flaw:
                problems.bad(flaw.kind, where, str(flaw))

    def _example(self, value: Any, where: str, problems: Problems, labelled: bool) -> Question:
        if not isinstance(value, dict):
            raise Flaw("no question", f"{kind_of_value(value)}, not an object")
        texts = {}
        for name in ("context", "question"):
            if name not in value:
                raise Flaw("no text", f"there is no {name!r} but {', '.join(map(repr, value))}")
            if not isinstance(value[name], str):
                raise Flaw("no text", f"{name!r} is {kind_of_value(value[name])}")
            texts[name] = sound(value[name], name)
        name = str(value.get("id", value.get("qid", where)))
        unknown = Question(where, name, texts["question"], texts["context"], None, ())
        try:
            return self._answered(value, unknown, problems, labelled)
        except Flaw:
            if labelled:
                raise
            return unknown  # the answers are not needed

    def _answered(
        self, value: dict, unknown: Question, problems: Problems, labelled: bool
    ) -> Question:
        """A question with its answers."""
        answers, where = value.get("detected_answers", value.get("answers")), unknown.where
        if answers is None:
            if labelled:
                raise Flaw("no label", "there are no 'answers'")
            return unknown
        if isinstance(answers, dict):
            answers = self._pairs(answers)
        if not isinstance(answers, list):
            raise Flaw("no label", f"'answers' is {kind_of_value(answers)}, not a list")
        if value.get("is_impossible"):
            answers = []
        if not answers and self.config.answers != "squad2" and labelled:
            why = "there is no answer; give --task.answers squad2, which has such questions"
            raise Flaw("no label", why)
        right, spans = [], []
        for answer in answers:
            text, start = self._answer(answer)
            right.append(text)
            span = self._place(unknown.context, text, start, where, problems) if labelled else None
            spans += [span] if span else []
        return replace(unknown, answers=tuple(right), spans=tuple(spans))

    def _pairs(self, answers: dict) -> list[dict]:
        """Answers of which there are lists of texts and of starts, as Hugging Face has them."""
        texts, starts = answers.get("text"), answers.get("answer_start")
        if not isinstance(texts, list):
            return [answers]
        if not isinstance(starts, list) or len(texts) != len(starts):
            raise Flaw(
                "no label",
                f"'answers' has {len(texts)} texts, and 'answer_start' is "
                + (f"{len(starts)} numbers" if isinstance(starts, list) else kind_of_value(starts)),
            )
        pairs = zip(texts, starts, strict=True)
        return [{"text": text, "answer_start": start} for text, start in pairs]

    def _answer(self, answer: Any) -> tuple[str, int]:
        if not isinstance(answer, dict):
            raise Flaw("no label", f"an answer is {kind_of_value(answer)}, not an object")
        text, start = answer.get("text"), answer.get("answer_start")
        spans = answer.get("char_spans")  # of MRQA: first and last characters
        if start is None and spans and isinstance(spans, list) and isinstance(spans[0], list):
            start = next(iter(spans[0]), None)
        if not isinstance(text, str):
            raise Flaw("no label", f"the text of an answer is {kind_of_value(text)}")
        if not isinstance(start, int) or isinstance(start, bool):
            raise Flaw("no label", f"'answer_start' is {kind_of_value(start)}, not a whole number")
        return sound(text, "an answer"), start

    def _place(
        self, context: str, text: str, start: int, where: str, problems: Problems
    ) -> Span | None:
        if start >= 0 and context[start : start + len(text)] == text:
            return Span(start, start + len(text))
        there = context[max(start, 0) : max(start, 0) + len(text)]
        why = f"at {start} is {there!r}, not the answer {text!r}"
        if problems.repairs:
            found = nearest(context, text, start)
            if found is not None:
                problems.note("answer not at its place", where, why, "repaired")
                return Span(found, found + len(text))
        if problems.policy == "error":
            raise Flaw("answer not at its place", why)
        kind = "answer not at its place"
        problems.note(kind if text in context else "answer not in the text", where, why, "left out")
        return None

    def fitted(self, examples: Sequence[Question]) -> Self:
        return self

    # --- tokens and outputs --------------------------------------------------------------------

    def encode(
        self, example: Question, tokenizer: Tokenizer, size: int, problems: Problems
    ) -> list[Encoded]:
        """The beginning, the question, a part of the text, end-of-text.

        The question comes first, for a token sees what is before it. In a window without the
        answer, and where there is none, the target is the last token. A question whose answers are
        nowhere to be found has weights of 0.
        """
        question = tokenizer.encode(example.question + self.config.separator)
        context, places = encode_with_places(example.context, tokenizer, begins=False)
        opening, end = delimiters(self.config, tokenizer)
        before = joined([opening, question])
        room = size - len(before) - len(end)
        found = windows(np.ones(len(context), int), room, self.config.overlap) if room > 0 else None
        if found is None or (len(found) > 1 and self.config.too_long != "window"):
            length = len(context) + size - room
            tell_too_long(self.config, example.where, length, size, problems)
            return []
        answer = self._tokens_of(example, places, problems) if example.spans else None
        known = example.answers is not None and (bool(example.spans) or not example.answers)
        encoded = []
        for start, _, stop in found:
            tokens = joined([before, context[start:stop], end])
            begin, last = len(before), len(tokens) - 1
            targets, weights = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.float32)
            inside = answer is not None and start <= answer[0] and answer[1] < stop
            ends = [begin + place - start for place in answer] if inside else [last, last]
            for bit, place in enumerate(ends):
                targets[place] |= 1 << bit
                weights[place] += 0.5 * known
            units = np.stack(
                [begin + np.arange(stop - start), *places[start:stop].T], axis=1
            ).astype(np.int32)
            encoded.append(Encoded(tokens, targets, weights, units))
        return encoded

    def _tokens_of(
        self, example: Question, places: np.ndarray, problems: Problems
    ) -> tuple[int, int]:
        """The first and last token of the first answer, in tokens of the context."""
        start, stop = example.spans[0]
        first = int(np.searchsorted(places[:, 1], start, side="right"))
        last = int(np.searchsorted(places[:, 0], stop, side="left")) - 1
        first, last = min(first, len(places) - 1), max(last, min(first, len(places) - 1))
        shown = example.context[places[first, 0] : places[last, 1]]
        if shown.strip() != example.context[start:stop].strip():
            why = f"tokens give {shown!r} for {example.context[start:stop]!r}"
            problems.note("answer ends within a token", example.where, why, "kept")
        return first, last

    def decode(
        self, example: Question, windows: Sequence[Encoded], outputs: Sequence[np.ndarray]
    ) -> Prediction:
        """The passage with the greatest sum of the logits of its two ends, over all windows; of
        "squad2" none, where the last token has more in every window.

        `no_answer` is how much more; negative where the passage has more.
        """
        best, none = (-np.inf, 0, 0), np.inf
        for one, out in zip(windows, outputs, strict=True):
            begin, end = np.asarray(out, np.float64)[one.units[:, 0]].T
            score, first, last = best_passage(begin, end, self.config.max_answer)
            if score > best[0]:
                best = (score, int(one.units[first, 1]), int(one.units[last, 2]))
            none = min(none, float(out[-1].sum()))
        score, start, stop = best
        text = example.context[start:stop]
        start += len(text) - len(text.lstrip())
        text = text.strip()
        said = {"id": example.id, "passage": text, "start": start, "stop": start + len(text)}
        said |= {"score": float(score), "no_answer": none - float(score)}
        empty = self.config.answers == "squad2" and none > score
        return said | {"text": "" if empty else text}

    # --- prompting -----------------------------------------------------------------------------

    def prompt(self, example: Question) -> str:
        template = self.config.template or "{context}\nQuestion: {question}\nAnswer:"
        return filled(template, {"context": example.context, "question": example.question})

    def target(self, example: Question) -> str:
        return " " + (example.answers[0] if example.answers else "none")

    def requests(self, example: Question) -> list[Request]:
        return []

    def from_scores(self, example: Question, scores: np.ndarray) -> Prediction:
        raise AssertionError("answers are written, not chosen")

    def from_text(self, example: Question, text: str) -> Prediction:
        said = text.strip().split("\n")[0].strip()
        none = self.config.answers == "squad2" and said == "none"
        return {"id": example.id, "text": "" if none else said, "no_answer": float(none)}

    # --- figures -------------------------------------------------------------------------------

    def metrics(
        self, examples: Sequence[Question], predictions: Sequence[Prediction]
    ) -> dict[str, float]:
        right = [one.answers for one in examples]
        return answer_figures(
            right,
            [one["text"] for one in predictions],
            self.config.answers,
            passages=[one.get("passage", one["text"]) for one in predictions],
            no_answer=[one["no_answer"] for one in predictions],
        )

    def measure(
        self, examples: Sequence[Question], predictions: Sequence[Prediction]
    ) -> tuple[str, np.ndarray | None]:
        pairs = zip(examples, predictions, strict=True)
        scores = [
            answer_scores(one.answers, said["text"], self.config.answers) for one, said in pairs
        ]
        return "f1", np.array([[f1] for _, f1 in scores])


def nearest(context: str, text: str, start: int) -> int | None:
    """The place nearest to `start` at which a context has a text."""
    places, place = [], context.find(text)
    while place >= 0:
        places.append(place)
        place = context.find(text, place + 1)
    return min(places, key=lambda place: abs(place - start), default=None)


def best_passage(begin: np.ndarray, end: np.ndarray, most: int) -> tuple[float, int, int]:
    """The greatest begin[i] + end[j] with i <= j < i + most, and i and j; of equals the first
    shortest.
    """
    best = (-np.inf, 0, 0)
    for length in range(min(most, len(begin))):
        sums = begin[: len(begin) - length] + end[length:]
        first = int(sums.argmax())
        if sums[first] > best[0]:
            best = (float(sums[first]), first, first + length)
    return best
