"""Batches of any step, as a pure function of the stores, the seed and the step.

A checkpoint of the data is therefore an integer, and every process can make its own rows.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np

from gptjax.sources import DataError
from gptjax.store import Store

Item = TypeVar("Item")


class Batch(NamedTuple):
    """Rows of tokens, and what is to be predicted after each."""

    tokens_BT: np.ndarray  # int32
    targets_BT: np.ndarray  # int32: the token that follows
    weights_BT: np.ndarray  # float32: 1 where the target counts, 0 in padding
    segments_BT: np.ndarray  # int32: 1, 2, ... for the documents in the row; 0 in padding
    positions_BT: np.ndarray  # int32: from 0 in each segment


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A store cut into rows, and the order in which batches take them.

    Row i is the tokens from i x context_size on, and their targets lie one further; so in an epoch
    every token of the store but its first is a target exactly once. Documents may be cut by a row's
    end.
    """

    store: Store
    context_size: int  # tokens of a row
    batch_size: int  # rows of a global batch
    seed: int
    shuffle: bool  # another order in every epoch; False: the order of the text
    pad: int
    end: int
    once: bool = False  # one epoch, and rows past it are padding: for evaluation

    @property
    def num_rows(self) -> int:
        """Rows of an epoch; the last may be padded."""
        return _num_rows(self.store.num_tokens, self.context_size)

    @property
    def num_batches(self) -> int:
        """Batches that hold every row once; the last may be padded."""
        return -(-self.num_rows // self.batch_size)


def check_rows(num_tokens: int, context_size: int, batch_size: int, split: str) -> None:
    """Refuse a split that is too small.

    Args:
      num_tokens: of its store.
      split: what an error calls it.
    Raises:
      DataError: if the tokens do not fill a row, or the rows a batch.
    """
    num_targets = num_tokens - 1
    if num_targets < context_size:
        raise DataError(
            f"{split} split: {num_tokens:,} tokens have {num_targets:,} to predict, fewer than a "
            f"row of model.context_size = {context_size:,}; give a context_size of at most "
            f"{num_targets:,}, or more text"
        )
    num_rows = _num_rows(num_tokens, context_size)
    if num_rows < batch_size:
        raise DataError(
            f"{split} split: {num_tokens:,} tokens make {num_rows:,} rows of model.context_size = "
            f"{context_size:,}, fewer than batch_size = {batch_size:,}; give a batch_size of at "
            f"most {num_rows:,}, a smaller context_size, or more text"
        )


def _num_rows(num_tokens: int, context_size: int) -> int:
    return -(-(num_tokens - 1) // context_size)


def batch_at(step: int, rows: Rows, *, which: slice) -> Batch:
    """The rows `which` of the global batch of a step; a pure function.

    Row r of the batch is number step x batch_size + r of all rows ever drawn, so an epoch may end
    and the next begin within a batch.

    Raises:
      DataError: if the store has been damaged since it was built.
    """
    drawn = step * rows.batch_size + np.arange(rows.batch_size)[which]
    epoch, index = np.divmod(drawn, rows.num_rows)
    if rows.shuffle:
        index = permute(index, rows.num_rows, rows.seed, epoch)
    starts = index * rows.context_size
    if rows.once:
        starts[epoch > 0] = rows.store.num_tokens
    window = rows.store.read(starts, rows.context_size + 1, rows.pad)
    place = np.arange(rows.context_size, dtype=np.int32)
    real_BT = place < (rows.store.num_tokens - 1 - starts)[:, None]  # where there is a target
    tokens_BT = np.where(real_BT, window[:, :-1], rows.pad)
    begins_BT = tokens_BT == rows.end
    begins_BT[:, 0] = True  # a row's first document may have begun before it
    begin_BT = np.maximum.accumulate(place * begins_BT, axis=1)  # where its document begins
    return Batch(
        tokens_BT=tokens_BT,
        targets_BT=np.where(real_BT, window[:, 1:], rows.pad),
        weights_BT=real_BT.astype(np.float32),
        segments_BT=np.where(real_BT, np.cumsum(begins_BT, axis=1, dtype=np.int32), 0),
        positions_BT=np.where(real_BT, place - begin_BT, 0),
    )


def permute(index: np.ndarray, size: int, seed: int, epoch: int | np.ndarray) -> np.ndarray:
    """A seeded bijection of 0 ... size - 1 for sizes up to 2**62; its memory does not depend on it.

    The generalised Feistel cipher of Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains", section 5: a number is a place in a nearly square grid that holds the size; its column
    moves by a random function of its row, then its row by one of its column, and so on. Where that
    leads outside the size, which few cells are, it goes on from there until it is inside.

    Args:
      index: int64 [n], each from 0 to size - 1.
      epoch: one, or one for each index.
    """
    width = math.isqrt(size - 1) + 1
    height = -(-size // width)
    key = _mix(_mix(np.full(len(index), seed, np.uint64)) + np.asarray(epoch).astype(np.uint64))
    keys = _mix(key + np.arange(8, dtype=np.uint64)[:, None])  # 4 rounds, of a row and a column
    value = index.astype(np.uint64)
    outside = np.ones(len(index), bool)
    while outside.any():
        row, column = np.divmod(value[outside], width)
        for row_key, column_key in keys[:, outside].reshape(4, 2, -1):
            column = (column + _mix(row + row_key) % width) % width
            row = (row + _mix(column + column_key) % height) % height
        value[outside] = row * width + column
        outside = value >= size
    return value.astype(np.int64)


def _mix(bits: np.ndarray) -> np.ndarray:
    """64 well-mixed bits: a step of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
    pseudorandom number generators")."""
    bits = bits + 0x9E3779B97F4A7C15
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB
    return bits ^ bits >> 31


def prefetch(make: Callable[[int], Item], start: int, stop: int, ahead: int) -> Iterator[Item]:
    """make(start) ... make(stop - 1) in order, up to `ahead` of them made before they are wanted.

    They are made on one other thread, or with ahead = 0 on the caller's. An exception comes out at
    its item. Closing the iterator ends the thread once the item in hand is made.
    """
    if ahead == 0:
        yield from map(make, range(start, stop))
        return
    with ThreadPoolExecutor(1, "prefetch") as pool:
        steps = iter(range(start, stop))
        waiting = deque(pool.submit(make, step) for step in islice(steps, ahead))
        try:
            while waiting:
                item = waiting.popleft().result()
                waiting.extend(pool.submit(make, step) for step in islice(steps, 1))
                yield item
        finally:
            pool.shutdown(cancel_futures=True)
