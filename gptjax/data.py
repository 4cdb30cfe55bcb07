"""Batches of any step, as a pure function of the stores, the seed and the step.

A checkpoint of the data is therefore an integer, every process can make its own rows, and the
documents behind a step can be told at any time.
"""

import functools
import itertools
import math
import queue
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, TypeVar

import numpy as np

from gptjax.config import BLOCK_ROWS, weight_at
from gptjax.sources import DataError
from gptjax.store import DocumentInfo, Store

Item = TypeVar("Item")
Which = slice | np.ndarray  # of the rows of a batch: consecutive ones, or their numbers

WORD_BITS = 31  # labels in one int32 target, of several labels at once
CLOSE_SECONDS = 5  # that the end of `prefetch` waits for an item which is being made


class Batch(NamedTuple):
    """Rows of tokens, and what is to be predicted after each."""

    tokens_BT: np.ndarray  # int32
    targets_BT: np.ndarray  # int32: the token that follows
    weights_BT: np.ndarray  # float32: 1 where the target counts, 0 in padding
    segments_BT: np.ndarray  # int32: 1, 2, ... for the documents in the row; 0 in padding
    positions_BT: np.ndarray  # int32: from 0 in each segment


class Excluded(NamedTuple):
    """The documents of a store that a run sees no more, in their order."""

    starts: np.ndarray  # int64 [n]: the first token of each, its leading end-of-text
    stops: np.ndarray  # int64 [n]
    from_steps: np.ndarray  # int64 [n]: the last step, counted from 1, that may have seen it


NOTHING = Excluded(*[np.zeros(0, np.int64)] * 3)


@dataclass(frozen=True, kw_only=True)
class Member:
    """A store that rows are taken from, and its share of them."""

    store: Store
    name: str = "text"
    weight: float = 1.0  # this and the following as in MixtureConfig
    weights: tuple[tuple[int, float], ...] = ()
    max_epochs: int | None = None
    excluded: Excluded = NOTHING


