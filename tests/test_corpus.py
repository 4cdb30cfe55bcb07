"""Stores hold exactly the text they were made from, however they were built; or there are none and
one clear message."""

import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from gptjax import layout as layout_file
from gptjax import pool as pool_file
from gptjax import survey as survey_file
from gptjax.config import ConfigError, DataConfig
from gptjax.corpus import load_corpus
from gptjax.sources import DataError, find_sources
from gptjax.sources import lines as lines_file
from gptjax.store import open_store
from gptjax.survey import Span
from gptjax.survey import texts as read_texts
from gptjax.tokenizer import ByteTokenizer, make_tokenizer

TOKENIZER = ByteTokenizer()
PAD = TOKENIZER.pad


def layout(documents):
    """What a store of these documents holds, computed the plain way: tokens, offsets."""
    tokens, offsets = [], []
    for document in documents:
        offsets.append(len(tokens))
        tokens += [TOKENIZER.end, *document]
    return [*tokens, TOKENIZER.end], offsets


def contents(store):
    """The tokens, and where documents begin."""
    store.verify()
    tokens = store.read(np.array([0]), store.num_tokens, PAD)[0].tolist()
    return tokens, [store.document(i).start for i in range(store.num_documents)]


def texts(store):
    """The documents of a store."""
    tokens, _ = contents(store)
    places = [store.document(i) for i in range(store.num_documents)]
    return [TOKENIZER.decode_bytes(tokens[one.start : one.stop]) for one in places]


def load(tmp_path, *paths, accept=lambda split, num_tokens: None, **fields):
    given = dict(store_dir=str(tmp_path / "stores"), workers=1) | fields
    chosen = DataConfig(path=tuple(map(str, paths)), **given)
    return load_corpus(chosen, TOKENIZER, accept=accept)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_lines(path, documents):
    return write(path, "".join(json.dumps({"text": text}) + "\n" for text in documents))


