"""Every source gives exactly its texts, from any record on, or one clear message."""

import bz2
import csv
import gzip
import importlib.util
import io
import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from gptjax.config import ConfigError, DataConfig
from gptjax.message import from_text, to_text
from gptjax.sources import PIECE_BYTES, DataError, find_sources, records_of

pyarrow = pytest.importorskip("pyarrow", reason="needs gptjax[parquet]")

TEXTS = [
    "one",
    'two "2"',
    "zwölf,\tdreizehn",
    "床前明月光",
    "🙂 a\x00b",
    "  ",
    '"in" quotes',
    "last",
]
LINES = ["two\nlines", "\n\nthree\r\n", 'a "quoted"\nline']  # not for TSV, where a line is a record


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def find(*paths, **fields):
    return find_sources(DataConfig(path=tuple(map(str, paths)), **fields))


def read(source, *start, **options):
    return [content(record) for record in source.records(*start, **options)]


def content(record):
    return b"".join(record.pieces())


# --- a source of each kind ---------------------------------------------------------------------


def jsonl(texts):
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
    lines[1] = json.dumps(texts[1], ensure_ascii=False)  # a string instead of an object
    return "\n\n".join(lines).encode()  # with a blank line between, and no newline at the end


def table(texts, delimiter=","):
    file = io.StringIO()
    rows = [["id", "text"], *([i, text] for i, text in enumerate(texts))]
    if delimiter == ",":
        csv.writer(file).writerows(rows)
    else:
        file.writelines("\t".join(map(str, row)) + "\n" for row in rows)
    return file.getvalue().encode()


def zstd(data):
    module = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    half = len(data) // 2
    compress = importlib.import_module(module).compress
    return compress(data[:half]) + compress(data[half:])  # a file may have several frames


def parquet(folder, texts):
    import pyarrow.parquet

    columns = {"id": list(range(len(texts))), "text": texts}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "a.parquet", row_group_size=3)
    return folder / "a.parquet"


def hugging_face(folder, texts, split=""):
    datasets = pytest.importorskip("datasets", reason="needs gptjax[hf]")
    data = datasets.Dataset.from_dict({"text": texts, "id": list(range(len(texts)))})
    if split:
        data = datasets.DatasetDict({split: data, "other": data.select([0])})
    data.save_to_disk(folder / "hf")
    return folder / "hf"


def prepare_tfds(folder, texts):
    tfds = pytest.importorskip("tensorflow_datasets", reason="needs gptjax[tfds]")
    pytest.importorskip("array_record", reason="needs gptjax[tfds]")

    class Plain(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"id": tfds.features.Scalar(np.int64), "text": tfds.features.Text()}
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, _):
            return {"train": self._generate_examples(texts), "test": self._generate_examples(["t"])}

        def _generate_examples(self, chosen):
            for i, text in enumerate(chosen):
                yield i, {"id": i, "text": text}

    Plain(data_dir=folder).download_and_prepare(file_format="array_record")


def function(folder, texts):
    write(folder / "mine.py", f"def texts():\n    yield from {texts!r}\n")
    return f"{folder / 'mine.py'}:texts"


def remote(name, data):
    fsspec.filesystem("memory").pipe(f"/{name}", data)
    return f"memory://{name}"


