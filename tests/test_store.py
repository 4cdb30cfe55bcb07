"""A store holds exactly its documents, says where each came from, and refuses what is damaged."""

import json
import os
import time

import numpy as np
import pytest

from gptjax.files import write_json
from gptjax.sources import DataError, Fingerprint
from gptjax.store import (
    FILE_SIZE,
    FORMAT,
    ShardWriter,
    Text,
    build_store,
    open_store,
    read_shard_info,
    remove_shards,
    write_manifest,
)
from gptjax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
END, PAD = TOKENIZER.end, TOKENIZER.pad
SOURCES = (Fingerprint("one.txt", 1, "0", 0), Fingerprint("two.txt", 2, "1", 0))


def layout(documents):
    """What a store of these documents holds, computed the plain way: tokens, offsets."""
    tokens, offsets = [], []
    for document in documents:
        offsets.append(len(tokens))
        tokens += [END, *document]
    return [*tokens, END], offsets


def contents(store):
    """The tokens, and where documents begin."""
    store.verify()
    tokens = store.read(np.array([0]), store.num_tokens, PAD)[0].tolist()
    return tokens, [store.document(i).start for i in range(store.num_documents)]


def write_store(folder, shards):
    """A store of shards of texts: (bytes, whether it begins a document)."""
    infos, position = [], 0
    for number, parts in enumerate(shards):
        writer = ShardWriter(folder, number, TOKENIZER)
        for content, begins in parts:
            pieces = lambda content=content: iter([content])  # noqa: E731
            writer.add(Text("a", position % 2, position, len(content), pieces, begins))
            position += 1
        infos.append(writer.close(closes=number == len(shards) - 1))
    write_manifest(folder, TOKENIZER, infos, SOURCES, "all")
    return open_store(folder, TOKENIZER)


SHARDS = [
    [(b"one", True), (b"x" * 70_000, True)],
    [(b"y" * 1000, False)],
    [(b"z" * 5, False), (b"two", True)],
    [(b"three", True)],
]
DOCUMENTS = [b"one", b"x" * 70_000 + b"y" * 1000 + b"z" * 5, b"two", b"three"]


def test_a_store_is_its_documents(tmp_path):
    documents = [b"one", "zwölf".encode(), bytes(range(256)), b" ", b"last"]
    store = build_store(documents, TOKENIZER, tmp_path / "store")
    assert contents(store) == layout(documents)
    assert (store.num_documents, store.num_tokens) == (5, len(layout(documents)[0]))
    assert store.manifest.num_bytes == sum(map(len, documents))
    text = build_store(["zwölf"], TOKENIZER, tmp_path / "text")
    assert contents(text) == layout(documents[1:2])


def test_empty_documents_are_left_out(tmp_path):
    store = build_store(["", "a", b"", "b", ""], TOKENIZER, tmp_path / "store")
    assert contents(store) == layout([b"a", b"b"])


def test_shards_are_one_sequence(tmp_path):
    """Whatever a shard begins or ends with: a document, or a part of one."""
    store = write_store(tmp_path / "store", SHARDS)
    tokens, offsets = layout(DOCUMENTS)
    assert contents(store) == (tokens, offsets)
    padded = np.array(tokens + [PAD] * 1025)
    starts = np.array([0, 3, 69_990, 70_003, 71_000, 71_009, 71_012, len(tokens) - 1, len(tokens)])
    expected = [padded[start : start + 1025] for start in starts]
    np.testing.assert_array_equal(store.read(starts, 1025, PAD), expected)
    np.testing.assert_array_equal(store.read(starts[:2], 71_000, PAD)[0], tokens[:71_000])


def test_every_token_has_a_document(tmp_path):
    store = write_store(tmp_path / "store", SHARDS)
    tokens, offsets = layout(DOCUMENTS)
    expected = np.searchsorted(offsets, np.arange(len(tokens)), side="right") - 1
    np.testing.assert_array_equal(store.documents(np.arange(len(tokens))), expected)
    assert store.documents(np.array([10**9])).tolist() == [3]
    stops = [*offsets[1:], len(tokens) - 1]
    places = [("one.txt", 0), ("two.txt", 1), ("one.txt", 4), ("two.txt", 5)]
    for number, (start, stop, origin) in enumerate(zip(offsets, stops, places, strict=True)):
        assert store.document(number) == (number, start, stop, *origin)
        assert tokens[start:stop] == [END, *DOCUMENTS[number]]
    with pytest.raises(DataError, match="no document 4: they go from 0 to 3"):
        store.document(4)


@pytest.mark.parametrize("sizes", [[100] * 30_000, [1, 70_000, 5, 65_536, 65_537, 3_000_000, 2]])
def test_how_texts_are_encoded_together_changes_nothing(tmp_path, sizes):
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 256, size, np.uint8).tobytes() for size in sizes]
    store = build_store(texts, TOKENIZER, tmp_path / "store")
    expected = np.concatenate([[END, *text] for text in texts] + [[END]])
    tokens = store.read(np.array([0]), store.num_tokens, PAD)[0]
    np.testing.assert_array_equal(tokens, expected)
    assert store.document(5).start == sum(sizes[:5]) + 5