def every_file(folder):
    """The content of each file below a folder."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def folder(tmp_path):
    """Files in several places, written in another order than theirs."""
    for name in ["b.txt", "a/z.txt", "a/a.txt", "test/t.txt", "a/test/u.txt", "c.py"]:
        write(tmp_path / "text" / name, f"this is {name}\n")
    write(tmp_path / "text" / ".hidden", "no")
    write(tmp_path / "text" / ".git" / "x", "no")
    write(tmp_path / "text" / "empty.txt", "")
    return tmp_path / "text"


@pytest.fixture
def small(monkeypatch):
    """Shards of a few hundred bytes. Only in this process, so with one worker."""
    monkeypatch.setattr(survey_file, "SPAN_BYTES", 300)
    monkeypatch.setattr(survey_file, "OVERLAP", 16)
    monkeypatch.setattr(layout_file, "LEAST_BYTES", 900)


# --- what becomes a document ------------------------------------------------------------------


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
    path = write(tmp_path / "a.dat", b"\xff\xfe" * 50)
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


# --- what is left out --------------------------------------------------------------------------


@pytest.mark.parametrize("sized", [False, True])
def test_the_first_of_equal_documents_stays(tmp_path, sized, request):
    if sized:
        request.getfixturevalue("small")
    documents = [f"text {i * i % 97} " + "x" * (i * i % 97) for i in range(200)]
    lines = write_lines(tmp_path / "a.jsonl", documents)
    again = write_lines(tmp_path / "b.jsonl", [*documents[:50], "new", "y" * 900, "y" * 900])
    train, _ = load(tmp_path, lines, again, holdout=0.0, deduplicate=True)
    unique = list(dict.fromkeys([*documents, "new", "y" * 900]))
    assert texts(train) == [text.encode() for text in unique]
    assert train.manifest.dropped == {"duplicate": 253 - len(unique)}


def test_validation_text_has_nothing_of_training_text(tmp_path):
    a = write_lines(tmp_path / "a.jsonl", ["one", "two", "one"])
    b = write_lines(tmp_path / "b.jsonl", ["two", "three", "three"])
    train, valid = load(tmp_path, a, valid_path=(str(b),), deduplicate=True)
    assert (texts(train), texts(valid)) == ([b"one", b"two"], [b"three"])
    assert (train.manifest.dropped, valid.manifest.dropped) == ({"duplicate": 1}, {"duplicate": 2})


@pytest.mark.parametrize("sized", [False, True])
def test_a_filter_leaves_documents_out(tmp_path, sized, request):
    if sized:
        request.getfixturevalue("small")
    documents = [f"text {i} " * (i % 40) + "." for i in range(100)]
    path = write_lines(tmp_path / "a.jsonl", documents)
    code = write(tmp_path / "mine.py", "def short(text): return len(text) % 3 == 0\n")
    kept = [text.encode() for text in documents if len(text) % 3 == 0]
    train, valid = load(tmp_path, path, filter=f"{code}:short")
    assert texts(train) == [text for i, text in enumerate(kept) if i % 10 != 9]
    assert texts(valid) == kept[9::10]
    assert train.manifest.dropped == {"filter": 100 - len(kept)}
    lines = [train.document(i).position for i in range(train.num_documents)]
    assert [documents[line - 1].encode() for line in lines] == texts(train)


def test_a_filter_that_changed_makes_another_store(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["one", "three"])
    code = write(tmp_path / "mine.py", "def some(text): return len(text) > 3\n")
    assert texts(load(tmp_path, path, filter=f"{code}:some", holdout=0.0)[0]) == [b"three"]
    write(code, "def some(text): return len(text) < 4\n")
    assert texts(load(tmp_path, path, filter=f"{code}:some", holdout=0.0)[0]) == [b"one"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1 / (len(text) - 5)", "some: failed with ZeroDivisionError.*a.jsonl:2"),
        ("pass", "some: returned None for .*a.jsonl:1; return True"),
        ("return False", "nothing that data.filter keeps"),
    ],
)
def test_filters_that_are_none(tmp_path, body, message):
    path = write_lines(tmp_path / "a.jsonl", ["one", "three"])
    code = write(
        tmp_path / "mine.py", f"def some(text):\n    {body} == 0\n".replace("pass == 0", "pass")
    )
    if "False" in body:
        write(code, "def some(text): return False\n")
    with pytest.raises(DataError, match=message):
        load(tmp_path, path, filter=f"{code}:some")
    assert not (tmp_path / "stores").exists()


def test_bad_records_are_counted_and_listed(tmp_path, small):
    good = [f"text {i}" for i in range(3000)]
    lines = [json.dumps({"text": text}) for text in good]
    for place in (0, 1500, 3002):
        lines.insert(place, "{")
    path = write(tmp_path / "a.jsonl", "\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"a.jsonl:1 "):
        load(tmp_path, path, holdout=0.0)
    train, _ = load(tmp_path, path, holdout=0.0, on_bad_record="skip")
    assert texts(train) == [text.encode() for text in good]
    assert train.manifest.dropped == {"bad record": 3}
    assert [
        f"a.jsonl:{line} " in text
        for line, text in zip((1, 1501, 3003), train.manifest.bad_records, strict=True)
    ] == [True] * 3


def test_too_many_bad_records_are_refused(tmp_path):
    lines = [json.dumps({"text": "a"})] * 1000
    path = write(tmp_path / "a.jsonl", "\n".join(["{", *lines[:100]]))
    assert load(tmp_path, path, on_bad_record="skip")[0].manifest.dropped == {"bad record": 1}
    write(path, "\n".join([*lines, "{", "["]))
    with pytest.raises(DataError, match=r"2 of 1,002 records are bad, more than 0.1%.*:1001"):
        load(tmp_path, path, on_bad_record="skip", store_dir=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


# --- shards ------------------------------------------------------------------------------------


class PairTokenizer(ByteTokenizer):
    """Two bytes that are no spaces make a token, from the left, so where a text is cut matters; and
    a token of its own stands for the beginning of a text."""

    vocab_size, end, pad = 1 << 16, 65_534, 65_535
    fingerprint = "pairs"
    beginning = 65_533

    def rest(self, text):
        words = text.replace(b" ", b"\0 ").split(b"\0")
        pairs = (word[i : i + 2] for word in words for i in range(0, len(word), 2))
        return [int.from_bytes(pair, "big") for pair in pairs]

    def encode(self, text):
        return np.array([self.beginning, *self.rest(text)], np.int32)

    def encode_pieces(self, pieces, begins=True):
        ids = self.rest(b"".join(pieces))
        yield np.array([self.beginning, *ids] if begins else ids, np.int32)

    def cut(self, text, after):
        place = text.find(b" ", after, len(text) - 1)
        return None if place < 0 else place


@pytest.mark.parametrize("piece_bytes", [64, 1 << 22])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_long_text_in_shards_is_the_text(tmp_path, small, monkeypatch, piece_bytes, share):
    monkeypatch.setattr(lines_file, "PIECE_BYTES", piece_bytes)
    rng = np.random.default_rng(0)
    words = ["é" * n + "a" * m for n, m in rng.integers(1, 40, (300, 2))]
    text = " ".join(words).encode()
    path, other = write(tmp_path / "a.txt", text), write(tmp_path / "b.txt", b"short")
    tokenizer = PairTokenizer()
    paths = (str(path), str(other)) if not share else (str(path),)
    config = DataConfig(path=paths, store_dir=str(tmp_path / "stores"), workers=1, holdout=share)
    train, valid = load_corpus(config, tokenizer)
    assert len(train.manifest.shard_tokens) > 10
    tokens = train.read(np.array([0]), train.num_tokens, PAD)[0].tolist()
    end, ids = tokenizer.end, tokenizer.encode(text).tolist()
    if not share:
        assert tokens == [end, *ids, end, *tokenizer.encode(b"short").tolist(), end]
        assert train.document(1) == (1, len(ids) + 1, len(tokens) - 1, "b.txt", 0)
        return
    held = valid.read(np.array([0]), valid.num_tokens, PAD)[0].tolist()
    assert held[1] == tokenizer.beginning
    assert tokens[1:-1] + held[2:-1] == ids
    assert (train.num_documents, valid.num_documents) == (1, 1)
    assert [*text[valid.document(0).position :]][:1] == [ord(" ")]


def test_byte_pairs_in_shards_are_those_of_the_text(
    tmp_path, tinyshakespeare, shared_data, monkeypatch
):
    monkeypatch.setattr(survey_file, "SPAN_BYTES", 30_000)
    monkeypatch.setattr(layout_file, "LEAST_BYTES", 30_000)
    config = DataConfig(
        path=(str(tinyshakespeare),),
        tokenizer=str(shared_data / "gpt2-bpe"),
        store_dir=str(tmp_path / "stores"),
        workers=1,
    )
    tokenizer = make_tokenizer(config)
    train, valid = load_corpus(config, tokenizer)
    assert len(train.manifest.shard_tokens) > 20
    parts = [store.read(np.array([0]), store.num_tokens, 0)[0][1:-1] for store in (train, valid)]
    text = tinyshakespeare.read_bytes()
    np.testing.assert_array_equal(np.concatenate(parts), tokenizer.encode(text))
    assert tokenizer.decode_bytes(parts[1]) == text[valid.document(0).position :]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.29])
def test_documents_in_shards_are_the_documents(tmp_path, small, share):
    rng = np.random.default_rng(0)
    documents = [rng.bytes(size) for size in rng.integers(1, 900, 100)]
    for i, document in enumerate(documents[:40]):
        write(tmp_path / "text" / f"{i:03}", document)
    for i in range(40, 100, 15):
        text = "\n".join(json.dumps(one.decode("latin-1")) for one in documents[i : i + 15])
        packed = gzip.compress(text.encode()) if i % 2 else text.encode()
        write(tmp_path / "text" / f"{i:03}.jsonl{'.gz' if i % 2 else ''}", packed)
    documents[40:] = [one.decode("latin-1").encode() for one in documents[40:]]
    train, valid = load(tmp_path, tmp_path / "text", holdout=share)
    assert len(train.manifest.shard_tokens) > 5
    hundredths = round(100 * share)
    held = [i for i in range(100) if (i + 1) * hundredths // 100 > i * hundredths // 100]
    assert contents(train) == layout([one for i, one in enumerate(documents) if i not in held])
    if share:
        assert contents(valid) == layout([documents[i] for i in held])


def large_corpus(tmp_path):
    """Enough for some shards with the constants as they are, in files of several kinds."""
    rng = np.random.default_rng(0)
    text = rng.integers(97, 123, 20 << 20, np.uint8).tobytes()
    write(tmp_path / "text" / "a.txt", text[: 9 << 20])
    lines = (
        json.dumps({"text": text[i : i + 3000].decode()}) for i in range(9 << 20, 20 << 20, 3000)
    )
    write(tmp_path / "text" / "b.jsonl.gz", gzip.compress("\n".join(lines).encode(), 1))
    write(tmp_path / "text" / "c.txt", "short")
    return tmp_path / "text"


def test_workers_do_not_change_a_byte(tmp_path):
    path = large_corpus(tmp_path)
    for workers in (1, 3):
        where = tmp_path / f"stores{workers}"
        train, valid = load(tmp_path, path, store_dir=str(where), workers=workers, deduplicate=True)
    assert len(train.manifest.shard_tokens) >= 4 and valid.num_documents > 300
    one, other = every_file(tmp_path / "stores1"), every_file(tmp_path / "stores3")
    assert one == other


def test_beam_does_not_change_a_byte(tmp_path):
    pytest.importorskip("apache_beam")
    path = large_corpus(tmp_path)
    for where, beam in (("pool", None), ("beam", [])):
        config = DataConfig(path=(str(path),), store_dir=str(tmp_path / where), workers=1)
        load_corpus(config, TOKENIZER, beam=beam)
    assert every_file(tmp_path / "pool") == every_file(tmp_path / "beam")


def test_beam_that_is_not_installed(tmp_path, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    config = DataConfig(path=(str(folder),), store_dir=str(tmp_path / "stores"))
    with pytest.raises(ConfigError, match=r"pip install 'gptjax\[beam\]'"):
        load_corpus(config, TOKENIZER, beam=[])


def test_beam_cannot_reach_a_function(tmp_path):
    path = write(tmp_path / "mine.py", "def texts(): return ['a', 'b']\n")
    config = DataConfig(path=(f"{path}:texts",), store_dir=f"file://{tmp_path}/stores")
    with pytest.raises(ConfigError, match="cannot be read by the machines of a pipeline"):
        load_corpus(config, TOKENIZER, beam=[])


def test_a_store_at_a_url_is_the_same(tmp_path, folder):
    load(tmp_path, folder, holdout=0.5)
    url = f"file://{tmp_path}/remote"
    train, _ = load(tmp_path, folder, holdout=0.5, store_dir=url)
    assert every_file(tmp_path / "stores") == every_file(tmp_path / "remote")
    manifest = tmp_path / "remote" / train.folder.removeprefix(url + "/") / "manifest.json"
    built = manifest.stat().st_mtime_ns
    load(tmp_path, folder, holdout=0.5, store_dir=url)
    assert manifest.stat().st_mtime_ns == built


def test_sources_at_a_url_are_those_on_disk(tmp_path, folder):
    memory = fsspec.filesystem("memory")
    for name, content in every_file(folder).items():
        memory.pipe(f"/corpus/{name}", content)
    on_disk = load(tmp_path, folder, exclude=("*.py",), holdout=0.4)
    remote = load(tmp_path, "memory://corpus", exclude=("*.py",), holdout=0.4)
    for one, other in zip(on_disk, remote, strict=True):
        assert one.folder != other.folder
        assert contents(one) == contents(other)
    assert load(tmp_path, "memory://corpus", exclude=("*.py",), holdout=0.4)[0].folder
    memory.pipe("/corpus/b.txt", b"THIS is b.txt\n")
    with pytest.raises(DataError, match=r"the content of memory://\S*b.txt differs"):
        load(tmp_path, "memory://corpus", exclude=("*.py",), holdout=0.4)


@pytest.mark.parametrize("url", ["memory://stores", "https://example.org/stores", "s4://stores"])
def test_urls_that_cannot_hold_stores(tmp_path, folder, url):
    with pytest.raises(ConfigError, match=rf"data.store_dir = '{url}': .*give a folder, or a URL"):
        load(tmp_path, folder, store_dir=url)


def test_a_store_at_a_url_that_is_not_accepted_leaves_no_files(tmp_path, folder):
    def accept(split, num_tokens):
        raise DataError("too little")

    with pytest.raises(DataError, match="too little"):
        load(tmp_path, folder, holdout=0.5, store_dir=f"file://{tmp_path}/remote", accept=accept)
    assert every_file(tmp_path / "remote") == {}


MEASURED = """
import resource, sys
from gptjax.config import DataConfig
from gptjax.corpus import load_corpus
from gptjax.tokenizer import ByteTokenizer
config = DataConfig(path=(sys.argv[1],), store_dir=sys.argv[2], workers=1)
load_corpus(config, ByteTokenizer())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_a_text(tmp_path):
    peaks = []
    for size in (8 << 20, 80 << 20):
        path = write(tmp_path / str(size), b"some words of a text\n" * (size // 21))
        command = [sys.executable, "-c", MEASURED, str(path), str(tmp_path / "stores")]
        peaks.append(int(subprocess.run(command, capture_output=True, check=True).stdout))
    assert peaks[1] < peaks[0] + 60_000, peaks  # KiB; the text alone has 80,000


def test_a_function_is_called_once(tmp_path, small):
    """It may not yield the same again, and each shard reads its own part."""
    path = write(
        tmp_path / "mine.py",
        "import pathlib, random\n"
        "def texts():\n"
        "    with open(pathlib.Path(__file__).parent / 'calls', 'a') as file:\n"
        "        file.write('x')\n"
        "    for i in range(200):\n"
        "        yield f'{random.random()} ' * 5\n",
    )
    train, valid = load(tmp_path, f"{path}:texts", holdout=0.1)
    assert (tmp_path / "calls").read_text() == "x"
    assert (train.num_documents, valid.num_documents) == (180, 20)
    assert len({*texts(train), *texts(valid)}) == 200


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


PROGRAM = """
import os, sys, time
from gptjax import layout, survey
from gptjax.config import DataConfig
from gptjax.corpus import load_corpus
from gptjax.tokenizer import ByteTokenizer
survey.SPAN_BYTES, layout.LEAST_BYTES = 300, 900
path, stores, workers, filter_ = sys.argv[1:]
config = DataConfig(
    path=(path,),
    store_dir=stores,
    workers=int(workers),
    filter=filter_ or None,
    deduplicate=True,
    holdout=0.0,
)
load_corpus(config, ByteTokenizer(), progress=True)
"""


def start(tmp_path, path, workers=1, filter_=""):
    """A build in a process of its own, in shards of a few hundred bytes if there is one worker."""
    command = [sys.executable, "-c", PROGRAM, path, tmp_path / "stores", workers, filter_]
    return subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)


def wait_for(condition):
    """Wait until something is true; what it is."""
    for _ in range(1000):
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("it never came")


def finished(tmp_path):
    """When each finished shard was written, by its place."""
    found = tmp_path.glob("stores/.*/store/*/shards/*/shard.json")
    return {path.relative_to(path.parents[4]): path.stat().st_mtime_ns for path in found}


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_kill_keeps_the_shards_that_are_finished(tmp_path, small, name):
    """Killed anywhere and run again: the same as never killed, and no shard is written twice."""
    documents = [f"text {i} " * 40 for i in range(100)]
    path = write_lines(tmp_path / "a.jsonl", documents)
    fields = dict(deduplicate=True, holdout=0.0, store_dir=str(tmp_path / "other"))
    expected = load(tmp_path, path, **fields)[0]
    seen: dict = {}
    for _ in range(2):
        build = start(tmp_path, path)
        wait_for(lambda: len(finished(tmp_path)) > len(seen) + 3)  # noqa: B023
        build.send_signal(getattr(signal, name))
        messages = build.communicate()[1]
        assert build.returncode != 0
        assert not seen or f"{len(seen):,} of " in messages
        now = finished(tmp_path)
        assert now.items() >= seen.items()
        seen = now
        assert all(entry.startswith(".") for entry in os.listdir(tmp_path / "stores"))
    build = start(tmp_path, path)
    assert f"{len(seen):,} of " in build.communicate()[1]
    assert build.returncode == 0
    [store] = (tmp_path / "stores").iterdir()
    assert every_file(store) == every_file(Path(expected.folder).parent)
    for shard, when in seen.items():
        assert (store / shard.relative_to(shard.parts[0])).stat().st_mtime_ns == when


@pytest.mark.parametrize("count", [12, 100])
def test_shards_of_other_text_are_not_kept(tmp_path, small, count):
    path = write_lines(tmp_path / "a.jsonl", [f"text {i} " * 40 for i in range(100)])
    build = start(tmp_path, path)
    wait_for(lambda: len(finished(tmp_path)) > 8)
    build.kill()
    build.wait()
    write_lines(path, [f"TEXT {i} " * 40 for i in range(count)])
    build = start(tmp_path, path)
    assert " of " not in build.communicate()[1].replace("shard", "")
    fields = dict(deduplicate=True, holdout=0.0, store_dir=str(tmp_path / "other"))
    expected = load(tmp_path, path, **fields)[0]
    [store] = (tmp_path / "stores").iterdir()
    assert every_file(store) == every_file(Path(expected.folder).parent)


@pytest.mark.parametrize("lost", ["", "part", "all"])
def test_what_a_function_yielded_is_kept_with_the_shards(tmp_path, small, lost):
    """It is called again only if that is lost, and then the shards are of what it yields now."""
    path = write(
        tmp_path / "mine.py",
        "import pathlib, random\n"
        "def texts():\n"
        "    with open(pathlib.Path(__file__).parent / 'calls', 'a') as file:\n"
        "        file.write('x')\n"
        "    for i in range(100):\n"
        "        yield f'{random.randrange(10**9, 10**10)} ' * 40\n",
    )
    build = start(tmp_path, f"{path}:texts")
    wait_for(lambda: len(finished(tmp_path)) > 3)
    build.kill()
    build.wait()
    [spool] = tmp_path.glob("stores/.*/store/spool/train-0")
    if lost == "part":
        os.truncate(spool, 1000)
    elif lost:
        spool.unlink()
    build = start(tmp_path, f"{path}:texts")
    assert (" of " in build.communicate()[1]) == (not lost)
    assert (tmp_path / "calls").read_text() == ("xx" if lost else "x")
    [folder] = (tmp_path / "stores").iterdir()
    store = open_store(folder / "train", TOKENIZER)
    assert [len(text) for text in texts(store)] == [11 * 40] * 100


def write_deadly(tmp_path):
    """A filter that says which processes call it, and kills them or takes its time when told."""
    return write(
        tmp_path / "mine.py",
        "import os, pathlib, signal, time\n"
        "here = pathlib.Path(__file__).parent\n"
        "def keep(text):\n"
        "    (here / 'pids').mkdir(exist_ok=True)\n"
        "    (here / 'pids' / str(os.getpid())).touch()\n"
        "    if (here / 'slow').exists():\n"
        "        time.sleep(100)\n"
        "    if text == 'late':\n"
        "        time.sleep(1.5)\n"
        "    if text == 'stuck':\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    if text == 'deadly':\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return True\n",
    )


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(tmp_path):
    return [int(path.name) for path in tmp_path.glob("pids/*")]


def test_a_worker_that_dies_is_named(tmp_path):
    code = write_deadly(tmp_path)
    for name, text in [("a", "stuck"), ("b", "deadly"), ("c", "two"), ("d", "three")]:
        write(tmp_path / "text" / name, text)
    began = time.monotonic()
    message = r"worker \d+ was killed by SIGKILL, perhaps for want of memory at .*text/b; run again"
    with pytest.raises(DataError, match=message):
        load(tmp_path, tmp_path / "text", filter=f"{code}:keep", workers=2)
    assert time.monotonic() - began < 10
    assert pids(tmp_path) and not any(map(is_running, pids(tmp_path)))


def children():
    """Processes of this machine that this one has started."""
    own = Path("/proc/self/task").glob("*/children")
    return [int(pid) for path in own for pid in path.read_text().split()]


def test_a_worker_that_dies_leaves_the_other_shards(tmp_path):
    for name in "abcdefgh":
        write(tmp_path / "text" / name, name * (6 << 20))
    config = DataConfig(
        path=(str(tmp_path / "text"),), store_dir=str(tmp_path / "stores"), workers=2, holdout=0.0
    )
    with ThreadPoolExecutor(1) as thread:
        building = thread.submit(load_corpus, config, TOKENIZER)
        wait_for(lambda: finished(tmp_path))
        os.kill(children()[0], signal.SIGKILL)
        with pytest.raises(DataError, match=r"was killed by SIGKILL.* at shard \d+ of train"):
            building.result()
    seen = finished(tmp_path)
    assert seen
    [store] = [load_corpus(config, TOKENIZER)[0]]
    for shard, when in seen.items():
        assert store.folder.parent.joinpath(*shard.parts[1:]).stat().st_mtime_ns == when


def test_workers_end_with_their_parent(tmp_path):
    write(tmp_path / "slow", "")
    code = write_deadly(tmp_path)
    for name in "abcd":
        write(tmp_path / "text" / name, "text")
    build = start(tmp_path, tmp_path / "text", 2, f"{code}:keep")
    workers = wait_for(lambda: len(found := pids(tmp_path)) == 2 and found)
    build.kill()
    build.wait()
    wait_for(lambda: not any(map(is_running, workers)))


def test_ctrl_c_ends_workers_that_hang(tmp_path):
    """One that sleeps, and one that is stopped and hears no signal."""
    code = write_deadly(tmp_path)
    write(tmp_path / "text" / "a", "stuck")
    write(tmp_path / "text" / "b", "late")
    write(tmp_path / "text" / "c", "late")
    build = start(tmp_path, tmp_path / "text", 2, f"{code}:keep")
    workers = wait_for(lambda: len(found := pids(tmp_path)) == 2 and found)
    began = time.monotonic()
    build.send_signal(signal.SIGINT)
    assert build.wait(timeout=10) != 0
    assert time.monotonic() - began < 1
    assert not any(map(is_running, workers))


def test_a_worker_that_makes_no_progress_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pool_file, "STILL_SECONDS", 0.2)
    code = write_deadly(tmp_path)
    for name, text in [("a", "late"), ("b", "two")]:
        write(tmp_path / "text" / name, text)
    config = DataConfig(
        path=(str(tmp_path / "text"),),
        store_dir=str(tmp_path / "stores"),
        filter=f"{code}:keep",
        workers=2,
    )
    load_corpus(replace(config, holdout=0.5), TOKENIZER, progress=True)
    shown = [line for line in capsys.readouterr().err.split("\r") if "reading text" in line]
    assert any(re.search(r"worker \d+ is still at \S*text/a", line) for line in shown)
    assert "still" not in shown[-1]