KINDS = {
    "text": lambda folder, texts: write(folder / "a.txt", texts[0]),
    "text gz": lambda folder, texts: write(folder / "a.gz", gzip.compress(texts[0].encode())),
    "jsonl": lambda folder, texts: write(folder / "a.jsonl", jsonl(texts)),
    "json": lambda folder, texts: write(
        folder / "a.json", json.dumps([{"id": 1, "text": text} for text in texts])
    ),
    "json gz": lambda folder, texts: write(
        folder / "a.json.gz", gzip.compress(json.dumps([*texts]).encode())
    ),
    "jsonl gz": lambda folder, texts: write(folder / "a.jsonl.gz", gzip.compress(jsonl(texts))),
    "jsonl bz2": lambda folder, texts: write(folder / "a.jsonl.bz2", bz2.compress(jsonl(texts))),
    "jsonl zst": lambda folder, texts: write(folder / "a.jsonl.zst", zstd(jsonl(texts))),
    "jsonl crlf": lambda folder, texts: write(
        folder / "a.jsonl", b"\xef\xbb\xbf" + jsonl(texts).replace(b"\n", b"\r\n")
    ),
    "csv": lambda folder, texts: write(folder / "a.csv", table(texts)),
    "csv bom": lambda folder, texts: write(folder / "a.csv", b"\xef\xbb\xbf" + table(texts)),
    "csv zst": lambda folder, texts: write(folder / "a.csv.zst", zstd(table(texts))),
    "tsv": lambda folder, texts: write(folder / "a.tsv", table(texts, "\t")),
    "parquet": parquet,
    "hf": hugging_face,
    "hf dict": lambda folder, texts: hugging_face(folder, texts, "train"),
    "tfds": lambda folder, texts: prepare_tfds(folder, texts) or "tfds:plain",
    "function": function,
    "remote text": lambda folder, texts: remote("a.txt", texts[0].encode()),
    "remote jsonl": lambda folder, texts: remote("a.jsonl", jsonl(texts)),
    "remote zst": lambda folder, texts: remote("a.jsonl.zst", zstd(jsonl(texts))),
    "remote parquet": lambda folder, texts: remote(
        "a.parquet", parquet(folder, texts).read_bytes()
    ),
}


@pytest.fixture(params=KINDS)
def made(request, tmp_path):
    """A source of a kind, and its texts; some have an empty one among them, which is left out."""
    texts = [*TEXTS[:3], "", *TEXTS[3:]]
    if request.param == "tsv":
        texts = [text.replace("\t", " ") for text in texts]
    else:
        texts += LINES
    (source,) = find(KINDS[request.param](tmp_path, texts), tfds_dir=str(tmp_path))
    expected = texts[:1] if "text" in request.param else [text for text in texts if text]
    yield source, [text.encode() for text in expected]
    fsspec.filesystem("memory").store.clear()


def test_a_source_gives_its_texts(made):
    source, texts = made
    assert read(source) == texts
    assert [record.size for record in source.records()] == list(map(len, texts))
    assert read(from_text(to_text(source))) == texts


def test_reading_begins_at_any_record(made):
    source, texts = made
    whole = [record[:3] for record in source.records()]
    for k, (cursor, position, _) in enumerate(whole):
        for known in (None, position):
            assert [one[:3] for one in source.records(cursor, position=known)] == whole[k:]
        assert read(source, cursor) == texts[k:]


def test_pieces_of_any_division_make_the_text(made):
    source, texts = made
    for record, text in zip(list(source.records()), texts, strict=True):
        for cut in range(len(text) + 1):
            head, tail = record.pieces(0, cut), record.pieces(cut, None)
            assert (b"".join(head), b"".join(tail)) == (text[:cut], text[cut:])


def test_a_fingerprint_tells_whether_a_source_is_the_same(made):
    source, _ = made
    before = source.fingerprint()
    assert source.fingerprint() == before
    assert source.same(before) is None
    assert "bytes, but had" in source.same(before._replace(size=before.size + 1))
    other = before._replace(sha256="0", modified=before.modified - bool(before.modified))
    assert "the content of" in source.same(other)
    assert source.same(before._replace(modified=1)) is None  # touched, with the same content


