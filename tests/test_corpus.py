"""A store holds exactly the text it was made from, or there is no store and one clear message."""

import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from gptjax.config import ConfigError, DataConfig
from gptjax.corpus import DataError, build_store, find_files, load_corpus, open_store
from gptjax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
PAD = TOKENIZER.pad


def layout(documents):
    """What a store of these documents holds, computed the plain way: tokens, offsets."""
    tokens, offsets = [], []
    for document in documents:
        offsets.append(len(tokens))
        tokens += [TOKENIZER.end, *document]
    return [*tokens, TOKENIZER.end], [*offsets, len(tokens)]


def contents(store):
    store.verify()
    return store.tokens.read().result().tolist(), store.offsets.read().result().tolist()


def load(tmp_path, *paths, accept=lambda split, num_tokens: None, **fields):
    chosen = DataConfig(path=tuple(map(str, paths)), store_dir=str(tmp_path / "stores"), **fields)
    return load_corpus(chosen, TOKENIZER, accept=accept)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def folder(tmp_path):
    """Files in several places, written in another order than theirs."""
    for name in ["b.txt", "a/z.txt", "a/a.txt", "test/t.txt", "a/test/u.txt", "c.py"]:
        write(tmp_path / "text" / name, f"this is {name}\n")
    write(tmp_path / "text" / ".hidden", "no")
    write(tmp_path / "text" / ".git" / "x", "no")
    write(tmp_path / "text" / "empty.txt", "")
    return tmp_path / "text"


# --- stores ------------------------------------------------------------------------------------


def test_a_store_is_its_documents(tmp_path):
    documents = [b"one", "zwölf".encode(), bytes(range(256)), b" ", b"last"]
    store = build_store(documents, TOKENIZER, tmp_path / "store")
    assert contents(store) == layout(documents)
    assert (store.num_documents, store.num_tokens) == (5, len(layout(documents)[0]))
    assert store.manifest.num_bytes == sum(map(len, documents))
    assert (
        contents(build_store(["zwölf"], TOKENIZER, tmp_path / "text"))[0]
        == layout(documents[1:2])[0]
    )


def test_empty_documents_are_left_out(tmp_path):
    store = build_store(["", "a", b"", "b", ""], TOKENIZER, tmp_path / "store")
    assert contents(store) == layout([b"a", b"b"])


def test_a_store_of_several_shards(tmp_path):
    text = np.random.default_rng(0).integers(0, 256, (1 << 24) + 5000, np.uint8)
    text[4_000_000:4_100_000] = 0
    store = build_store([text.tobytes(), b"z"], TOKENIZER, tmp_path / "store")
    expected = np.concatenate([[256], text, [256], [122], [256]])
    np.testing.assert_array_equal(store.tokens.read().result(), expected)
    store.verify()
    starts = np.array([0, 4_050_000, (1 << 24) - 7, len(expected) - 3])
    windows = store.read(starts, 1025, PAD)
    padded = np.concatenate([expected, np.full(1025, PAD)])
    np.testing.assert_array_equal(windows, [padded[start : start + 1025] for start in starts])


def test_reading_past_the_end_gives_padding(tmp_path):
    store = build_store(["abc"], TOKENIZER, tmp_path / "store")
    windows = store.read(np.array([3, 5, 99, 0]), 4, PAD)
    assert windows.dtype == np.int32
    assert windows.tolist() == [[99, 256, PAD, PAD], [PAD] * 4, [PAD] * 4, [256, 97, 98, 99]]