class _Phase(NamedTuple):
    """Batches between two changes of the weights."""

    first: int  # batch, from 0
    before: np.ndarray  # int64 [members]: rows that each has given before
    quotas: tuple[int, ...]  # rows that each gives in a block


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Stores cut into rows, and the order in which batches take them.

    Row i of a store is the tokens from i x context_size on, and their targets lie one further; so
    in an epoch every token of the store but its first is a target exactly once. Documents may be
    cut by a row's end.

    The rows of a mixture come in blocks of BLOCK_ROWS, in which each store has exactly its share,
    evenly spread. A store's own rows come in the order that they would have if it were alone, and
    its epochs are its own.
    """

    members: tuple[Member, ...]
    context_size: int  # tokens of a row
    batch_size: int  # rows of a global batch
    seed: int
    shuffle: bool  # another order in every epoch; False: the order of the text
    pad: int
    end: int
    once: bool = False  # one epoch, and rows past it are padding: for evaluation
    skip: tuple[tuple[int, int], ...] = ()  # batches passed over, as in DataConfig

    @functools.cached_property
    def num_tokens(self) -> np.ndarray:
        """Of each store, int64 [members]."""
        return np.array([member.store.num_tokens for member in self.members])

    @functools.cached_property
    def epoch_rows(self) -> np.ndarray:
        """Rows of an epoch of each store, int64 [members]; the last one may be padded."""
        return _num_rows(self.num_tokens, self.context_size)

    @property
    def num_rows(self) -> int:
        """Rows of an epoch, of all stores together."""
        return int(self.epoch_rows.sum())

    @property
    def num_batches(self) -> int:
        """Batches that hold every row once; the last may be padded."""
        return -(-self.num_rows // self.batch_size)

    def batch_number(self, step: int) -> int:
        """The batch that a step sees, both counted from 0: the step, and what was passed over."""
        return batch_number(step, self.skip)

    def batch_at(self, step: int, *, which: Which) -> Batch:
        """As the function below."""
        return batch_at(step, self, which=which)

    def rows_read(self, steps: int) -> np.ndarray:
        """How far the first steps come in the rows of each store, int64 [members]; batches that
        are passed over count.
        """
        return self._rows_before(self.batch_number(steps - 1) + 1 if steps else 0)

    def _rows_before(self, batch: int) -> np.ndarray:
        phase = self._phase_of(batch)
        return phase.before + _dealt(phase.quotas, (batch - phase.first) * self.batch_size)

    def _phase_of(self, batch: int) -> _Phase:
        return self._phases[bisect_right(self._phases, batch, key=lambda phase: phase.first) - 1]

    @functools.cached_property
    def _phases(self) -> list[_Phase]:
        changes = {step - 1 for member in self.members for step, _ in member.weights}
        phases, before = [], np.zeros(len(self.members), np.int64)
        for first, following in itertools.pairwise([*sorted({0} | changes), None]):
            quotas = block_quotas([weight_at(member, first + 1) for member in self.members])
            phases.append(_Phase(first, before, quotas))
            if following is not None:
                before = before + _dealt(quotas, (following - first) * self.batch_size)
        return phases


def batch_number(step: int, skip: Iterable[tuple[int, int]]) -> int:
    """The batch that a step sees, where ranges of batches, counted from 1, are passed over."""
    for first, last in skip:
        if step < first - 1:
            break
        step += last - first + 1
    return step


def block_quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """The rows of a block that each store gives: in proportion to the weights, the rows that are
    left over to the largest remainders.
    """
    total = sum(map(Fraction, weights))
    shares = [Fraction(weight) * BLOCK_ROWS / total for weight in weights]
    quotas = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: quotas[i] - shares[i])
    for i in by_remainder[: BLOCK_ROWS - sum(quotas)]:
        quotas[i] += 1
    assert all(quota or not weight for quota, weight in zip(quotas, weights, strict=True))
    return tuple(quotas)


class _Block(NamedTuple):
    """What each row of a block is."""

    members: np.ndarray  # int64 [BLOCK_ROWS]: whose
    ranks: np.ndarray  # int64 [BLOCK_ROWS]: how many of that member's come before it in the block


@functools.lru_cache(maxsize=8)
def _block(quotas: tuple[int, ...]) -> _Block:
    """A block with so many rows of each member, evenly spread: its r-th of q rows is at about
    (r + 1/2) / q of the block.
    """
    members = np.repeat(np.arange(len(quotas)), quotas)
    ranks = np.concatenate([np.arange(quota) for quota in quotas])
    order = np.argsort((ranks + 0.5) / np.array(quotas)[members], kind="stable")
    return _Block(members[order], ranks[order])


def _dealt(quotas: tuple[int, ...], count: int) -> np.ndarray:
    """How many of the first `count` rows are each member's, int64 [members]."""
    blocks, rest = divmod(count, BLOCK_ROWS)
    part = np.bincount(_block(quotas).members[:rest], minlength=len(quotas))
    return blocks * np.array(quotas) + part


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


def check_epochs(rows: Rows, steps: int) -> None:
    """Refuse a run that reads a store more often than its `max_epochs`.

    Raises:
      DataError: with the epochs that the run would read, and the steps that are allowed.
    """
    read, too_often, most = rows.rows_read(steps), [], steps
    for i, member in enumerate(rows.members):
        limit = (member.max_epochs or math.inf) * rows.epoch_rows[i]
        if read[i] > limit:
            epochs = read[i] / rows.epoch_rows[i]
            too_often.append(
                f"{member.name} {epochs:,.2f} times (max_epochs = {member.max_epochs})"
            )
            fits = bisect_right(range(most + 1), limit, key=lambda n, i=i: rows.rows_read(n)[i])
            most = fits - 1
    if too_often:
        raise DataError(
            f"{steps:,} steps would read {', '.join(too_often)}; give steps of at most {most:,}, "
            "a larger max_epochs, or more text"
        )