def test_large_texts_come_in_pieces(tmp_path):
    text = os.urandom(1 << 20) * 9
    plain = find(write(tmp_path / "a.txt", b"\xef\xbb\xbf" + text))[0]
    packed = find(write(tmp_path / "a.txt.gz", gzip.compress(text, 1)))[0]
    row = find(write(tmp_path / "a.jsonl", json.dumps("x" * (9 << 20))))[0]
    for source, expected in [(plain, text), (packed, text), (row, b"x" * (9 << 20))]:
        (record,) = source.records()
        pieces = list(record.pieces(7, 9_000_000))
        assert max(map(len, pieces)) <= PIECE_BYTES
        assert b"".join(pieces) == expected[7:9_000_000]


def test_what_a_user_reads_of_a_position(tmp_path):
    lines = find(write(tmp_path / "a.jsonl", '"a"\n\n{"text": "b"}\r\n"c"'))[0].records()
    assert [record[:2] for record in lines] == [(0, 1), (5, 3), (20, 4)]
    rows = find(write(tmp_path / "a.csv", 'id,text\n1,"x\ny"\n2,z\n'))[0].records()
    assert [record[:2] for record in rows] == [(8, 2), (16, 4)]


def test_texts_in_memory():
    records = list(records_of(["a", "", b"\xff", "é"], "mine"))
    assert [(record.cursor, content(record)) for record in records] == [
        (0, b"a"),
        (2, b"\xff"),
        (3, "é".encode()),
    ]
    with pytest.raises(DataError, match="mine: one str was given; give a list of texts"):
        next(records_of("abc", "mine"))


# --- finding -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Files in several places, written in another order than theirs."""
    for name in ["b.txt", "a/z.txt", "a/a.txt", "test/t.txt", "a/test/u.txt", "c.py"]:
        write(tmp_path / "text" / name, f"this is {name}\n")
    write(tmp_path / "text" / ".hidden", "no")
    write(tmp_path / "text" / ".git" / "x", "no")
    write(tmp_path / "hollow" / ".keep", "no")
    return tmp_path / "text"


def names(*paths, **fields):
    return [source.name for source in find(*paths, **fields)]


def test_folders_are_read_in_one_order(folder):
    every = ["a/a.txt", "a/test/u.txt", "a/z.txt", "b.txt", "c.py", "test/t.txt"]
    assert names(folder) == every
    assert names(folder / "**") == every
    assert names(folder / "a", folder / "b.txt", folder / "a" / "z.txt") == [
        "a.txt",
        "test/u.txt",
        "z.txt",
        "b.txt",
    ]
    assert names(folder / "*.txt") == ["b.txt"]
    assert names(folder / "**" / "*.txt", exclude=("*/test/*",)) == ["a/a.txt", "a/z.txt", "b.txt"]
    assert names(folder, exclude=("a/*", "*.txt")) == ["c.py"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("text/b.tx", "there is no 'b.tx' in .*text.* Did you mean 'b.txt'"),
        ("texd/b.txt", "there is no 'texd' in .* Did you mean 'text'"),
        ("text/*.md", "matches nothing; .*text holds .*b.txt"),
        ("text/[at]*", r"matches only folders; give .*/\*\* for the files below them"),
        ("hollow", "holds no files but hidden ones"),
        ("myne.py:mixed", "there is no 'myne.py' in .*"),
    ],
)
def test_paths_that_are_not_there(folder, path, message):
    with pytest.raises(DataError, match=f"data.path: .*{message}"):
        find(folder.parent / path)


def test_choices_that_leave_nothing(folder):
    with pytest.raises(DataError, match=r"data.path is empty: give files, folders"):
        find()
    with pytest.raises(DataError, match=r"data.exclude leaves out all of 6 files"):
        find(folder, exclude=("*",))
    with pytest.raises(DataError, match=r"data.valid_path: .*nowhere: there is no 'nowhere'"):
        config = DataConfig(valid_path=(str(folder / "nowhere"),))
        find_sources(config, "valid_path")
    with pytest.raises(ConfigError, match=r"there is no function 'text'.*Did you mean 'texts'"):
        read(*find(f"{write(folder / 'mine.py', 'def texts(): return []')}:text"))