def test_an_error_in_a_worker_is_the_caller_s(tmp_path, folder):
    write(folder / "z.gz", gzip.compress(os.urandom(5000))[:-20])
    with pytest.raises(DataError, match=r"z.gz .*not a whole gzip file"):
        load(tmp_path, folder, workers=3)
    assert not (tmp_path / "stores").exists()


@pytest.mark.parametrize("content", ["more than before", "THIS is b.txt\n"])
def test_text_that_changes_while_it_is_read_is_refused(tmp_path, folder, content):
    code = write(
        tmp_path / "mine.py",
        "def keep(text):\n"
        "    if text == 'this is b.txt\\n':\n"
        f"        open({str(folder / 'b.txt')!r}, 'w').write({content!r})\n"
        "    return True\n",
    )
    with pytest.raises(DataError, match=r"changed while it was read.*run again"):
        load(tmp_path, folder, filter=f"{code}:keep", holdout=0.5)
    assert not list(tmp_path.glob("stores/*"))


@pytest.mark.parametrize("change", [{"count": 4}, {"size": 12}])
def test_records_that_are_not_as_surveyed_are_refused(tmp_path, change):
    path = write_lines(tmp_path / "a.jsonl", ["one", "two", "three"])
    [source] = find_sources(DataConfig(path=(str(path),)))
    span = Span(0, cursor=0, position=1, count=3, size=11)
    assert [text.position for text in read_texts(source, span)] == [1, 2, 3]
    with pytest.raises(DataError, match=r"a.jsonl: has changed while it was read"):
        list(read_texts(source, span._replace(**change)))


