"""What a task is, and how its examples become tokens and what is to be said of them."""

import functools
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, Self

import numpy as np

from gptjax.config import TaskConfig
from gptjax.tasks.problems import Problems
from gptjax.tokenizer import Tokenizer

# What a model says of an example, as a line of JSON has it.
Prediction = dict[str, Any]


class Encoded(NamedTuple):
    """One example, or a window of one, as a row would hold it if it were alone.

    By head, `targets` and `weights` have at each token:
      lm: the token that follows, where that is to be learnt.
      label: the number of a class or tag. Of several labels, bit i of word i // 31 is label i; the
        word of the lowest labels is at the weighted token, and the others at those before it.
      span: 1 where the answer begins, 2 where it ends, 3 where it does both. The weight is 1/2 for
        each, so that an example weighs 1: its loss is the mean of the cross entropies of begin and
        end over its tokens. An answer that is not there is at the last token, which sees all.
    """

    tokens: np.ndarray  # int32 [n]
    targets: np.ndarray  # int32 [n]
    weights: np.ndarray  # float32 [n]: 0 where nothing counts
    # What outputs are of, int32 [m, 3]: a token that says something, and for
    # a label: 0, 0; a tag: number of its word, 0; a span: its first character, and one after
    units: np.ndarray


class Request(NamedTuple):
    """What a language model is asked to go on from, and a continuation that is scored."""

    prompt: str
    target: str
    bare: str  # the prompt without the example, for the unconditional likelihood


class Task(Protocol):
    """Labelled examples of a kind: reading them, showing them to a model, and judging it.

    An example is a frozen dataclass with `where` it was read. Tasks are values: `fitted` returns
    another one.
    """

    name: str
    head: Literal["lm", "label", "span"]
    labels: tuple[str, ...]  # classes or tags, in the order of the head's outputs; () for others
    several: bool  # any number of labels is right at once
    stops: tuple[str, ...]  # strings that end a text that is written

    def read(
        self, paths: Iterable[str], problems: Problems, *, labelled: bool = True
    ) -> Iterator[Any]:
        """The examples of files, in order; `labelled` False takes records without labels too.

        Labels must be those of the task, once it has some.
        """

    def fitted(self, examples: Sequence[Any]) -> Self:
        """The task with what is taken from training examples: the labels, and their weights."""

    def encode(
        self, example: Any, tokenizer: Tokenizer, size: int, problems: Problems
    ) -> list[Encoded]:
        """An example in rows of at most `size` tokens; none if it is too long, which is told.

        Without a label, weights are 0.
        """

    def decode(
        self, example: Any, windows: Sequence[Encoded], outputs: Sequence[np.ndarray]
    ) -> Prediction:
        """What a model with the task's head says.

        Args:
          windows: as `encode` returned them.
          outputs: for each the logits at its tokens, [n, C]; of the span head [n, 2].
        """

    def prompt(self, example: Any) -> str:
        """What a language model is shown of an example."""

    def target(self, example: Any) -> str:
        """What it should write then."""

    def requests(self, example: Any) -> list[Request]:
        """The choices that it has; none where it writes freely."""

    def from_scores(self, example: Any, scores: np.ndarray) -> Prediction:
        """What the scores of the choices say, [choices]."""

    def from_text(self, example: Any, text: str) -> Prediction:
        """What a written continuation says."""

    def metrics(
        self, examples: Sequence[Any], predictions: Sequence[Prediction]
    ) -> dict[str, float]:
        """The field's own figures."""

    def measure(
        self, examples: Sequence[Any], predictions: Sequence[Prediction]
    ) -> tuple[str, np.ndarray | None]:
        """The name of the figure that an interval is given of, and what each example adds to it,
        [examples, m]; None if it is no sum. `best.best_by` has that of the best step.
        """


