"""Every token is a target once an epoch, for any number of processes; a step is a pure function."""

import functools
import hashlib
import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import BLOCK_ROWS
from gptjax.data import (
    Batch,
    Excluded,
    Member,
    Rows,
    batch_at,
    block_quotas,
    check_epochs,
    check_rows,
    permute,
    prefetch,
    windows_at,
)
from gptjax.exclusions import Rollback, join_ranges, pass_over
from gptjax.sources import DataError
from gptjax.store import build_store
from gptjax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
END, PAD = TOKENIZER.end, TOKENIZER.pad


def make_rows(tmp_path, documents, **fields):
    store = build_store(documents, TOKENIZER, tmp_path / "store")
    given = dict(context_size=8, batch_size=5, seed=3, shuffle=True, pad=PAD, end=END)
    return Rows(members=(Member(store=store),), **given | fields)


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


def all_tokens(store):
    return store.read(np.array([0]), store.num_tokens, PAD)[0]


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
    tokens = all_tokens(rows.members[0].store)
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
    again = replace(rows)
    assert all(equal(drawn[step], batch_at(step, again, which=slice(0, 5))) for step in range(40))
    other = replace(rows, seed=4)
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


def test_a_store_alone_is_read_in_the_order_of_its_permutation(rows):
    """What older runs have seen, they see again."""
    for step in (0, 1, 7, 10**9):
        drawn = step * 5 + np.arange(5)
        epoch, index = np.divmod(drawn, rows.num_rows)
        index = permute(index, rows.num_rows, rows.seed, epoch)
        for weights in ((), ((3, 2.0), (8, 0.5))):  # its share is all of them whatever its weight
            member = replace(rows.members[0], weights=weights)
            given = windows_at(step, replace(rows, members=(member,)), which=slice(0, 5))
            assert given.start_B.tolist() == (index * 8).tolist()


def test_too_little_text_is_refused():
    check_rows(40, 8, 5, "train")  # 39 to predict: 5 rows, the last of 7
    message = "train split: 40 tokens make 5 rows .* batch_size = 6; give a batch_size of at most 5"
    with pytest.raises(DataError, match=message):
        check_rows(40, 8, 6, "train")
    check_rows(40, 39, 1, "valid")
    message = "valid split: 40 tokens have 39 to predict, .* give a context_size of at most 39"
    with pytest.raises(DataError, match=message):
        check_rows(40, 40, 1, "valid")


# --- mixtures ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Three stores with bytes of their own, whose shares change."""
    folder = tmp_path_factory.mktemp("mixture")
    texts = [[b"abcdefghi", b"jklm", b"n" * 20], [b"ABCDEFGHIJKLM" * 9, b"N"], [b"0123456789"]]
    changes = [((6, 3.0), (20, 0.0)), (), ((6, 0.0), (11, 1.0))]
    members = tuple(
        Member(
            store=build_store(documents, TOKENIZER, folder / name),
            name=name,
            weight=weight,
            weights=weights,
        )
        for name, documents, weight, weights in zip(
            "abc", texts, (1.0, 2.0, 0.5), changes, strict=True
        )
    )
    return Rows(
        members=members, context_size=4, batch_size=12, seed=3, shuffle=True, pad=PAD, end=END
    )


def members_of(rows, steps):
    """The member of each row of these steps."""
    whole = slice(0, rows.batch_size)
    return np.concatenate([windows_at(step, rows, which=whole).member_B for step in steps])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=20))
def test_quotas_are_the_shares_of_a_block(weights):
    weights = [weight if weight >= 1 else 0.0 for weight in weights]
    if any(weights):
        quotas, exact = block_quotas(weights), np.array(weights) / sum(weights) * BLOCK_ROWS
        assert sum(quotas) == BLOCK_ROWS
        assert (np.abs(quotas - exact) < 1 + 1e-6).all()
        assert all(quota > 0 or weight == 0 for quota, weight in zip(quotas, weights, strict=True))