def test_a_shard_of_several_files(tmp_path):
    text = np.random.default_rng(0).integers(0, 256, FILE_SIZE + 5000, np.uint8)
    text[4_000_000:4_100_000] = 0
    store = build_store([text.tobytes(), b"z"], TOKENIZER, tmp_path / "store")
    expected = np.concatenate([[END], text, [END], [122], [END]])
    store.verify()
    starts = np.array([0, 4_050_000, FILE_SIZE - 7, len(expected) - 3])
    windows = store.read(starts, 1025, PAD)
    padded = np.concatenate([expected, np.full(1025, PAD)])
    np.testing.assert_array_equal(windows, [padded[start : start + 1025] for start in starts])


def test_reading_past_the_end_gives_padding(tmp_path):
    store = build_store(["abc"], TOKENIZER, tmp_path / "store")
    windows = store.read(np.array([3, 5, 99, 0]), 4, PAD)
    assert windows.dtype == np.int32
    assert windows.tolist() == [[99, END, PAD, PAD], [PAD] * 4, [PAD] * 4, [END, 97, 98, 99]]


def test_a_large_vocabulary_keeps_its_ids(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size, end = 70_001, 70_000

    store = build_store(["ab"], Wide(), tmp_path / "store")
    assert store.manifest.dtype == "uint32"
    assert store.read(np.array([0]), 4, PAD).tolist() == [[70_000, 97, 98, 70_000]]


@pytest.mark.parametrize("ids", [[258], [-1], [END], [PAD]])
def test_ids_that_stand_for_no_text_are_never_written(tmp_path, ids):
    class Broken(ByteTokenizer):
        def encode(self, text):
            return np.array(ids)

    with pytest.raises(AssertionError):
        build_store(["ab"], Broken(), tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "nothing but white space"),
        (["", " \n", b"\t"], "nothing but white space"),
        (["a", 3], "document 1 is of type int; give str or bytes"),
        ("abc", "one str was given; give a list of texts"),
        (["a", "b\ud800"], "document 1 is no text at character 1"),
    ],
)
def test_documents_that_are_none(tmp_path, documents, message):
    with pytest.raises(DataError, match=message):
        build_store(documents, TOKENIZER, tmp_path / "store")
    assert os.listdir(tmp_path) == []


def test_a_shard_that_is_written_again_is_not_finished_before(tmp_path):
    ShardWriter(tmp_path, 0, TOKENIZER).close("before")
    assert read_shard_info(tmp_path, 0).made_from == "before"
    writer = ShardWriter(tmp_path, 0, TOKENIZER)
    assert read_shard_info(tmp_path, 0) is None
    writer.close("after")
    assert read_shard_info(tmp_path, 0).made_from == "after"


def test_a_store_is_never_written_over(tmp_path):
    build_store(["a"], TOKENIZER, tmp_path / "store")
    with pytest.raises(DataError, match="is there already"):
        build_store(["b"], TOKENIZER, tmp_path / "store")
    assert contents(open_store(tmp_path / "store", TOKENIZER)) == layout([b"a"])


def test_a_store_at_a_url(tmp_path):
    url = f"file://{tmp_path}/store"
    store = build_store([b"one", b"two"], TOKENIZER, url)
    assert contents(store) == contents(open_store(tmp_path / "store", TOKENIZER))
    assert contents(open_store(url, TOKENIZER)) == layout([b"one", b"two"])


def test_another_tokenizer_is_refused(tmp_path):
    class Other(ByteTokenizer):
        fingerprint = "0" * 64

    build_store(["a"], TOKENIZER, tmp_path / "store")
    with pytest.raises(DataError, match=f"{TOKENIZER.fingerprint}.*{'0' * 64}"):
        open_store(tmp_path / "store", Other())


def test_damage_is_refused(tmp_path):
    folder = build_store([b"x" * 20_000], TOKENIZER, tmp_path / "store").folder
    manifest, file = folder / "manifest.json", folder / "shards/00000/tokens/c/0"
    fields, content = json.loads(manifest.read_text()), file.read_bytes()

    def refused(message, read=True):
        with pytest.raises(DataError, match=message):
            store = open_store(folder, TOKENIZER)
            if read:
                store.read(np.array([0]), 100, PAD)

    file.write_bytes(content[:100] + b"?" + content[101:])
    refused("damaged.*[Dd]igest")
    file.write_bytes(content[:-200])
    refused("damaged")
    file.unlink()
    refused("damaged.*missing")
    file.write_bytes(content)
    manifest.write_text(json.dumps(fields | {"shard_tokens": [20_001]}))
    refused("tokens: 20,002 numbers, but the manifest says 20,001")
    manifest.write_text(json.dumps(fields | {"shard_tokens": [20_002, 1]}))
    refused("not a manifest", read=False)
    manifest.write_text(json.dumps(fields | {"format": 1}))
    refused(f"format 1, but only {FORMAT} is read", read=False)
    manifest.write_text("{")
    refused("not a manifest", read=False)
    manifest.write_text("[]")
    refused("not a manifest", read=False)
    manifest.unlink()
    refused("no manifest.json", read=False)