def _num_rows(num_tokens: Item, context_size: int) -> Item:
    return -(-(num_tokens - 1) // context_size)


class Windows(NamedTuple):
    """Where rows lie."""

    member_B: np.ndarray  # int64: the place of its store in `rows.members`
    start_B: np.ndarray  # int64: its first token


def windows_at(step: int, rows: Rows, *, which: Which) -> Windows:
    """Where the rows `which` of the global batch of a step lie; arithmetic alone.

    Row r of batch n is number n x batch_size + r of all rows ever drawn, so an epoch may end and
    the next begin within a batch.
    """
    batch = rows.batch_number(step)
    phase = rows._phase_of(batch)
    drawn = (batch - phase.first) * rows.batch_size + np.arange(rows.batch_size)[which]
    blocks, places = np.divmod(drawn, BLOCK_ROWS)
    block = _block(phase.quotas)
    member_B = block.members[places]
    index = phase.before[member_B] + blocks * np.array(phase.quotas)[member_B] + block.ranks[places]
    sizes = rows.epoch_rows[member_B]
    epoch, index = np.divmod(index, sizes)
    if rows.shuffle:  # each store has other orders, and the first those of a store alone
        index = permute(index, sizes, rows.seed, epoch + (member_B << 40))
    start_B = index * rows.context_size
    if rows.once:
        start_B = np.where(epoch > 0, rows.num_tokens[member_B], start_B)
    return Windows(member_B, start_B)


def batch_at(step: int, rows: Rows, *, which: Which) -> Batch:
    """The rows `which` of the global batch of a step, counted from 0; a pure function.

    Tokens of excluded documents are padding, and nothing is to be predicted from or of them: the
    end-of-text after the document before is its own, and the one after it begins the next.

    Raises:
      DataError: if a store has been damaged since it was built.
    """
    windows = windows_at(step, rows, which=which)
    window = _read(rows, windows)
    place = np.arange(rows.context_size, dtype=np.int32)
    left_BT = (rows.num_tokens[windows.member_B] - 1 - windows.start_B)[:, None]
    shown_BT = counts_BT = place < left_BT  # where there is a target
    if any(len(member.excluded.starts) for member in rows.members):
        excluded = _excluded(step, rows, windows)
        shown_BT = shown_BT & ~excluded[:, :-1]
        counts_BT = shown_BT & ~excluded[:, 1:]
    tokens_BT = np.where(shown_BT, window[:, :-1], rows.pad)
    begins_BT = tokens_BT == rows.end
    begins_BT[:, 0] = shown_BT[:, 0]  # a row's first document may have begun before it
    begin_BT = np.maximum.accumulate(place * begins_BT, axis=1)  # where its document begins
    return Batch(
        tokens_BT=tokens_BT,
        targets_BT=np.where(counts_BT, window[:, 1:], rows.pad),
        weights_BT=counts_BT.astype(np.float32),
        segments_BT=np.where(shown_BT, np.cumsum(begins_BT, axis=1, dtype=np.int32), 0),
        positions_BT=np.where(shown_BT, place - begin_BT, 0),
    )


def _read(rows: Rows, windows: Windows) -> np.ndarray:
    """The tokens of each row and the one after it, int32 [B, context_size + 1]."""
    length = rows.context_size + 1
    if len(rows.members) == 1:
        return rows.members[0].store.read(windows.start_B, length, rows.pad)
    tokens, begun = np.empty((len(windows.start_B), length), np.int32), []
    for i in np.unique(windows.member_B):
        mine = np.flatnonzero(windows.member_B == i)
        store = rows.members[i].store
        begun.append((mine, store.begin_read(windows.start_B[mine], length, rows.pad)))
    for mine, end_read in begun:
        tokens[mine] = end_read()
    return tokens


def _excluded(step: int, rows: Rows, windows: Windows) -> np.ndarray:
    """Which of these tokens lie in excluded documents, bool [B, context_size + 1]."""
    place = np.arange(rows.context_size + 1)
    excluded = np.zeros((len(windows.start_B), len(place)), bool)
    for i, member in enumerate(rows.members):
        in_effect = member.excluded.from_steps <= step
        starts, stops = member.excluded.starts[in_effect], member.excluded.stops[in_effect]
        mine = np.flatnonzero(windows.member_B == i)
        first = np.searchsorted(stops, windows.start_B[mine], side="right")
        last = np.searchsorted(starts, windows.start_B[mine] + len(place))
        mine = mine[first < last]  # rows that such a document reaches into
        if len(mine):
            positions = windows.start_B[mine, None] + place
            nearest = np.searchsorted(starts, positions, side="right") - 1
            excluded[mine] = (nearest >= 0) & (positions < stops[nearest])
    return excluded


def permute(
    index: np.ndarray, size: int | np.ndarray, seed: int, epoch: int | np.ndarray
) -> np.ndarray:
    """A seeded bijection of 0 ... size - 1 for sizes up to 2**62; its memory does not depend on it.

    The generalised Feistel cipher of Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains", section 5: a number is a place in a nearly square grid that holds the size; its column
    moves by a random function of its row, then its row by one of its column, and so on. Where that
    leads outside the size, which few cells are, it goes on from there until it is inside.

    Args:
      index: int64 [n], each from 0 to size - 1.
      size: one, or one for each index; few different ones.
      epoch: one, or one for each index.
    """
    sizes, kind = np.unique(np.broadcast_to(size, index.shape), return_inverse=True)
    widths = [math.isqrt(size - 1) + 1 for size in sizes.tolist()]
    heights = [-(-size // width) for size, width in zip(sizes.tolist(), widths, strict=True)]
    grids = np.array([sizes, widths, heights], np.uint64)[:, kind]
    key = _mix(_mix(np.full(len(index), seed, np.uint64)) + np.asarray(epoch).astype(np.uint64))
    keys = _mix(key + np.arange(8, dtype=np.uint64)[:, None])  # 4 rounds, of a row and a column
    value = index.astype(np.uint64)
    outside = np.ones(len(index), bool)
    while outside.any():
        _, width, height = grids[:, outside]
        row, column = np.divmod(value[outside], width)
        for row_key, column_key in keys[:, outside].reshape(4, 2, -1):
            column = (column + _mix(row + row_key) % width) % width
            row = (row + _mix(column + column_key) % height) % height
        value[outside] = row * width + column
        outside = value >= grids[0]
    return value.astype(np.int64)


def _mix(bits: np.ndarray) -> np.ndarray:
    """64 well-mixed bits: a step of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
    pseudorandom number generators")."""
    bits = bits + 0x9E3779B97F4A7C15
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB
    return bits ^ bits >> 31


def prefetch(
    make: Callable[[int], Item],
    start: int,
    stop: int,
    ahead: int,
    request: Future[None] | None = None,
) -> Iterator[Item]:
    """make(start) ... make(stop - 1) in order, up to `ahead` of them made before they are wanted.

    They are made on one other thread, or with ahead = 0 on the caller's. An exception comes out at
    its item. Closing the iterator ends the thread once the item in hand is made. When `request` is
    done, the items end, even if the next one never comes.
    """
    if ahead == 0:
        yield from map(make, range(start, stop))
        return
    room, made = threading.Semaphore(ahead), queue.SimpleQueue()
    closed = threading.Event()

    def work() -> None:
        for step in range(start, stop):
            room.acquire()
            if closed.is_set():
                return
            try:
                made.put((make(step), None))
            except BaseException as error:
                made.put((None, error))
                return
        made.put(None)

    # A daemon, for an item that never comes must not keep the process from its end.
    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    if request:
        request.add_done_callback(lambda _: made.put(None))
    try:
        while (item := made.get()) is not None:
            value, error = item
            if error:
                raise error
            room.release()
            yield value
    finally:
        closed.set()
        room.release()
        stalled = request is not None and request.done()
        thread.join(timeout=CLOSE_SECONDS / 20 if stalled else CLOSE_SECONDS)


# --- the documents behind a batch ----------------------------------------------------------------


class Passage(NamedTuple):
    """What a row shows of a document."""

    row: int  # of the batch
    member: Member
    document: DocumentInfo
    start: int  # of the store's tokens
    stop: int
    excluded: bool  # it is padding in this row


def passages_at(step: int, rows: Rows, *, which: Which) -> list[Passage]:
    """The documents behind the rows `which` of the batch of a step, in the order of the rows.

    Raises:
      DataError: if a store has been damaged since it was built.
    """
    member_B, start_B = windows_at(step, rows, which=which)
    stop_B = np.minimum(start_B + rows.context_size, rows.num_tokens[member_B] - 1)
    first_B, last_B = np.zeros_like(start_B), np.full_like(start_B, -1)
    for i in np.unique(member_B):
        mine = (member_B == i) & (start_B < stop_B)
        ends = np.concatenate([start_B[mine], stop_B[mine] - 1])
        first_B[mine], last_B[mine] = np.split(rows.members[i].store.documents(ends), 2)
    passages = []
    for r, row in enumerate(np.arange(rows.batch_size)[which].tolist()):
        member, start, stop = rows.members[member_B[r]], int(start_B[r]), int(stop_B[r])
        gone = member.excluded.starts[member.excluded.from_steps <= step]
        for number in range(first_B[r], last_B[r] + 1):
            one = member.store.document(number)
            bounds = max(start, one.start), min(stop, one.stop)
            passages.append(Passage(row, member, one, *bounds, excluded=one.start in gone))
    return passages
