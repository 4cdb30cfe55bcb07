"""Every token is a target once an epoch, for any number of processes; a step is a pure function."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data import Batch, Rows, batch_at, check_rows, permute, prefetch
from gptjax.sources import DataError
from gptjax.store import build_store
from gptjax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
END, PAD = TOKENIZER.end, TOKENIZER.pad


def make_rows(tmp_path, documents, **fields):
    store = build_store(documents, TOKENIZER, tmp_path / "store")
    given = dict(context_size=8, batch_size=5, seed=3, shuffle=True, pad=PAD, end=END)
    return Rows(store=store, **given | fields)


@pytest.fixture
def rows(tmp_path):
    """Documents of odd lengths, each byte of the text another where it can be."""
    content = bytes(i % 251 for i in range(411))
    return make_rows(tmp_path, [content[:3], content[3:100], content[100:101], content[101:]])


def all_rows(rows, steps):
    whole = slice(0, rows.batch_size)
    return Batch(
        *map(np.concatenate, zip(*(batch_at(i, rows, which=whole) for i in steps), strict=True))
    )


def equal(one, other):
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# --- batches -----------------------------------------------------------------------------------


def test_a_batch_in_full(tmp_path):
    rows = make_rows(tmp_path, [b"ab", b"cdefg"], context_size=4, batch_size=3, shuffle=False)
    batch = batch_at(0, rows, which=slice(0, 3))
    a, b, c, d, e, f, g = b"abcdefg"
    assert batch.tokens_BT.tolist() == [[END, a, b, END], [c, d, e, f], [g, PAD, PAD, PAD]]
    assert batch.targets_BT.tolist() == [[a, b, END, c], [d, e, f, g], [END, PAD, PAD, PAD]]
    assert batch.weights_BT.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch.segments_BT.tolist() == [[1, 1, 1, 2], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 0, 0, 0]]
    assert [x.dtype for x in batch] == [np.int32, np.int32, np.float32, np.int32, np.int32]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("context_size", [1, 7, 8, 13, 207, 415, 500])
def test_every_target_once_an_epoch(tmp_path, context_size, shuffle):
    content = bytes(i % 251 for i in range(411))
    rows = make_rows(
        tmp_path, [content[:3], content[3:]], context_size=context_size, shuffle=shuffle
    )
    drawn = all_rows(
        rows, range(3 * rows.num_rows)
    )  # so many epochs as a batch has rows, three times
    tokens = rows.store.read(np.array([0]), rows.store.num_tokens, PAD)[0]
    for epoch in range(0, 3 * rows.batch_size):
        part = Batch(*(x[epoch * rows.num_rows : (epoch + 1) * rows.num_rows] for x in drawn))
        real = part.weights_BT == 1
        pairs = np.stack([part.tokens_BT[real], part.targets_BT[real]], axis=1)
        expected = np.stack([tokens[:-1], tokens[1:]], axis=1)
        assert sorted(pairs.tolist()) == sorted(expected.tolist())
        assert (part.targets_BT[~real] == PAD).all() and (part.tokens_BT[~real] == PAD).all()
        assert (part.segments_BT[~real] == 0).all() and set(part.weights_BT.flat) <= {0, 1}


def test_a_segment_is_a_document(rows):
    drawn = all_rows(rows, range(rows.num_batches))
    for tokens, segments, positions in zip(
        drawn.tokens_BT, drawn.segments_BT, drawn.positions_BT, strict=True
    ):
        segment = position = None
        for token, given_segment, given_position in zip(tokens, segments, positions, strict=True):
            if token == PAD:
                segment = position = 0
            elif segment is None:
                segment, position = 1, 0
            elif token == END:
                segment, position = segment + 1, 0
            else:
                position += 1
            assert (given_segment, given_position) == (segment, position)


def test_every_epoch_has_another_order(rows):
    drawn = all_rows(rows, range(2 * rows.num_rows)).tokens_BT
    epochs = [drawn[i * rows.num_rows : (i + 1) * rows.num_rows].tolist() for i in range(10)]
    assert len({str(epoch) for epoch in epochs}) == 10
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_one_batch(tmp_path, hosts):
    rows = make_rows(tmp_path, [bytes(range(200))], batch_size=12)
    for step in (0, 1, 2, 3, 1000):
        size = 12 // hosts
        parts = [batch_at(step, rows, which=slice(i * size, (i + 1) * size)) for i in range(hosts)]
        joined = Batch(*map(np.concatenate, zip(*parts, strict=True)))
        assert equal(joined, batch_at(step, rows, which=slice(0, 12)))


def test_a_batch_depends_on_nothing_else(rows):
    steps = np.random.default_rng(0).permutation(40)
    drawn = {int(step): batch_at(int(step), rows, which=slice(0, 5)) for step in steps}
    again = Rows(**vars(rows))
    assert all(equal(drawn[step], batch_at(step, again, which=slice(0, 5))) for step in range(40))
    other = Rows(**vars(rows) | {"seed": 4})
    assert not equal(drawn[0], batch_at(0, other, which=slice(0, 5)))


def test_once_ends(tmp_path):
    rows = make_rows(tmp_path, [bytes(range(90))], shuffle=False, once=True)
    drawn = all_rows(rows, range(rows.num_batches + 2))
    assert rows.num_rows == 12 and rows.num_batches == 3
    assert drawn.targets_BT[drawn.weights_BT == 1].tolist() == [*range(90), END]
    past = Batch(*(x[rows.num_rows :] for x in drawn))
    assert (
        not past.weights_BT.any() and not past.segments_BT.any() and (past.tokens_BT == PAD).all()
    )


def test_too_little_text_is_refused():
    check_rows(40, 8, 5, "train")  # 39 to predict: 5 rows, the last of 7
    message = "train split: 40 tokens make 5 rows .* batch_size = 6; give a batch_size of at most 5"
    with pytest.raises(DataError, match=message):
        check_rows(40, 8, 6, "train")
    check_rows(40, 39, 1, "valid")
    message = "valid split: 40 tokens have 39 to predict, .* give a context_size of at most 39"
    with pytest.raises(DataError, match=message):
        check_rows(40, 40, 1, "valid")


# --- the order of rows -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 4095, 4096, 4097, 99_991])
def test_permute_is_a_bijection(size):
    for epoch in (0, 1):
        moved = permute(np.arange(size), size, 5, epoch)
        assert moved.dtype == np.int64
        np.testing.assert_array_equal(np.sort(moved), np.arange(size))


@settings(max_examples=50, deadline=None)
@given(st.integers(2**20, 2**62), st.integers(0, 2**53), st.integers(0, 2**40))
def test_permute_stays_inside_and_apart(size, seed, epoch):
    near = np.unique(
        np.concatenate([np.arange(500), size - 1 - np.arange(500), np.arange(500) * (size // 500)])
    )
    moved = permute(near, size, seed, epoch)
    assert moved.min() >= 0 and moved.max() < size
    assert len(np.unique(moved)) == len(near)


def test_permute_takes_an_epoch_for_each():
    index = np.array([3, 3, 4, 9])
    together = permute(index, 10, 1, np.array([0, 1, 0, 7]))
    assert together.tolist() == [
        permute(index[i : i + 1], 10, 1, epoch)[0] for i, epoch in enumerate([0, 1, 0, 7])
    ]


def test_permute_is_even():
    """Over 4,000 epochs each of 10 rows is at each place about 400 times, standard deviation 19."""
    counts = np.zeros((10, 10), int)
    for epoch in range(4000):
        counts[np.arange(10), permute(np.arange(10), 10, 0, epoch)] += 1
    assert abs(counts - 400).max() < 5 * 19
    orders = {tuple(permute(np.arange(4), 4, seed, 0)) for seed in range(500)}
    assert len(orders) == 24


# --- ahead of the step -------------------------------------------------------------------------


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("ahead", [0, 1, 4, 100])
def test_prefetch_keeps_the_order(ahead):
    assert list(prefetch(lambda step: step * step, 3, 20, ahead)) == [
        step * step for step in range(3, 20)
    ]
    assert list(prefetch(lambda step: step, 5, 5, ahead)) == []
    assert not threads()


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_prefetch_makes_so_many_ahead(ahead):
    made = []
    items = prefetch(lambda step: made.append(step), 0, 100, ahead)
    for taken in range(1, 6):
        next(items)
        deadline = time.monotonic() + 5
        while len(made) < taken + ahead and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)  # time to make too many
        assert made == list(range(taken + ahead))
    items.close()


@pytest.mark.parametrize("ahead", [0, 2])
def test_prefetch_fails_at_its_item(ahead):
    items = prefetch(lambda step: 1 // (step - 3), 0, 10, ahead)
    assert [next(items) for _ in range(3)] == [-1, -1, -1]
    with pytest.raises(ZeroDivisionError):
        next(items)
    assert not threads()


def test_prefetch_closes_at_once():
    made = []

    def make(step):
        time.sleep(0.05)
        made.append(step)

    items = prefetch(make, 0, 1000, 50)
    next(items)
    began = time.monotonic()
    items.close()
    assert time.monotonic() - began < 1 and len(made) < 5
    assert not threads()
