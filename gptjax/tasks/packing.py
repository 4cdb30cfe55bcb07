"""Whole examples in rows: several in one, each as if it were alone."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gptjax.data import Batch, Which, batch_number, permute
from gptjax.sources import DataError
from gptjax.tasks.problems import Problems
from gptjax.tasks.task import Encoded, Task
from gptjax.tokenizer import Tokenizer


class Encodings(NamedTuple):
    """Examples and windows of them as tokens, one after the other."""

    tokens: np.ndarray  # int32, as the next two of all of them
    targets: np.ndarray  # int32
    weights: np.ndarray  # float32
    starts: np.ndarray  # int64 [n + 1]: where each begins, and the last ends
    units: np.ndarray  # int32 [., 3]
    unit_starts: np.ndarray  # int64 [n + 1]
    example_of: np.ndarray  # int64 [n]: the number of the example that each is, or is a part of

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def one(self, number: int) -> Encoded:
        here = slice(self.starts[number], self.starts[number + 1])
        units = self.units[self.unit_starts[number] : self.unit_starts[number + 1]]
        return Encoded(self.tokens[here], self.targets[here], self.weights[here], units)


def encode_examples(
    task: Task,
    examples: Iterable[Any],
    tokenizer: Tokenizer,
    size: int,
    problems: Problems,
    *,
    to_learn: bool,
) -> Encodings:
    """The examples as tokens, in rows of at most `size`.

    Args:
      problems: told of what is too long.
      to_learn: leave out windows in which nothing has a weight, and tell of examples of which
        nothing is left, such as a question whose answer is not in its text.
    """
    parts, example_of = [], []
    for number, example in enumerate(examples):
        windows = task.encode(example, tokenizer, size, problems)
        assert all(len(one.tokens) <= size for one in windows), example.where
        kept = [one for one in windows if one.weights.any()] if to_learn else windows
        if windows and not kept:
            why = "it has no label, or none that can be shown"
            problems.note("nothing to learn", example.where, why, "left out")
        parts += kept
        example_of += [number] * len(kept)
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else [
        np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32),
        np.zeros((0, 3), np.int32),
    ]  # fmt: skip
    tokens, targets, weights, units = columns
    return Encodings(
        tokens,
        targets,
        weights,
        _starts([len(one.tokens) for one in parts]),
        units,
        _starts([len(one.units) for one in parts]),
        np.array(example_of, np.int64),
    )


def _starts(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


class Packed(NamedTuple):
    """Where each example lies."""

    row: np.ndarray  # int64 [n]
    start: np.ndarray  # int64 [n]: its first place in the row


def pack(lengths: Sequence[int] | np.ndarray, size: int, seed: int) -> Packed:
    """Examples in rows of `size`, none of them cut: in a seeded order, each goes to the first row
    that has room. O(n log n): a tree over the rows knows the most room in each of its branches.

    >>> pack([3, 3, 2], size=5, seed=0)
    Packed(row=array([0, 1, 0]), start=array([0, 0, 3]))
    """
    lengths = np.asarray(lengths, np.int64)
    count = len(lengths)
    if count and lengths.max() > size:
        raise ValueError(f"an example of {lengths.max()} tokens does not fit a row of {size}")
    leaves = 1 << max(count - 1, 0).bit_length()
    most = [size] * (2 * leaves)  # of branch i, its own are 2i and 2i + 1; rows are the last ones
    row, start = np.zeros(count, np.int64), np.zeros(count, np.int64)
    sizes = lengths.tolist()
    for number in permute(np.arange(count), max(count, 1), seed, 0).tolist():
        length, branch = sizes[number], 1
        while branch < leaves:
            branch *= 2
            if most[branch] < length:
                branch += 1
        row[number], start[number] = branch - leaves, size - most[branch]
        most[branch] -= length
        while branch > 1:
            branch //= 2
            left, right = most[2 * branch], most[2 * branch + 1]
            most[branch] = left if left > right else right
    return Packed(row, start)


class Place(NamedTuple):
    """Where a batch has an example."""

    row: int  # of the rows that were asked for
    start: int
    stop: int
    number: int  # among the encoded ones


@dataclass(frozen=True, kw_only=True)
class ExampleRows:
    """Encoded examples in rows, and the order in which batches take the rows: as `data.Rows` is for
    text.

    Which examples share a row is the same in every epoch; the order of the rows is not.
    """

    encoded: Encodings
    context_size: int  # tokens of a row
    batch_size: int  # rows of a global batch
    seed: int
    shuffle: bool  # another order in every epoch; False: that of packing
    pad: int
    once: bool = False  # one epoch, and rows past it are padding: for evaluation
    alone: bool = False  # every example in a row of its own
    skip: tuple[tuple[int, int], ...] = ()  # batches that are passed over, as in `data.Rows`

    @functools.cached_property
    def packed(self) -> Packed:
        lengths = self.encoded.lengths
        if self.alone:
            return Packed(np.arange(len(lengths)), np.zeros(len(lengths), np.int64))
        return pack(lengths, self.context_size, self.seed)

    @functools.cached_property
    def _by_row(self) -> tuple[np.ndarray, np.ndarray]:
        """The examples in the order of rows and places, and where each row's begin."""
        order = np.lexsort([self.packed.start, self.packed.row])
        bounds = np.searchsorted(self.packed.row[order], np.arange(self.num_rows + 1))
        return order, bounds

    @property
    def num_tokens(self) -> int:
        """Of all examples together, without padding."""
        return len(self.encoded.tokens)

    @functools.cached_property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return int(self.packed.row.max()) + 1 if len(self.packed.row) else 0

    @property
    def num_batches(self) -> int:
        """Batches that hold every row once; the last may be padded."""
        return -(-self.num_rows // self.batch_size)

    def epochs(self, steps: int) -> float:
        """How often so many steps see every example."""
        return steps * self.batch_size / self.num_rows

    def batch_number(self, step: int) -> int:
        """The batch that a step sees, both counted from 0."""
        return batch_number(step, self.skip)

    def _rows_at(self, step: int, which: Which) -> np.ndarray:
        """The rows of a batch; -1 for those past the end."""
        drawn = self.batch_number(step) * self.batch_size + np.arange(self.batch_size)[which]
        epoch, index = np.divmod(drawn, max(self.num_rows, 1))
        if self.shuffle:
            index = permute(index, max(self.num_rows, 1), self.seed, epoch)
        return np.where((epoch > 0) & self.once | (self.num_rows == 0), -1, index)

    def places_at(self, step: int, *, which: Which) -> list[Place]:
        """Where the rows `which` of the batch of a step have which examples."""
        order, bounds = self._by_row
        places = []
        for place, row in enumerate(self._rows_at(step, which).tolist()):
            for number in order[bounds[row] : bounds[row + 1]].tolist() if row >= 0 else ():
                start = int(self.packed.start[number])
                length = int(self.encoded.starts[number + 1] - self.encoded.starts[number])
                places.append(Place(place, start, start + length, number))
        return places

    def batch_at(self, step: int, *, which: Which) -> Batch:
        """The rows `which` of the global batch of a step, counted from 0; a pure function."""
        shape = (len(np.arange(self.batch_size)[which]), self.context_size)
        batch = Batch(
            tokens_BT=np.full(shape, self.pad, np.int32),
            targets_BT=np.zeros(shape, np.int32),
            weights_BT=np.zeros(shape, np.float32),
            segments_BT=np.zeros(shape, np.int32),
            positions_BT=np.zeros(shape, np.int32),
        )
        segments = np.zeros(shape[0], np.int32)
        for row, start, stop, number in self.places_at(step, which=which):
            segments[row] += 1
            one, here = self.encoded.one(number), (row, slice(start, stop))
            batch.tokens_BT[here], batch.targets_BT[here] = one.tokens, one.targets
            batch.weights_BT[here] = one.weights
            batch.segments_BT[here] = segments[row]
            batch.positions_BT[here] = np.arange(stop - start)
        return batch


def check_examples(encoded: Encodings, problems: Problems) -> None:
    """Refuse a split of which nothing is left.

    Raises:
      DataError: if it has no example.
    """
    if not len(encoded.example_of):
        lines = "\n".join([f"{problems.split}: no example is left", *problems.lines()])
        header = "" if problems.read else "; the first line of a table names its columns"
        raise DataError(f"{lines}\ngive others, or mend what was left out{header}")