def test_the_kind_goes_by_the_ending_or_by_choice(tmp_path):
    names = ["a.JSONL.GZ", "a.csv", "a.json", "a.bz2", "a.parquet", "a.tsv.zst", "noending"]
    for name in [*names, "a.jsonlines.xz", "a.ndjson"]:
        write(tmp_path / name, "x")
    kinds = {source.name: (source.kind, source.seekable) for source in find(tmp_path)}
    assert kinds == {
        "a.JSONL.GZ": ("jsonl", False),
        "a.bz2": ("text", False),
        "a.csv": ("csv", True),
        "a.json": ("json", False),
        "a.jsonlines.xz": ("jsonl", False),
        "a.ndjson": ("jsonl", True),
        "a.parquet": ("parquet", True),
        "a.tsv.zst": ("tsv", False),
        "noending": ("text", True),
    }
    assert {source.kind for source in find(tmp_path / "*[!t]", format="json")} == {"json"}
    with pytest.raises(DataError, match=r"Parquet packed as a whole cannot be read; unpack it"):
        find(write(tmp_path / "b.parquet.gz", "x"))


def test_urls_are_found_as_folders_are():
    memory = fsspec.filesystem("memory")
    for name in ["b/z.txt", "b/c/a.jsonl.gz", "b/.hidden", "b/.git/x", "b/test/t.txt"]:
        memory.pipe(f"/{name}", gzip.compress(b'"x"\n'))
    try:
        everything = ["c/a.jsonl.gz", "test/t.txt", "z.txt"]
        assert [source.name for source in find("memory://b")] == everything
        assert [source.name for source in find("memory://b/**")] == everything
        assert [source.name for source in find("memory://b", exclude=("*/test/*",))] == [
            "c/a.jsonl.gz",
            "z.txt",
        ]
        twice = find("memory://b/*.txt", "memory://b/z.txt", "memory:///b/")
        assert [source.name for source in twice] == ["z.txt", "c/a.jsonl.gz", "test/t.txt"]
        assert read(twice[1]) == [b"x"]
        memory.pipe("/b/z.txt", b"changed")
        assert "has 7 bytes" in twice[0].same(find("memory://b/c")[0].fingerprint())
        with pytest.raises(DataError, match=r"matches nothing; memory:///b holds .*mean 'z.txt'"):
            find("memory://b/z.tx")
        with pytest.raises(DataError, match="matches only folders"):
            find("memory://b/[c]")
    finally:
        memory.store.clear()


def test_packages_that_are_not_there_are_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"nothing is known of ftpx://.*Did you mean 'ftp'"):
        find("ftpx://a/b")
    if not importlib.util.find_spec("gcsfs"):
        with pytest.raises(ConfigError, match=r"gs://a/b: gs:// needs a package .*gcsfs"):
            find("gs://a/b")
    source = find(parquet(tmp_path, TEXTS))[0]
    for module in ["pyarrow.parquet", "tensorflow_datasets"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"a.parquet: needs .*pip install 'gptjax\[parquet\]'"):
        read(source)
    with pytest.raises(ConfigError, match=r"tfds:x: needs .*pip install 'gptjax\[tfds\]'"):
        find("tfds:x")


def test_splits(tmp_path):
    prepare_tfds(tmp_path, TEXTS)
    chosen = {"tfds_dir": str(tmp_path)}
    assert read(*find("tfds:plain", tfds_split="test", **chosen)) == [b"t"]
    assert read(*find("tfds:plain@test", **chosen)) == [b"t"]
    assert len(read(*find("tfds:plain:1.0.0@train[:3]", **chosen))) == 3
    with pytest.raises(DataError, match=r"no split 'tset' but 'train', 'test'.*mean 'test'"):
        find("tfds:plain@tset", **chosen)
    folder = hugging_face(tmp_path, TEXTS, "train")
    assert [source.name for source in find(folder)] == ["hf/train"]
    assert read(*find(folder, tfds_split="other")) == read(*find(folder / "other")) == [b"one"]
    assert [(source.name, source.kind) for source in find(tmp_path, exclude=("plain/*",))] == [
        ("hf/train", "hf")
    ]
    with pytest.raises(DataError, match=r"no split 'othre' but 'train', 'other'.*mean 'other'"):
        find(folder, tfds_split="othre")