def test_a_large_vocabulary_keeps_its_ids(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size, end = 70_001, 70_000

    store = build_store(["ab"], Wide(), tmp_path / "store")
    assert store.manifest.dtype == "uint32"
    assert store.read(np.array([0]), 4, PAD).tolist() == [[70_000, 97, 98, 70_000]]


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


def test_a_store_is_never_written_over(tmp_path):
    build_store(["a"], TOKENIZER, tmp_path / "store")
    with pytest.raises(DataError, match="is there already"):
        build_store(["b"], TOKENIZER, tmp_path / "store")
    assert contents(open_store(tmp_path / "store", TOKENIZER)) == layout([b"a"])


def test_another_tokenizer_is_refused(tmp_path):
    class Other(ByteTokenizer):
        fingerprint = "0" * 64

    build_store(["a"], TOKENIZER, tmp_path / "store")
    with pytest.raises(DataError, match=f"{TOKENIZER.fingerprint}.*{'0' * 64}"):
        open_store(tmp_path / "store", Other())


def test_damage_is_refused(tmp_path):
    folder = build_store([b"x" * 20_000], TOKENIZER, tmp_path / "store").folder
    manifest, shard = folder / "manifest.json", folder / "tokens" / "c" / "0"
    fields, content = json.loads(manifest.read_text()), shard.read_bytes()

    def refused(message, read):
        with pytest.raises(DataError, match=message):
            store = open_store(folder, TOKENIZER)
            if read:
                store.read(np.array([0]), 100, PAD)

    shard.write_bytes(content[:100] + b"?" + content[101:])
    refused("damaged.*[Dd]igest", read=True)
    shard.write_bytes(content[:-200])
    refused("damaged", read=True)
    shard.unlink()
    refused("damaged.*missing", read=True)
    shard.write_bytes(content)
    manifest.write_text(json.dumps(fields | {"num_tokens": 20_001}))
    refused("20,002 numbers, but the manifest says 20,001", read=False)
    manifest.write_text(json.dumps(fields | {"format": 99}))
    refused("format 99, but only 1 is read", read=False)
    manifest.write_text("{")
    refused("not a manifest", read=False)
    manifest.unlink()
    refused("no manifest.json", read=False)


def test_verify_names_what_differs(tmp_path):
    store = build_store([b"abc"], TOKENIZER, tmp_path / "store")
    forged = replace(store, manifest=replace(store.manifest, offsets_sha256="0" * 64))
    with pytest.raises(DataError, match="offsets: SHA-256"):
        forged.verify()


# --- where text comes from ---------------------------------------------------------------------


def names(*paths, exclude=()):
    return [file.name for file in find_files(map(str, paths), exclude)]


def test_folders_are_read_in_one_order(folder):
    every = ["a/a.txt", "a/test/u.txt", "a/z.txt", "b.txt", "c.py", "empty.txt", "test/t.txt"]
    assert names(folder) == every
    assert names(folder / "**") == every
    assert names(folder / "a", folder / "b.txt", folder / "a" / "z.txt") == [
        "a.txt",
        "test/u.txt",
        "z.txt",
        "b.txt",
    ]
    assert names(folder / "*.txt") == ["b.txt", "empty.txt"]
    assert names(folder / "**" / "*.txt", exclude=["*/test/*"]) == [
        "a/a.txt",
        "a/z.txt",
        "b.txt",
        "empty.txt",
    ]
    assert names(folder, exclude=["a/*", "*.txt"]) == ["c.py"]


def test_one_file_is_one_document(tmp_path, folder):
    train, valid = load(tmp_path, folder, exclude=("*.py",), holdout=0.0)
    order = ["a/a.txt", "a/test/u.txt", "a/z.txt", "b.txt", "test/t.txt"]
    assert contents(train) == layout([f"this is {name}\n".encode() for name in order])
    assert valid is None


def test_gzip_is_opened(tmp_path):
    text = "ein Text, zwölfmal\n" * 12
    plain, packed = (
        write(tmp_path / "a.txt", text),
        write(tmp_path / "b.gz", gzip.compress(text.encode())),
    )
    for one, other in zip(load(tmp_path, plain), load(tmp_path, packed), strict=True):
        assert contents(one) == contents(other)


def test_functions_yield_documents(tmp_path):
    path = write(tmp_path / "mine.py", "def texts():\n    yield 'one'\n    yield b'two'\n")
    train, _ = load(tmp_path, f"{path}:texts", holdout=0.0)
    assert contents(train) == layout([b"one", b"two"])
    assert [source.name for source in train.manifest.source] == ["mine.py:texts"]


def test_bytes_that_are_no_text_are_taken_and_said(tmp_path, caplog):
    path = write(tmp_path / "a.bin", b"\xff\xfe" * 50)
    train, valid = load(tmp_path, path)
    assert (
        contents(train)[0] + contents(valid)[0]
        == layout([b"\xff\xfe" * 45])[0] + layout([b"\xff\xfe" * 5])[0]
    )
    assert [record.message for record in caplog.records] == [
        f"{path}: not UTF-8; the bytes are taken as they are"
    ]


# --- what is held out --------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "share"), [(10, 0.1), (7, 0.3), (100, 0.29), (3, 0.5), (5, 0.9)])
def test_whole_documents_are_held_out_evenly(tmp_path, count, share):
    texts = [f"text {i:03}".encode() for i in range(count)]
    for i, text in enumerate(texts):
        write(tmp_path / "text" / f"{i:03}", text)
    train, valid = load(tmp_path, tmp_path / "text", holdout=share)
    held = [i for i in range(count) if texts[i] in TOKENIZER.decode_bytes(contents(valid)[0])]
    assert contents(valid) == layout([texts[i] for i in held])
    assert contents(train) == layout([text for i, text in enumerate(texts) if i not in held])
    hundredths = round(100 * share)
    assert [sum(i < n for i in held) for n in range(count + 1)] == [
        n * hundredths // 100 for n in range(count + 1)
    ]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("text", ["a" * 99, "é" * 51, "中" * 37, "🙂" * 31])
def test_the_tail_of_one_text_is_held_out(tmp_path, text, share):
    content = text.encode()
    train, valid = load(tmp_path, write(tmp_path / "a.txt", text), holdout=share)
    head, tail = (TOKENIZER.decode_bytes(contents(store)[0]) for store in (train, valid))
    assert head + tail == content
    head.decode(), tail.decode()  # no character is cut
    exact = math.floor(len(content) * (1 - share))
    assert exact - 3 <= len(head) <= exact
    if text.isascii():
        assert len(head) == exact


def test_validation_text_of_its_own(tmp_path):
    a, b = write(tmp_path / "a.txt", "train"), write(tmp_path / "b.txt", "valid")
    train, valid = load(tmp_path, a, valid_path=(str(b),))
    assert (contents(train), contents(valid)) == (layout([b"train"]), layout([b"valid"]))


# --- built once --------------------------------------------------------------------------------


def test_a_store_is_found_again(tmp_path, folder):
    first = load(tmp_path, folder, holdout=0.5)[0]
    built = (first.folder / "manifest.json").stat().st_mtime_ns
    os.utime(folder / "b.txt")  # touched, with the same content
    again = load(tmp_path, folder, holdout=0.5)[0]
    assert again.folder == first.folder
    assert (again.folder / "manifest.json").stat().st_mtime_ns == built
    assert load(tmp_path, folder, holdout=0.4)[0].folder != first.folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: write(folder / "b.txt", "longer than it was before\n"),
            "b.txt has 26 bytes, but had 14",
        ),
        (
            lambda folder: write(folder / "b.txt", "THIS is b.txt\n"),
            "the content of .*b.txt differs",
        ),
        (lambda folder: write(folder / "new.txt", "new"), "new.txt is new"),
        (lambda folder: (folder / "c.py").unlink(), "c.py is gone"),
    ],
)
def test_text_that_changed_is_refused(tmp_path, folder, change, message):
    load(tmp_path, folder, holdout=0.5)
    change(folder)
    with pytest.raises(DataError, match=f"{message}.*delete the folder to build it anew"):
        load(tmp_path, folder, holdout=0.5)