@pytest.mark.parametrize("change", ["documents", "tokens", "bytes", "sha256"])
def test_verify_names_what_differs(tmp_path, change):
    store = write_store(tmp_path / "store", SHARDS)
    store.verify()
    path = store.folder / "shards/00001/shard.json"
    fields = json.loads(path.read_text())
    if change == "sha256":
        fields["sha256"]["offsets"], message = "0" * 64, "00001/offsets: SHA-256"
    else:
        fields[change], message = 7, "00001/shard.json: is not what the manifest says"
    path.write_text(json.dumps(fields))
    with pytest.raises(DataError, match=message):
        store.verify()


def test_verify_compares_the_whole(tmp_path):
    """A shard that was put in another's place, with its checksums, is found."""
    store = write_store(tmp_path / "store", [[(b"one", True)], [(b"two", True)]])
    write_store(tmp_path / "other", [[(b"six", True)], [(b"two", True)]])
    os.rename(store.folder / "shards/00000", tmp_path / "gone")
    os.rename(tmp_path / "other/shards/00000", store.folder / "shards/00000")
    with pytest.raises(DataError, match="store: SHA-256 is not what the manifest says"):
        open_store(store.folder, TOKENIZER).verify()


def sparse_store(folder, num_shards, size):
    """A store of shards of a size whose tokens all are the same, with nothing on disk."""
    build_store(["a"], TOKENIZER, folder)
    fields = json.loads((folder / "manifest.json").read_text())
    fields |= {f"shard_{name}": [size] * num_shards for name in ("tokens", "bytes")}
    fields["shard_documents"] = [1] * num_shards
    write_json(folder, "manifest.json", fields)


def test_opening_does_not_depend_on_the_size(tmp_path):
    """100,000,000,000 tokens in 6,400 shards."""
    sparse_store(tmp_path / "store", 6400, 1 << 24)
    start = time.perf_counter()
    store = open_store(tmp_path / "store", TOKENIZER)
    assert time.perf_counter() - start < 1
    assert store.num_tokens > 1e11


def test_windows_of_a_very_large_store(tmp_path):
    """Of 100,000,000,000 tokens, of which those of four shards are there."""
    size, there = 1 << 24, (0, 2999, 3000, 6399)
    sparse_store(tmp_path / "store", 6400, size)
    text = np.random.default_rng(0).integers(0, 256, size - 1, np.uint8)
    for number in there:
        writer = ShardWriter(tmp_path / "store", number, TOKENIZER)
        pieces = lambda number=number: iter([np.roll(text, number).tobytes()])  # noqa: E731
        writer.add(Text("a", 0, 0, size - 1, pieces))
        writer.close(closes=False)
    began = time.perf_counter()
    store = open_store(tmp_path / "store", TOKENIZER)
    assert time.perf_counter() - began < 1
    rng = np.random.default_rng(1)
    inside = rng.integers(0, size - 1025, (3, len(there)))
    across = 3000 * size - rng.integers(1, 1025, 3)
    starts = rng.permutation([*(np.array(there) * size + inside).ravel(), *across, 6400 * size - 9])
    began = time.perf_counter()
    windows = store.read(starts, 1025, PAD)
    assert time.perf_counter() - began < 1
    for start, window in zip(starts.tolist(), windows, strict=True):
        shard, place = np.divmod(start + np.arange(1025), size)
        expected = np.where(place > 0, text[(place - 1 - shard) % (size - 1)].astype(int), END)
        np.testing.assert_array_equal(window, np.where(shard < 6400, expected, PAD))
    assert len(os.listdir(tmp_path / "store/shards")) == len(there)
    with pytest.raises(DataError, match="damaged"):
        store.read(np.array([7 * size]), 1025, PAD)


@pytest.mark.slow
def test_windows_are_read_quickly(tmp_path):
    """Random windows of 1,025 tokens over many shards."""
    rng = np.random.default_rng(0)
    shards = [[(rng.bytes(8 << 20), True)] for _ in range(8)]
    store = write_store(tmp_path / "store", shards)
    speeds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(20):
            store.read(rng.integers(0, store.num_tokens - 1025, 256), 1025, PAD)
        speeds.append(20 * 256 / (time.perf_counter() - start))
    print(f"{max(speeds):,.0f} windows a second")
    assert max(speeds) > 10_000  # half of what is asked, for machines that are busy


def test_shards_are_removed_by_their_numbers(tmp_path):
    for number in (5, 10_000, 99_999, 100_000, 100_001, 100_002):
        write_json(tmp_path, f"shards/{number:05}/shard.json", {})
    remove_shards(tmp_path, 100_001)
    left = {int(path.parent.name) for path in tmp_path.rglob("shard.json")}
    assert left == {5, 10_000, 99_999, 100_000}
    remove_shards(tmp_path, 20_000)
    assert {path.parent.name for path in tmp_path.rglob("shard.json")} == {"00005", "10000"}