def test_a_data_set_is_prepared_with_consent_and_read_without_tensorflow(tmp_path):
    """The builder is registered as one of TFDS's own is."""
    pytest.importorskip("tensorflow_datasets", reason="needs gptjax[tfds]")
    write(
        tmp_path / "script.py",
        """
import sys
import tensorflow_datasets as tfds
from gptjax.config import DataConfig
from gptjax.sources import DataError, find_sources

class Toy(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("2.0.0")
    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)
    def _split_generators(self, _):
        return {"train": self._generate_examples()}
    def _generate_examples(self):
        for i in range(3):
            yield i, {"text": f"text {i}"}

def find(**fields):
    return find_sources(DataConfig(path=("tfds:toy",), tfds_dir=sys.argv[1], **fields))

try:
    find()
except DataError as error:
    print(error)
(source,) = find(tfds_prepare=True)
assert find() == [source]
print(source.name, [b"".join(record.pieces()) for record in source.records()])
print([name for name in sys.modules if name.partition(".")[0] == "tensorflow"])
""",
    )
    ran = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path / "data"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    refused, texts, modules = ran.stdout.splitlines()[0], *ran.stdout.splitlines()[-2:]
    assert "tfds:toy: this data set is not prepared in" in refused
    assert "download_and_prepare(file_format='array_record')" in refused
    assert "--data.tfds-prepare" in refused
    assert texts == "tfds:toy:2.0.0@train [b'text 0', b'text 1', b'text 2']"
    assert modules == "[]"


TRAINED = """
import sys
from gptjax.cli import main

code = main()
print([name for name in sys.modules if name.partition(".")[0] == "tensorflow"])
sys.exit(code)
"""
EXPERIMENT = """
from gptjax import *

def config():
    return Config(
        model=GPTConfig(context_size=16, num_layers=1, width=16, num_heads=2),
        sample=SampleConfig(max_tokens=0),
        steps=3, batch_size=4, log_every=1, tensorboard=False,
    )
"""