def test_a_kill_leaves_no_store(tmp_path):
    """Killed in the middle of building, then run again: the same as never killed."""
    path = write(
        tmp_path / "mine.py",
        "import os, pathlib, signal\n"
        "def texts():\n"
        "    for i in range(100):\n"
        "        if i == 50 and (pathlib.Path(__file__).parent / 'deadly').exists():\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield f'text {i}'\n",
    )
    script = (
        "import sys; from gptjax.config import DataConfig; from gptjax.corpus import load_corpus\n"
        "from gptjax.tokenizer import ByteTokenizer\n"
        "load_corpus(DataConfig(path=(sys.argv[1],), store_dir=sys.argv[2]), ByteTokenizer())\n"
    )
    command = [sys.executable, "-c", script, f"{path}:texts", str(tmp_path / "stores")]
    deadly = write(tmp_path / "deadly", "")
    assert subprocess.run(command).returncode == -signal.SIGKILL
    left = os.listdir(tmp_path / "stores")
    assert left and all(name.startswith(".") for name in left)
    deadly.unlink()
    train, valid = load(tmp_path, f"{path}:texts")
    assert contents(train) == layout([f"text {i}".encode() for i in range(100) if i % 10 != 9])
    assert contents(valid) == layout([f"text {i}".encode() for i in range(9, 100, 10)])
    assert os.listdir(tmp_path / "stores") == [train.folder.parent.name]


def test_many_build_at_once(tmp_path, folder):
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: load(tmp_path, folder, holdout=0.5)[0], range(4)))
    assert len({store.manifest for store in stores}) == 1
    assert len({(store.folder / "manifest.json").stat().st_ino for store in stores}) == 1