def test_many_build_at_once(tmp_path, folder):
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: load(tmp_path, folder, holdout=0.5)[0], range(4)))
    assert all(store.manifest == stores[0].manifest for store in stores)
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
        ("text/empty.txt", "nothing but white space for training"),
        ("blank.txt", "nothing but white space for training"),
        ("cut.gz", "cut.gz .*not a whole gzip file"),
        ("bad.jsonl", "bad.jsonl:2 "),
        ("mine.py:number", "mine.py:number: failed with TypeError: 'int' object is not iterable"),
        ("mine.py:broken", "mine.py:broken: failed with ZeroDivisionError"),
        ("mine.py:mixed", "is of type NoneType; give str or bytes"),
    ],
)
def test_text_that_cannot_be_used(tmp_path, folder, path, message):
    write(tmp_path / "blank.txt", " \n\t\r\n")
    write(tmp_path / "cut.gz", gzip.compress(os.urandom(5000))[:-20])
    write(tmp_path / "bad.jsonl", '{"text": "a"}\n{"text": 3}\n')
    write(
        tmp_path / "mine.py",
        "def number(): return 3\n"
        "def broken():\n    yield 'a'\n    yield 1 / 0\n"
        "def mixed(): return ['a', None]\n",
    )
    with pytest.raises(DataError, match=f"(?s){message}"):
        load(tmp_path, tmp_path / path)
    assert not (tmp_path / "stores").exists()


def test_an_error_after_the_first_documents_leaves_nothing(tmp_path, folder):
    write(folder / "z.gz", gzip.compress(os.urandom(5000))[:-20])
    with pytest.raises(DataError, match=r"z.gz .*not a whole gzip file"):
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