@pytest.mark.slow
def test_a_data_set_is_trained_on_without_tensorflow(tmp_path):
    prepare_tfds(tmp_path / "data", [f"text {i}" for i in range(100)])
    write(tmp_path / "run.py", EXPERIMENT)
    options = "--data.path tfds:plain --data.tfds-dir data --run-dir run --eval-every 3"
    ran = subprocess.run(
        [sys.executable, "-c", TRAINED, "train", "run.py", *options.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[]"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[-1]["eval/loss"] > 0
    (manifest,) = tmp_path.glob("stores/*/train/manifest.json")
    assert json.loads(manifest.read_text())["source"][0]["name"] == "tfds:plain:1.0.0@train"


# --- bad records -------------------------------------------------------------------------------

SKIP = "leave such records out with --data.on-bad-record skip"
GOOD = '{"text": "good"}'


@pytest.mark.parametrize(
    ("line", "byte", "why"),
    [
        ('{"text": "a" "b"}', 30, r"column 14 is not JSON \(Expecting ',' delimiter\)"),
        ('{"a": "é", "text": x}', 37, r"column 20 is not JSON \(Expecting value\)"),
        ('{"text": "a', 28, r"column 12 is not JSON \(the line ends\)"),
        ('{"text": "a\x00"}', 28, r"column 12 is not JSON \(Invalid control character"),
        ("{}", 17, "there is no field 'text' but none at all"),
        (
            '{"id": 1, "test": "a"}',
            17,
            "there is no field 'text' but 'id', 'test'; give one with --data.text-field",
        ),
        ('{"texts": "a"}', 17, "no field 'text' but 'texts'.*Did you mean 'texts'"),
        ('{"text": null}', 17, "the field 'text' is null, not a string"),
        ('{"text": ["a", 1]}', 17, "the field 'text' is a list, not a string"),
        ('{"text": 3.5}', 17, "the field 'text' is a number, not a string"),
        ("true", 17, "the line is true, not a string"),
        ('{"text": "ab\\ud800"}', 17, "the field 'text' is no text at character 2, which is half"),
        (b'{"text": "\xc3\xa9\xff"}', 29, "byte 0xff is not UTF-8"),
        ('{"text": ' + "[" * 100_000, 17, "JSON in JSON, too deep to be read"),
        ('{"text": ' + "9" * 10_000 + "}", 17, "not JSON that can be read .*digits"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_bad_lines_of_json(tmp_path, line, byte, why, packed):
    line = line.encode() if isinstance(line, str) else line
    data = f"{GOOD}\n".encode() + line + f"\n{GOOD}\n".encode()
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    source = find(write(path, gzip.compress(data) if packed else data))[0]
    unpacked = " unpacked" if packed else ""
    with pytest.raises(DataError, match=rf"{path}:2 \(byte {byte}{unpacked}\): .*{why}.*; mend"):
        read(source)
    told = []
    assert read(source, on_bad=told.append) == [b"good", b"good"]
    assert len(told) == 1 and str(told[0]).endswith(SKIP)


@pytest.mark.parametrize(
    ("rows", "line", "byte", "why", "left"),
    [
        ("1,a\n2\n3,c\n", 3, 12, "1 fields, but the header names 2", [b"a", b"c"]),
        ("1,a\n2,b,\n\n3,c\n", 3, 12, "3 fields, but the header names 2", [b"a", b"c"]),
        (b'1,"a\nb\xff"\n3,c\n', 2, 14, "byte 0xff is not UTF-8", [b"c"]),
        ('1,"a\n2,b\n3,c\n', 2, 8, "unexpected end of data", [b"b", b"c"]),
        ('1,"a\n2,"b"\n3,c\n', 2, 8, "',' expected after '\"'", [b"b", b"c"]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_bad_rows_of_csv(tmp_path, rows, line, byte, why, left, packed):
    data = b"id,text\n" + (rows.encode() if isinstance(rows, str) else rows)
    path = tmp_path / ("a.csv.bz2" if packed else "a.csv")
    source = find(write(path, bz2.compress(data) if packed else data))[0]
    unpacked = " unpacked" if packed else ""
    with pytest.raises(DataError, match=rf"{path}:{line} \(byte {byte}{unpacked}\): {why}; mend"):
        read(source)
    told = []
    assert read(source, on_bad=told.append) == left
    assert len(told) == 1 and str(told[0]).endswith(SKIP)


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_values_that_are_no_text(tmp_path, kind):
    source = find(KINDS[kind](tmp_path, ["a", None, "c"]))[0]
    with pytest.raises(DataError, match=rf"document 1 is of type NoneType; give str .*{SKIP}"):
        read(source)
    assert read(source, on_bad=lambda _: None) == [b"a", b"c"]
    source = find(function(tmp_path, ["a", 3, "c\ud800", "d"]))[0]
    told = []
    assert read(source, on_bad=told.append) == [b"a", b"d"]
    assert [str(one).partition(": ")[2].partition(";")[0] for one in told] == [
        "document 1 is of type int",
        "document 2 is no text at character 1, which is half a surrogate pair",
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "hf", "tfds"])
def test_a_field_that_is_not_there(tmp_path, kind):
    made = KINDS[kind](tmp_path, ["a", "b"])
    (source,) = find(made, text_field="texd", tfds_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"no field 'texd' but .*'text'.*Did you mean 'text'"):
        read(source)
    if kind != "jsonl":  # no record has it: that is not a bad record
        with pytest.raises(DataError, match="no field 'texd'"):
            read(source, on_bad=lambda _: None)


# --- files that are bad as a whole -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a.tar.gz", "an archive: unpack it"),
        ("a.ZIP", "an archive"),
        ("a.txt.lz4", "packed in a way that is not read"),
        ("a.arrow", "a table: save it as Parquet"),
        ("a.pdf", "a document with its layout: save its text"),
        ("a.wav", "pictures, sound or film: give a function"),
        ("a.npy", "arrays: give a function"),
    ],
)
def test_what_is_no_text_by_its_ending_is_refused_unless_it_is_asked_for(tmp_path, name, why):
    write(tmp_path / "b.txt", "text")
    path = write(tmp_path / name, "x")
    message = f"{re.escape(str(path))}: {why}.*--data.format text.*--data.exclude"
    with pytest.raises(DataError, match=message):
        find(tmp_path)
    assert [source.name for source in find(tmp_path, exclude=(name,))] == ["b.txt"]
    assert {source.kind for source in find(tmp_path, format="text")} == {"text"}


def test_folders_lose_nothing(tmp_path, monkeypatch):
    """What links lead to is there, and what cannot be reached is told."""
    write(tmp_path / "there" / "deep" / "a.txt", "text")
    folder = tmp_path / "here"
    write(folder / "b.txt", "text")
    (folder / "linked").symlink_to(tmp_path / "there")
    (tmp_path / "there" / "round").symlink_to(tmp_path / "there")
    assert [source.name for source in find(folder)] == ["b.txt", "linked/deep/a.txt"]

    (folder / "lost.txt").symlink_to(tmp_path / "gone.txt")
    for given in (folder, folder / "*.txt"):
        with pytest.raises(DataError, match=r"lost.txt: a link to .*gone.txt, which is not there"):
            find(given)
    (folder / "lost.txt").unlink()

    scan = os.scandir

    def refusing(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"deep: cannot be read \(Permission denied\)"):
        find(folder)


@pytest.mark.parametrize(  # the last block is lost, which has up to 900 kB in bzip2
    ("ending", "pack", "least"),
    [
        ("gz", gzip.compress, 38),
        ("bz2", bz2.compress, 30),
        ("xz", lzma.compress, 38),
        ("zst", zstd, 37),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "txt", "csv"])
def test_a_packed_file_that_is_cut_short(tmp_path, ending, pack, least, kind):
    lines = [os.urandom(50_000).hex() for _ in range(40)]
    data = "\n".join(['"text"', *(f'"{line}"' for line in lines)])
    path = write(tmp_path / f"a.{kind}.{ending}", pack(data.encode())[:-20])
    (source,) = find(path)
    message = rf"{path} \(byte [\d,]+ unpacked\): not a whole \w+ file \(.*\); copy it again"
    with pytest.raises(DataError, match=message):
        read(source)
    told = []
    whole = read(source, on_bad=told.append)
    assert len(told) == 1
    if kind == "txt":
        assert whole == []
    else:  # what was whole before that is there
        start = 0 if kind == "csv" else 1
        got = [text.decode() for text in whole][start:]
        assert least <= len(got) < 40 and got == lines[: len(got)]


def test_lines_of_a_record_are_joined(tmp_path):
    path = write(tmp_path / "a.json", '[{"text": ["one", "two"]}, {"text": []}, "three"]')
    assert [text.decode() for text in read(*find(path))] == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"txt": "b"}]', "item 1: there is no field 'text' but 'txt'"),
        ('["a", 3]', "item 1: the item is a number, not a string; mend it, or leave such"),
        ('{"text": "a"}', "an object, but the records are taken from a list; give --data.format"),
        ('{"text": "a"}\n{"text": "b"}', "not JSON .Extra data: line 2.*--data.format jsonl"),
        ("[" * 100_000, "not JSON .*; mend it"),
    ],
)
def test_bad_lists(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(*find(write(tmp_path / "a.json", content)))


def test_files_that_are_no_such_files(tmp_path):
    for name, message in [
        ("a.gz", "not a whole gzip file"),
        ("a.json.gz", "not a whole gzip file"),
        ("a.xz", "not a whole xz file"),
        ("a.jsonl.bz2", "not a whole bzip2 file"),
        ("a.csv.zst", "not a whole zstd file"),
        ("a.parquet", "not a whole Parquet file"),
    ]:
        with pytest.raises(DataError, match=message):
            read(*find(write(tmp_path / name, "plain text, and some more of it")))
    path = parquet(tmp_path, TEXTS)
    whole = path.read_bytes()
    write(path, whole[:-30])
    with pytest.raises(DataError, match="not a whole Parquet file"):
        read(*find(path))
    write(path, whole)
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(0)
    start = group.column(1).dictionary_page_offset
    (source,) = find(write(path, whole[:start] + b"\xff" * 20 + whole[start + 20 :]))
    with pytest.raises(DataError, match=r"a.parquet: cannot be read \("):
        read(source, on_bad=lambda _: None)
    assert read(source, 3) == [text.encode() for text in TEXTS[3:]]  # of other row groups


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.txt.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf"])
def test_empty_files_have_no_records(tmp_path, name, data):
    pack = {".gz": gzip.compress, ".zst": zstd}.get(Path(name).suffix, bytes)
    path = write(tmp_path / name, pack(data))
    if name != "a.csv" or not data:
        assert read(*find(path)) == []


def test_text_is_taken_as_it_is(tmp_path):
    for data in [b" \n\t\r\n", b"a\x00b\r\n", b"\xff\xfe\x80", "a\ufeff".encode()]:
        assert read(*find(write(tmp_path / "a.txt", data))) == [data]
        assert read(*find(write(tmp_path / "b.txt", b"\xef\xbb\xbf" + data))) == [data]
    assert read(*find(write(tmp_path / "a.jsonl", b" \n\r\n\t\n"))) == []


def test_a_text_that_shrinks_while_it_is_read(tmp_path):
    path = write(tmp_path / "a.txt", "long enough")
    (record,) = find(path)[0].records()
    write(path, "short")
    with pytest.raises(DataError, match=r"\(byte 5\): the file has become shorter"):
        content(record)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", "mine.py:number: failed with TypeError: 'int' object is not iterable"),
        ("single", "one str was given; give a list of texts"),
        ("broken", "mine.py:broken: failed with ZeroDivisionError"),
    ],
)
def test_a_function_that_fails_is_no_bad_record(tmp_path, name, message):
    path = write(
        tmp_path / "mine.py",
        "def number(): return 3\n"
        "def single(): return 'abc'\n"
        "def broken():\n    yield 'a'\n    yield 1 / 0\n",
    )
    with pytest.raises(DataError, match=message):
        read(*find(f"{path}:{name}"), on_bad=lambda _: None)


def test_the_memory_of_large_texts_is_bounded(tmp_path):
    """A text costs the same whatever its size; a line of JSON about three times its own."""
    script = (
        "import sys; from gptjax.config import DataConfig; from gptjax.sources import *\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) << 10\n"
        "(source,), before = find_sources(DataConfig(path=(sys.argv[1],))), peak()\n"
        "size = sum(len(piece) for record in source.records() for piece in record.pieces())\n"
        "print(size, peak() - before)\n"
    )
    size = 200_000_000
    for name, most in [("a.txt", 0.1), ("a.jsonl", 3.1)]:
        write(tmp_path / name, b'"' + b"abcdefg " * (size // 8) + b'"')
        command = [sys.executable, "-c", script, str(tmp_path / name)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        got, peak = map(int, ran.stdout.split())
        assert got >= size and peak < most * size