def test_every_block_has_its_quotas_and_every_batch_nearly(mixture):
    members = tuple(replace(member, weights=()) for member in mixture.members)
    rows = replace(mixture, members=members, batch_size=1 << 12)
    drawn = members_of(rows, range(2 * BLOCK_ROWS >> 12))
    quotas = np.array(block_quotas([1.0, 2.0, 0.5]))
    for block in np.split(drawn, 2):
        assert np.bincount(block).tolist() == quotas.tolist()
    for batch in np.split(drawn, 2 * BLOCK_ROWS // 64):
        assert (np.abs(np.bincount(batch, minlength=3) - 64 * quotas / BLOCK_ROWS) < 2).all()


def test_shares_follow_their_schedules(mixture):
    for steps, weights in [
        (range(0, 5), [1.0, 2.0, 0.5]),
        (range(5, 10), [3.0, 2.0, 0.0]),
        (range(10, 19), [3.0, 2.0, 1.0]),
        (range(19, 60), [0.0, 2.0, 1.0]),
    ]:
        drawn = np.bincount(members_of(mixture, steps), minlength=3)
        expected = np.array(weights) / sum(weights) * 12 * len(steps)
        assert (np.abs(drawn - expected) <= 1).all()


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_target_of_each_store_once_in_its_epochs(mixture, shuffle):
    rows = replace(mixture, shuffle=shuffle)
    members, batch = members_of(rows, range(60)), all_rows(rows, range(60))
    assert np.bincount(members).tolist() == rows.rows_read(60).tolist()
    for i, member in enumerate(rows.members):
        tokens = all_tokens(member.store)
        pairs = sorted(np.stack([tokens[:-1], tokens[1:]], axis=1).tolist())
        mine = Batch(*(x[members == i] for x in batch))
        epochs = len(mine.tokens_BT) // rows.epoch_rows[i]
        assert epochs >= 3
        orders = set()
        for epoch in range(epochs):
            part = slice(epoch * rows.epoch_rows[i], (epoch + 1) * rows.epoch_rows[i])
            real = mine.weights_BT[part] == 1
            seen = np.stack([mine.tokens_BT[part][real], mine.targets_BT[part][real]], axis=1)
            assert sorted(seen.tolist()) == pairs
            orders.add(str(seen))
        assert (len(orders) == 1) == (not shuffle)


def test_stores_have_orders_of_their_own(tmp_path):
    store = build_store([bytes(range(200))], TOKENIZER, tmp_path / "store")
    members = (Member(store=store, name="a"), Member(store=store, name="b"))
    given = dict(context_size=2, batch_size=200, seed=3, shuffle=True, pad=PAD, end=END)
    windows = windows_at(0, Rows(members=members, **given), which=slice(0, 200))
    one, other = (windows.start_B[windows.member_B == i].tolist() for i in (0, 1))
    assert sorted(one) != one and one != other


def test_rows_are_counted_across_blocks_and_phases(mixture):
    rows = replace(mixture, batch_size=30_000)  # blocks end inside of batches
    counts = np.zeros(3, int)
    for step in range(25):
        assert rows.rows_read(step).tolist() == counts.tolist()
        counts += np.bincount(members_of(rows, [step]), minlength=3)
    began = time.perf_counter()
    far = windows_at(10**9, rows, which=slice(0, 8))
    assert time.perf_counter() - began < 1 and set(far.member_B.tolist()) <= {1, 2}


SKIP = ((2, 3), (5, 5), (6, 6), (30, 41))


def test_batches_passed_over_are_deleted_from_the_stream(mixture):
    rows, whole = replace(mixture, skip=SKIP), slice(0, 12)
    left = [n for n in range(1, 60) if not any(first <= n <= last for first, last in SKIP)]
    for step, number in enumerate(left):
        given = batch_at(step, rows, which=whole)
        assert equal(given, batch_at(number - 1, mixture, which=whole))


def test_too_many_epochs_are_refused(mixture):
    limited = replace(mixture.members[1], max_epochs=2)
    rows = replace(mixture, members=(mixture.members[0], limited, mixture.members[2]), skip=SKIP)
    with pytest.raises(
        DataError, match=r"60 steps would read b \d+\.\d\d times \(max_epochs = 2\)"
    ) as no:
        check_epochs(rows, 60)
    allowed = int(str(no.value).partition("at most ")[2].partition(",")[0])
    check_epochs(rows, allowed)
    assert 0 < allowed < 60 and rows.rows_read(allowed)[1] <= 2 * rows.epoch_rows[1]
    with pytest.raises(DataError, match=f"give steps of at most {allowed},"):
        check_epochs(rows, allowed + 1)


# --- documents left out ------------------------------------------------------------------------


def without(rows, i, numbers, from_step):
    """Rows without these documents of a member."""
    store = rows.members[i].store
    ranges = [(store.document(n).start, store.document(n).stop, from_step) for n in numbers]
    member = replace(rows.members[i], excluded=Excluded(*np.array(ranges, np.int64).T))
    return replace(rows, members=(*rows.members[:i], member, *rows.members[i + 1 :]))


@pytest.mark.parametrize("numbers", [[0], [1], [2], [5], [1, 2], [0, 3, 5], [0, 1, 2, 4, 5]])
@pytest.mark.parametrize("context_size", [1, 3, 8, 64])
def test_excluded_documents_are_padding_and_nothing_else_is(tmp_path, numbers, context_size):
    documents = [b"abcde", b"f", b"ghijklmnopqrstuvwx", b"ABC", b"DEFGHIJKL", b"MNOPQ"]
    plain = make_rows(tmp_path, documents, context_size=context_size)
    rows, whole = without(plain, 0, numbers, from_step=4), slice(0, 5)
    store = plain.members[0].store
    gone = {p for n in numbers for p in range(store.document(n).start, store.document(n).stop)}
    for step in range(4):
        assert equal(batch_at(step, rows, which=whole), batch_at(step, plain, which=whole))
    for step in range(4, 4 + plain.num_batches):
        before, after = (batch_at(step, one, which=whole) for one in (plain, rows))
        starts = windows_at(step, rows, which=whole).start_B
        token = starts[:, None] + np.arange(context_size)
        token_gone, target_gone = np.isin(token, [*gone]), np.isin(token + 1, [*gone])
        real = before.weights_BT == 1
        shown, counts = real & ~token_gone, real & ~token_gone & ~target_gone
        assert (after.weights_BT == counts).all()
        assert (after.tokens_BT == np.where(shown, before.tokens_BT, PAD)).all()
        assert (after.targets_BT == np.where(counts, before.targets_BT, PAD)).all()
        assert (after.positions_BT == np.where(shown, before.positions_BT, 0)).all()
        for segments, segments_before, row in zip(
            after.segments_BT, before.segments_BT, shown, strict=True
        ):
            assert (segments[~row] == 0).all()
            # The documents that are left, numbered from 1 again.
            _, again = np.unique(segments_before[row], return_inverse=True)
            assert segments[row].tolist() == (again + 1).tolist()
        assert [x.dtype for x in after] == [x.dtype for x in before]


@pytest.mark.parametrize("hosts", [1, 2, 3, 4])
def test_hosts_share_a_mixture_with_batches_and_documents_left_out(mixture, hosts):
    rows = without(replace(mixture, skip=SKIP), 0, [1, 2], from_step=9)
    assert not equal(*(batch_at(9, one, which=slice(0, 12)) for one in (rows, mixture)))
    for step in (0, 1, 5, 9, 10, 40, 5000):
        size = 12 // hosts
        parts = [batch_at(step, rows, which=slice(i * size, (i + 1) * size)) for i in range(hosts)]
        joined = Batch(*map(np.concatenate, zip(*parts, strict=True)))
        assert equal(joined, batch_at(step, rows, which=slice(0, 12)))


def hashes(rows, steps, hosts=1, ahead=0):
    """A hash of each global batch, whose rows come from so many hosts."""
    size, joined = rows.batch_size // hosts, []
    which = [slice(i * size, (i + 1) * size) for i in range(hosts)]
    makers = [functools.partial(batch_at, rows=rows, which=mine) for mine in which]
    streams = [prefetch(make, steps.start, steps.stop, ahead) for make in makers]
    for parts in zip(*streams, strict=True):
        batch = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        joined.append(hashlib.sha256(b"".join(array.tobytes() for array in batch)).hexdigest())
    return joined


@pytest.fixture(scope="module")
def all_at_once(mixture):
    """Two stores of several epochs and another share from step 60 on, batches that are passed over,
    and documents that are left out: 200 batches, and their hashes on one host.
    """
    a, b = (replace(member, weights=()) for member in mixture.members[:2])
    two = replace(mixture, members=(replace(a, weights=((60, 5.0),)), b))
    rows = without(replace(two, skip=SKIP), 0, [1], from_step=90)
    assert (rows.rows_read(200) > 5 * rows.epoch_rows).all()
    expected = hashes(rows, range(200))
    assert len(set(expected)) == 200
    plain = hashes(replace(two, skip=SKIP), range(200))
    assert plain[:90] == expected[:90] and plain[90:] != expected[90:]
    assert plain[1:] != hashes(two, range(200))[1:]
    return rows, expected


@pytest.mark.parametrize("ahead", [0, 1, 4, 8])
@pytest.mark.parametrize("hosts", [1, 2, 3, 4])
def test_batches_are_the_same_on_any_hosts_and_any_time_ahead(all_at_once, hosts, ahead):
    rows, expected = all_at_once
    assert hashes(rows, range(200), hosts, ahead) == expected


@pytest.mark.parametrize("seed", range(3))
def test_batches_are_the_same_after_stops_anywhere(all_at_once, seed):
    rows, expected = all_at_once
    draw, step = random.Random(seed), 0
    while step < 200:
        stop = min(200, step + draw.randint(1, 40))
        ran = range(step, min(200, stop + draw.randint(0, 9)))  # past what was saved, and again
        hosts, ahead = draw.randint(1, 4), draw.choice([0, 1, 4, 8])
        again = replace(rows)  # nothing is kept of what was worked out before
        assert hashes(again, ran, hosts, ahead) == expected[ran.start : ran.stop]
        step = stop


@pytest.mark.parametrize("hosts", [1, 3])
def test_every_document_once_in_every_epoch(mixture, hosts):
    """Counted by its tokens, with its end-of-text before it."""
    size, steps = 12 // hosts, range(200)
    windows = [
        windows_at(step, mixture, which=slice(i * size, (i + 1) * size))
        for step in steps
        for i in range(hosts)
    ]
    member_B, start_B = (np.concatenate(arrays) for arrays in zip(*windows, strict=True))
    for i, member in enumerate(mixture.members):
        store, num_rows = member.store, int(mixture.epoch_rows[i])
        listed = [store.document(n) for n in range(store.num_documents)]
        mine = start_B[member_B == i]
        assert len(mine) > 3 * num_rows
        for first in range(0, len(mine) - num_rows + 1, num_rows):
            token = mine[first : first + num_rows, None] + np.arange(mixture.context_size)
            seen = store.documents(token[token < store.num_tokens - 1])
            assert np.bincount(seen).tolist() == [one.stop - one.start for one in listed]


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


def test_permute_takes_a_size_for_each():
    index, sizes = np.array([3, 3, 4, 9]), np.array([10, 7, 10, 2**40])
    together = permute(index, sizes, 1, 2)
    assert together.tolist() == [
        permute(index[i : i + 1], size, 1, 2)[0] for i, size in enumerate(sizes.tolist())
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


# --- rollbacks ------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9))))
def test_joined_ranges_hold_the_same_numbers_and_none_twice(pairs):
    ranges = [(first, first + more) for first, more in pairs]
    joined = join_ranges(ranges)
    numbers = [n for first, last in joined for n in range(first, last + 1)]
    assert numbers == sorted({n for first, last in ranges for n in range(first, last + 1)})


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5))), st.integers(0, 40), st.data())
def test_a_rollback_passes_over_the_batches_of_its_steps_and_no_others(skip, step, data):
    rows = Rows(
        members=(), context_size=8, batch_size=5, seed=3, shuffle=True, pad=PAD, end=END,
        skip=join_ranges((first, first + more) for first, more in skip),
    )  # fmt: skip
    first = data.draw(st.integers(0, step))
    seen = [rows.batch_number(one) + 1 for one in (first, step)]
    after = pass_over(rows, [Rollback(first=seen[0], last=seen[1], step=step + 1, to_step=first)])
    numbers = [rows.batch_number(one) for one in range(100)]
    assert [after.batch_number(one) for one in range(first)] == numbers[:first]
    later = [after.batch_number(one) for one in range(first, 99 - (step - first))]
    assert later == numbers[step + 1 :]