def next_tokens(
    ids: Sequence[int] | np.ndarray, counts: np.ndarray, units: np.ndarray | None = None
) -> Encoded:
    """For the lm head: each of the ids is to be predicted from those before, where it counts.

    Args:
      ids: one more than there will be tokens.
      counts: float [len(ids)]: the weight of each as a target; that of the first is passed over.
    """
    ids = np.asarray(ids, np.int32)
    return Encoded(
        ids[:-1], ids[1:], np.float32(counts[1:]), no_units() if units is None else units
    )


def balanced(counts: Counter[int], num_labels: int) -> tuple[float, ...]:
    """Weights of labels whose mean over the examples is 1, as scikit-learn has them of the labels
    that are there; one that is not weighs 1.

    >>> balanced(Counter({0: 3, 1: 1}), 3)
    (0.6666666666666666, 2.0, 1.0)
    """
    share = counts.total() / max(len(+counts), 1)
    of_each = [counts[number] for number in range(num_labels)]
    return tuple(share / count if count else 1.0 for count in of_each)


def delimiters(config: TaskConfig, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The ids before an example and after it."""
    begin, end = np.int32([tokenizer.begin]), np.int32([tokenizer.end])
    return (begin, end) if config.delimit else (begin[:0], end[:0])


def no_units() -> np.ndarray:
    return np.zeros((0, 3), np.int32)


def going_on(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a text that goes on from another, whose ids stay as they are."""
    return going_on_each([text], tokenizer)[0]


def going_on_each(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """The same of several."""
    contents = [text.encode() for text in texts]
    if not tokenizer.normalises:  # then it does not matter, and all at once is quicker
        return tokenizer.encode_batch(contents)
    return [joined(list(tokenizer.encode_pieces([one], begins=False))) for one in contents]


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)


# --- what does not fit -------------------------------------------------------------------------


def tell_too_long(
    config: TaskConfig, where: str, length: int, size: int, problems: Problems
) -> None:
    """An example that is left out for its length; refused, unless the config says to skip it."""
    why = (
        f"{length:,} tokens, but a row holds {size:,}: give a larger model.context_size in "
        "training, or leave such out: --task.too-long skip"
    )
    if config.too_long == "skip":
        problems.note("too long", where, why, "left out")
    else:
        problems.bad("too long", where, why)


class Window(NamedTuple):
    """Units from start to stop; those from `counted` on have not been in a window before."""

    start: int
    counted: int
    stop: int


def windows(sizes: np.ndarray, room: int, overlap: int) -> list[Window] | None:
    """Windows that hold every unit, in order, and each as many as fit.

    Args:
      sizes: tokens of each unit, int [n].
      room: tokens of a window.
      overlap: units that a window shows again from the one before; fewer where several would take
        more than half of its room, or what comes next would not fit.
    Returns:
      None if a unit alone does not fit.

    >>> windows(np.ones(5, int), room=4, overlap=1)
    [Window(start=0, counted=0, stop=4), Window(start=3, counted=4, stop=5)]
    """
    ends = np.concatenate([[0], np.cumsum(sizes)])
    if len(sizes) and max(sizes) > room:
        return None
    found, start, counted = [], 0, 0
    while True:
        stop = int(np.searchsorted(ends, ends[start] + room, side="right")) - 1
        found.append(Window(start, counted, stop))
        if stop >= len(sizes):
            return found
        # The next unit must fit, and what is shown again must not crowd out what is new; but one
        # unit, such as the question that a reply is to, may be as long as it is.
        least = max(ends[stop + 1] - room, min(ends[stop] - room // 2, ends[stop - 1]))
        start = max(int(np.searchsorted(ends, least)), stop - overlap, start)
        counted = stop


# --- where tokens lie in a text ----------------------------------------------------------------


@functools.lru_cache(maxsize=4)  # of many questions about one text
def encode_with_places(
    text: str, tokenizer: Tokenizer, *, begins: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a text, and for each its first character and one after its last, int32 [n, 2].

    Exact where the tokenizer changes nothing: a token that holds a part of a character counts all
    of it. Where it normalises, the text that comes back is laid beside the one that was given.

    Args:
      begins: whether the text begins one, or goes on from another.
    """
    ids = tokenizer.encode(text) if begins else going_on(text, tokenizer)
    sizes = np.asarray(tokenizer.bytes_per_token)[ids]
    stops = np.cumsum(sizes)
    shown = text if not tokenizer.normalises else tokenizer.decode(ids)
    char_of_byte = _char_of_byte(shown)
    first = char_of_byte[np.minimum(stops - sizes, len(char_of_byte) - 1)]
    after = np.where(sizes > 0, char_of_byte[np.maximum(stops - 1, 0)] + 1, first)
    if tokenizer.normalises:
        begin_of, end_of = _beside(text, shown)
        first, after = (
            begin_of[first],
            np.maximum(end_of[np.maximum(after - 1, 0)], begin_of[first]),
        )
    return ids, np.stack([first, after], axis=1).astype(np.int32)


def _char_of_byte(text: str) -> np.ndarray:
    """The number of the character that each byte of UTF-8 belongs to, and one after the last."""
    content = np.frombuffer(text.encode(), np.uint8)
    begins = (content & 0xC0) != 0x80
    return np.concatenate([np.cumsum(begins) - 1, [len(text)]])


def _beside(text: str, shown: str) -> tuple[np.ndarray, np.ndarray]:
    """For each character of `shown`, and one more, the first and one after the last of `text` that
    it stands for: equal ones are laid beside each other from left to right, and where none are, the
    nearest place at which they are again is looked for.
    """
    left, right = _folded(text), _folded(shown)
    begins = np.full(len(shown) + 1, -1)
    ends = np.full(len(shown) + 1, -1)
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i][0] != right[j][0]:
            i, j = _together_again(left, right, i, j)
            continue
        place = right[j][1]
        begins[place] = left[i][1] if begins[place] < 0 else begins[place]
        ends[place] = left[i][1] + 1
        i, j = i + 1, j + 1
    # What stands for nothing lies between its neighbours.
    at = 0
    for place in range(len(shown) + 1):
        if begins[place] < 0:
            begins[place] = ends[place] = at
        at = ends[place]
    begins[-1] = ends[-1] = len(text)
    return begins, ends


def _folded(text: str) -> list[tuple[str, int]]:
    """The characters that normalising leaves alone, each with the place of the one it is from."""
    return [
        (part, place)
        for place, char in enumerate(text)
        for part in unicodedata.normalize("NFKC", char).casefold()
    ]


def _together_again(left: list, right: list, i: int, j: int, reach: int = 24) -> tuple[int, int]:
    """The nearest places at which the next three characters are the same."""
    for distance in range(1, 2 * reach):
        for ahead in range(max(0, distance - reach), min(distance, reach) + 1):
            here = [char for char, _ in left[i + ahead : i + ahead + 3]]
            there = [char for char, _ in right[j + distance - ahead : j + distance - ahead + 3]]
            if here and here == there:
                return i + ahead, j + distance - ahead
    return i + 1, j + 1


# --- texts side by side ------------------------------------------------------------------------

# Scripts that are written without spaces: Thai, Lao, Myanmar, Khmer; and the signs, kana, and
# ideographs of Chinese and Japanese, with their wide forms. First and last code point of each.
SPACELESS = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x2E80, 0x312F),
    (0x31A0, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFE30, 0xFE4F),
    (0xFF00, 0xFFEF),
    (0x20000, 0x3FFFF),
)


def spaceless(char: str) -> bool:
    return any(first <= ord(char) <= last for first, last in SPACELESS)


def space_between(before: str, after: str) -> str:
    """What is written between two texts: a space, but nothing beside white space, or beside a
    script that is written without.
    """
    if not before or not after or before[-1].isspace() or after[0].isspace():
        return ""
    return "" if spaceless(before[-1]) or spaceless(after[0]) else " "