def test_many_fail_at_once(tmp_path, folder):
    def accept(split, num_tokens):
        time.sleep(0.05)  # so that the others wait
        raise DataError("too little")

    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(load, tmp_path, folder, accept=accept, holdout=0.5) for _ in range(4)]
    assert [str(run.exception()) for run in runs] == ["too little"] * 4
    assert not list(tmp_path.glob("stores/*"))


# --- text that cannot be used ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("text/b.tx", "there is no 'b.tx' in .*text.* Did you mean 'b.txt'"),
        ("texd/b.txt", "there is no 'texd' in .* Did you mean 'text'"),
        ("text/*.md", "matches nothing; .*text holds .*b.txt"),
        ("text/[at]*", "matches only folders; give .*/\\*\\* for the files below them"),
        ("hollow", "holds no files but hidden ones"),
        ("text/empty.txt", "nothing but white space for training"),
        ("blank.txt", "nothing but white space for training"),
        ("cut.gz", "cut.gz: not a whole gzip file"),
        ("false.gz", "false.gz: not a whole gzip file"),
        ("mine.py:number", "mine.py:number: failed with TypeError: 'int' object is not iterable"),
        ("mine.py:single", "one str was given; give a list of texts"),
        ("mine.py:broken", "mine.py:broken: failed with ZeroDivisionError"),
        ("mine.py:mixed", "document 1 is of type NoneType; give str or bytes"),
        ("myne.py:mixed", "there is no 'myne.py' in .* Did you mean 'mine.py'"),
    ],
)
def test_text_that_cannot_be_used(tmp_path, folder, path, message):
    write(tmp_path / "hollow" / ".keep", "x")
    write(tmp_path / "blank.txt", " \n\t\r\n")
    write(tmp_path / "cut.gz", gzip.compress(os.urandom(5000))[:-20])
    write(tmp_path / "false.gz", "plain")
    write(
        tmp_path / "mine.py",
        "def number(): return 3\n"
        "def single(): return 'abc'\n"
        "def broken():\n    yield 'a'\n    yield 1 / 0\n"
        "def mixed(): return ['a', None]\n",
    )
    with pytest.raises(DataError, match=f"(?s){message}"):
        load(tmp_path, tmp_path / path)
    assert not (tmp_path / "stores").exists()


def test_an_error_after_the_first_documents_leaves_nothing(tmp_path, folder):
    write(folder / "z.gz", gzip.compress(os.urandom(5000))[:-20])
    with pytest.raises(DataError, match=r"z.gz: not a whole gzip file"):
        load(tmp_path, folder)
    assert not (tmp_path / "stores").exists()


def test_a_split_that_is_not_accepted_leaves_nothing(tmp_path, folder):
    sizes = {}

    def accept(split, num_tokens):
        sizes[split] = num_tokens
        if split == "valid":
            raise DataError("too little")

    with pytest.raises(DataError, match="too little"):
        load(tmp_path, folder, holdout=0.5, accept=accept)
    assert not (tmp_path / "stores").exists()
    stores = load(tmp_path, folder, holdout=0.5)
    assert sizes == dict(zip(["train", "valid"], [one.num_tokens for one in stores], strict=True))
    with pytest.raises(DataError, match="too little"):
        load(tmp_path, folder, holdout=0.5, accept=accept)


def test_choices_that_leave_nothing(tmp_path, folder):
    with pytest.raises(DataError, match=r"data.path is empty: give files, folders"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"data.exclude leaves out all of 7 files"):
        load(tmp_path, folder, exclude=("*",))
    with pytest.raises(
        DataError, match=r"holdout = 0.1: of 6 documents that is none; give at least 0.17"
    ):
        load(tmp_path, folder, holdout=0.1)
    assert load(tmp_path, folder, holdout=0.17)[1].num_documents == 1
    with pytest.raises(DataError, match=r"data.valid_path: .*nowhere: there is no 'nowhere'"):
        load(tmp_path, folder, valid_path=(str(tmp_path / "nowhere"),))
    blank = write(tmp_path / "blank.txt", "\n")
    with pytest.raises(
        DataError, match=r"data.valid_path: .*blank.txt: nothing but white space for validation"
    ):
        load(tmp_path, folder, valid_path=(str(blank),))
    with pytest.raises(ConfigError, match=r"there is no function 'text'.*Did you mean 'texts'"):
        load(tmp_path, f"{write(tmp_path / 'mine.py', 'def texts(): return []')}:text")
