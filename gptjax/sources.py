"""Whatever holds text, to records: files of many kinds, URLs, data sets on disk, Python functions.

A source is a value that can be sent to another process. Reading it gives its records in one order,
and reading can begin at any record again.
"""

import bz2
import codecs
import csv
import fnmatch
import glob
import gzip
import hashlib
import importlib
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Literal, NamedTuple

from gptjax.config import ConfigError, DataConfig, did_you_mean, load_function

PIECE_BYTES = 1 << 22  # of a text, at once
READ_BYTES = 1 << 20  # of a file, at once
# Characters of a field of CSV. Without a limit, a quote that is never closed would take all that
# follows into memory, at four bytes a character.
FIELD_LIMIT = 1 << 28
PACKED = {".gz": "gzip", ".bz2": "bzip2", ".zst": "zstd"}
ENDINGS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
# What stores call the checksum of a file, or else the time when it was written.
TAGS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Last-Modified")
MAGIC = re.compile(r"[*?[]")  # in a glob
SKIP = ", or leave such records out with --data.on-bad-record skip"

OnBad = Callable[["DataError"], None]


class DataError(ValueError):
    """Text or a store of tokens that cannot be used. Says where, why, and what to do."""


class Record(NamedTuple):
    """A document as it lies in its source."""

    cursor: int  # `records(cursor)` begins with this record again
    # what a user reads: the byte of a text file, the line from 1 of JSONL, CSV and TSV, the number
    # from 0 of others
    position: int
    size: int  # bytes of its text
    # pieces(start=0, stop=None): its bytes from start to stop, in pieces of bounded size; may be
    # called more than once
    pieces: Callable[..., Iterator[bytes]]


class Fingerprint(NamedTuple):
    """What a manifest keeps of a source."""

    name: str
    size: int  # bytes of its files
    sha256: str  # of its files; of those at a URL, the tag that their store gives them
    modified: int  # nanoseconds since 1970; when it differs, the checksum decides; 0 at a URL


class _Flaw(ValueError):
    """Why a record cannot be used, without where it lies; `byte` counts from its beginning."""

    def __init__(self, why: str, byte: int = 0):
        super().__init__(why)
        self.byte = byte


@dataclass(frozen=True)
class Source:
    """A file, a split of a TFDS data set, a folder of a Hugging Face data set, or a function."""

    name: str  # the same on every machine: its place below the path that was given
    where: str  # path, URL, tfds:NAME@SPLIT, or FILE.py:function
    kind: Literal["text", "json", "jsonl", "csv", "tsv", "parquet", "tfds", "hf", "function"]
    text_field: str = "text"
    tfds_dir: str | None = None

    @property
    def seekable(self) -> bool:
        """Whether `records(cursor)` begins there without reading what lies before."""
        if self.kind in ("tfds", "hf"):
            return True
        return self.kind not in ("json", "function") and not _packing(self.where)

    def records(
        self, cursor: int = 0, on_bad: OnBad | None = None, position: int | None = None
    ) -> Iterator[Record]:
        """Every record that has text, in order; empty ones are left out.

        Args:
          cursor: of the record to begin with; 0 begins with the first.
          on_bad: told of each bad record, which is then passed over.
          position: of the record at `cursor`, if known. Without it the lines before the cursor are
            counted, which is fast but reads them.
        Raises:
          DataError: for a bad record without `on_bad`; for a source that cannot be read at all.
          ConfigError: for a package that is not installed, or a function that is not there.
        """
        read = {
            "text": _read_text,
            "json": _read_json,
            "jsonl": _read_jsonl,
            "csv": _read_csv,
            "tsv": _read_csv,
            "parquet": _read_parquet,
            "tfds": _read_tfds,
            "hf": _read_hf,
            "function": _read_function,
        }[self.kind]
        return read(self, cursor, on_bad, position)

    def fingerprint(self) -> Fingerprint:
        """What this source is now; reads local files whole."""
        stats = [_stat(file) for file in self._files()]
        tags = [stat.sha256 or _sha256(stat.name) for stat in stats]
        return self._joined(stats, tags)

    def same(self, before: Fingerprint) -> str | None:
        """What differs from before, in words; None if nothing does. Cheap where nothing does."""
        stats = [_stat(file) for file in self._files()]
        size = sum(stat.size for stat in stats)
        if size != before.size:
            return f"{self.where} has {size:,} bytes, but had {before.size:,}"
        local = not any(stat.sha256 for stat in stats)
        if local and max(stat.modified for stat in stats) == before.modified:
            return None
        if self.fingerprint().sha256 != before.sha256:
            return f"the content of {self.where} differs"
        return None

    def _joined(self, stats: list[Fingerprint], tags: list[str]) -> Fingerprint:
        """One fingerprint of all files."""
        tag = tags[0]
        if len(tags) > 1:
            names = [os.path.basename(stat.name) for stat in stats]
            listing = json.dumps(list(zip(names, tags, strict=True)))
            tag = hashlib.sha256(listing.encode()).hexdigest()
        size, modified = sum(s.size for s in stats), max(s.modified for s in stats)
        return Fingerprint(self.name, size, tag, modified)

    def _files(self) -> list[str]:
        """The paths or URLs that hold its content."""
        if self.kind == "tfds":
            return _tfds_files(self)
        if self.kind == "hf":
            return [str(file) for file in sorted(Path(self.where).iterdir()) if file.is_file()]
        return [self.where.partition(".py:")[0] + ".py" if self.kind == "function" else self.where]


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stat(where: str) -> Fingerprint:
    """Of one file: its path or URL, its size, and its tag or the time when it was modified."""
    if not _is_url(where):
        stat = os.stat(where)
        return Fingerprint(where, stat.st_size, "", stat.st_mtime_ns)
    system, path = _file_system(where)
    with _reaching(where):
        info = system.info(path)
        tag = next((f"{key}:{info[key]}" for key in TAGS if info.get(key)), None)
        return Fingerprint(where, info["size"] or 0, tag or f"ukey:{system.ukey(path)}", 0)


# --- finding -----------------------------------------------------------------------------------


def find_sources(config: DataConfig, field: Literal["path", "valid_path"] = "path") -> list[Source]:
    """The sources that a field's paths name: for each in turn, sorted by place below it; each once.

    `data.exclude` has globs whose `*` crosses folders, matched with a source's place below its
    path, with and without a slash before it; so `*/test/*` means every folder of that name.

    Raises:
      DataError: for a path that is not there, or if no source is left.
      ConfigError: for a package that a path needs and that is not installed.
    """
    paths, label = getattr(config, field), f"data.{field}"
    if not paths:
        raise DataError(
            f"{label} is empty: give files, folders, globs, URLs, tfds:NAME or FILE.py:function, "
            "such as --data.path input.txt"
        )
    excluded = re.compile("|".join(map(fnmatch.translate, config.exclude)) or r"(?!)")
    found = [source for given in paths for source in _expand(given, label, config)]
    kept = [
        one for one in found if not (excluded.match(one.name) or excluded.match(f"/{one.name}"))
    ]
    if not kept:
        raise DataError(
            f"{label}: data.exclude leaves out all of {len(found):,} files; give fewer globs"
        )
    unique: dict[str, Source] = {}
    for one in kept:
        local = one.kind != "tfds" and not _is_url(one.where)
        unique.setdefault(os.path.realpath(one.where) if local else one.where, one)
    return list(unique.values())


def _expand(given: str, label: str, config: DataConfig) -> list[Source]:
    if given.startswith("tfds:"):
        return [_tfds_source(given, label, config)]
    if _is_url(given):
        return _expand_url(given, label, config)
    path = Path(given)
    if ".py:" in given:
        path = Path(given.partition(".py:")[0] + ".py")
        if path.is_file():
            name = f"{path.name}:{given.partition('.py:')[2]}"
            return [Source(name, given, "function")]
    elif path.is_file():
        return [_file_source(path.name, given, config)]
    elif path.is_dir():
        return _expand_folder(path, given, label, config)
    elif MAGIC.search(given):
        path = Path(*itertools.takewhile(lambda part: not MAGIC.search(part), path.parts))
        matches = [Path(match) for match in glob.glob(given, recursive=True)]
        files = [match for match in matches if match.is_file()]
        if files:
            return _sorted(path, files, config)
        if matches:
            raise _only_folders(given, label)
        if path.is_dir():
            names = sorted(os.listdir(path))
            raise _no_match(given, label, str(path.absolute()), names)
    while not path.parent.is_dir():
        path = path.parent
    hint = did_you_mean(path.name, os.listdir(path.parent))
    where = path.parent.absolute()
    raise DataError(f"{label}: {given}: there is no {path.name!r} in {where}.{hint}")


def _expand_folder(path: Path, given: str, label: str, config: DataConfig) -> list[Source]:
    if _is_hf(path):
        return [_hf_source(path, path.name, label, config)]
    files, sources = [], []
    for inside, folders, names in os.walk(path):
        data_sets = [name for name in folders if _is_hf(Path(inside, name))]
        for name in data_sets:
            below = Path(inside, name)
            place = below.relative_to(path).as_posix()
            sources.append(_hf_source(below, place, label, config))
        folders[:] = [
            name for name in folders if not name.startswith(".") and name not in data_sets
        ]
        files += [Path(inside, name) for name in names if not name.startswith(".")]
    if not files and not sources:
        raise DataError(
            f"{label}: {given}: this folder holds no files but hidden ones; give another"
        )
    return sorted(sources + _sorted(path, files, config), key=lambda source: source.name)


def _sorted(root: Path, files: list[Path], config: DataConfig) -> list[Source]:
    places = sorted((file.relative_to(root).as_posix(), file) for file in files if file.is_file())
    return [_file_source(name, str(file), config) for name, file in places]


def _file_source(name: str, where: str, config: DataConfig) -> Source:
    bare = name.removesuffix(_packing(name))
    kind = ENDINGS.get(Path(bare).suffix.lower(), "text")
    if config.format != "auto":
        kind = config.format
    if kind == "parquet" and _packing(name):
        raise DataError(f"{where}: Parquet packed as a whole cannot be read; unpack it")
    return Source(name, where, kind, config.text_field)


def _packing(where: str) -> str:
    """The ending of a packed file, or nothing."""
    suffix = Path(where.partition("?")[0] if _is_url(where) else where).suffix
    return suffix if suffix.lower() in PACKED else ""


# --- URLs --------------------------------------------------------------------------------------


def _is_url(where: str) -> bool:
    return "://" in where


def _file_system(where: str) -> tuple[Any, str]:
    """What reaches a URL, and the URL as that knows it."""
    import fsspec

    protocol = where.partition("://")[0]
    try:
        return fsspec.url_to_fs(where)
    except ImportError as error:
        raise ConfigError(
            f"{where}: {protocol}:// needs a package that is not installed ({error})"
        ) from error
    except Exception as error:
        known = fsspec.available_protocols()
        if protocol in known:
            raise DataError(f"{where}: cannot be read ({_said(error)})") from error
        raise ConfigError(
            f"{where}: nothing is known of {protocol}://; give gs://, s3://, https:// or another "
            f"that fsspec reads.{did_you_mean(protocol, known)}"
        ) from error


@contextmanager
def _reaching(where: str) -> Iterator[None]:
    """Each library has its own errors for what is not there, not allowed or cut off."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where}: cannot be read ({_said(error)})") from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _expand_url(given: str, label: str, config: DataConfig) -> list[Source]:
    system, path = _file_system(given)
    with _reaching(given):
        system.invalidate_cache()  # what was listed before may have changed
        if system.isfile(path):
            name = given.partition("?")[0].rpartition("/")[2]
            where = given if "::" in given else system.unstrip_protocol(path)
            return [_file_source(name, where, config)]
        root = "/".join(itertools.takewhile(lambda part: not MAGIC.search(part), path.split("/")))
        if root != path:
            found = system.glob(path, detail=True)
            files = [match for match, info in found.items() if info["type"] == "file"]
            if found and not files:
                raise _only_folders(given, label)
        else:
            files = system.find(path) if system.isdir(path) else []
        if "/." not in path:  # not of hidden files
            files = [file for file in files if "/." not in file.removeprefix(root)]
        if not files:
            folder = root if root != path else system._parent(path)
            names = []
            if system.isdir(folder):
                names = [name.rpartition("/")[2] for name in system.ls(folder, detail=False)]
            raise _no_match(given, label, system.unstrip_protocol(folder), sorted(names))
        places = sorted((file.removeprefix(root).lstrip("/"), file) for file in files)
        return [_file_source(name, system.unstrip_protocol(file), config) for name, file in places]


def _only_folders(given: str, label: str) -> DataError:
    deeper = f"{given.rstrip('/')}/**"
    return DataError(
        f"{label}: {given}: matches only folders; give {deeper} for the files below them"
    )


def _no_match(given: str, label: str, folder: str, names: list[str]) -> DataError:
    listing = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    holds = f"{folder} holds {listing or 'nothing'}"
    hint = did_you_mean(given.rstrip("/").rpartition("/")[2], names)
    return DataError(f"{label}: {given}: matches nothing; {holds}.{hint}")


# --- bytes -------------------------------------------------------------------------------------


class _Guarded(io.RawIOBase):
    """A file whose failures are DataErrors that say where."""

    def __init__(self, file: Any, where: str, packing: str):
        self._file, self._where, self._packing, self._position = file, where, packing, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True  # in a packed file by unpacking all that lies before

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with self._guard():
            self._position = self._file.seek(offset, whence)
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        with self._guard():
            # `read` would lose what it had gathered when it met the end of a file cut short.
            read = self._file.read1 if self._packing else self._file.read
            piece = read(len(buffer))
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except DataError:  # of the file that is unpacked
            raise
        except Exception as error:
            at = f"{self._where} (byte {self._position:,}{' unpacked' if self._packing else ''})"
            if not self._packing or getattr(error, "errno", None):
                raise DataError(f"{at}: cannot be read ({_said(error)})") from error
            kind = PACKED[self._packing.lower()]
            raise DataError(f"{at}: not a whole {kind} file ({error}); copy it again") from error


@contextmanager
def _open(where: str) -> Iterator[BinaryIO]:
    """The bytes of a file or URL, those inside of a packed one."""
    packing = _packing(where)
    with ExitStack() as stack:
        if _is_url(where):
            system, path = _file_system(where)
            with _reaching(where):
                file = stack.enter_context(system.open(path, "rb"))
            file = io.BufferedReader(_Guarded(file, where, ""), READ_BYTES)
        else:
            file = stack.enter_context(open(where, "rb", READ_BYTES))
        if packing:
            unpack = {".gz": gzip.open, ".bz2": bz2.open, ".zst": partial(_open_zstd, where)}
            unpacked = stack.enter_context(unpack[packing.lower()](file))
            file = io.BufferedReader(_Guarded(unpacked, where, packing), READ_BYTES)
        yield file


def _open_zstd(where: str, file: BinaryIO) -> Any:
    try:
        from compression import zstd
    except ImportError:  # before Python 3.14
        zstd = _needed("backports.zstd", "zstd", where)
    return zstd.open(file)


def _needed(module: str, extra: str, where: str) -> ModuleType:
    """A module of an optional package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{where}: needs the package {error.name}: pip install 'gptjax[{extra}]'"
        ) from error


class _Lines:
    """The lines of a file, with where the next one begins."""

    def __init__(self, file: BinaryIO):
        self._file, self.offset, self.number = file, 0, 1

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        line = self._file.readline()
        if not line:
            raise StopIteration
        first = self.offset == 0
        self.offset += len(line)
        self.number += 1
        return line.removeprefix(codecs.BOM_UTF8) if first else line

    def move(self, offset: int, number: int | None = None) -> None:
        """Go to the line that begins at `offset`; its number is counted if it is not given."""
        if number is None:
            self._file.seek(0)
            number, left = 1, offset
            while left and (piece := self._file.read(min(READ_BYTES, left))):
                number += piece.count(b"\n")
                left -= len(piece)
        else:
            self._file.seek(offset)
        self.offset, self.number = offset, number


# --- records -----------------------------------------------------------------------------------


def _refuse(on_bad: OnBad | None, error: DataError) -> None:
    if on_bad is None:
        raise error
    on_bad(error)


def _while_readable(lines: Iterator[bytes], on_bad: OnBad | None) -> Iterator[bytes]:
    """The lines of a file; one that is cut short ends there, once that is told."""
    while True:
        try:
            line = next(lines, None)
        except DataError as error:
            return _refuse(on_bad, error)
        if line is None:
            return
        yield line


def _record(cursor: int, position: int, content: bytes) -> Record:
    return Record(cursor, position, len(content), partial(_content_pieces, content))


def _content_pieces(content: bytes, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    stop = len(content) if stop is None else min(stop, len(content))
    for begin in range(start, stop, PIECE_BYTES):
        yield content[begin : min(begin + PIECE_BYTES, stop)]


def _to_bytes(value: Any) -> bytes:
    if not isinstance(value, str | bytes):
        raise _Flaw(f"is of type {type(value).__name__}; give str or bytes")
    try:
        return value.encode() if isinstance(value, str) else value
    except UnicodeEncodeError as error:
        raise _Flaw(
            f"is no text at character {error.start}, which is half a surrogate pair; give bytes, "
            "such as text.encode(errors='replace')"
        ) from None


# --- text --------------------------------------------------------------------------------------


def _read_text(
    source: Source, cursor: int, on_bad: OnBad | None, position: int | None
) -> Iterator[Record]:
    if cursor > 0:  # past the only record
        return
    with _open(source.where) as file:
        begin = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        stop = _size(source.where)
        if stop is None:
            file.seek(0)
            pieces = iter(partial(file.read, READ_BYTES), b"")
            try:
                stop = sum(map(len, pieces))
            except DataError as error:
                return _refuse(on_bad, error)
    if stop > begin:
        yield Record(0, 0, stop - begin, partial(_file_pieces, source.where, begin, stop))


def _size(where: str) -> int | None:
    """The bytes of a text; None if only reading all of it tells, and whether it is whole."""
    if _packing(where):
        return None
    if not _is_url(where):
        return os.path.getsize(where)
    system, path = _file_system(where)
    with _reaching(where):
        return system.info(path)["size"]


def _file_pieces(
    where: str, begin: int, end: int, start: int = 0, stop: int | None = None
) -> Iterator[bytes]:
    """The bytes from start to stop of a text that is what a file holds from begin to end."""
    position = begin + start
    stop = end if stop is None else min(begin + stop, end)
    with _open(where) as file:
        if position:
            file.seek(position)
        while position < stop:
            piece = file.read(min(PIECE_BYTES, stop - position))
            if not piece:
                raise DataError(
                    f"{where} (byte {position:,}): the file has become shorter while it was read; "
                    "begin again when it is left alone"
                )
            position += len(piece)
            yield piece


# --- lines -------------------------------------------------------------------------------------


def _bad_line(source: Source, number: int, byte: int, why: str) -> DataError:
    unpacked = " unpacked" if _packing(source.where) else ""
    return DataError(f"{source.where}:{number} (byte {byte:,}{unpacked}): {why}; mend it{SKIP}")


def _read_jsonl(
    source: Source, cursor: int, on_bad: OnBad | None, position: int | None
) -> Iterator[Record]:
    with _open(source.where) as file:
        lines = _Lines(file)
        if cursor:
            lines.move(cursor, position)
        start, number = lines.offset, lines.number
        for line in _while_readable(lines, on_bad):
            try:
                content = _json_text(line, source.text_field)
            except _Flaw as flaw:
                byte = lines.offset - len(line) + flaw.byte
                _refuse(on_bad, _bad_line(source, number, byte, str(flaw)))
            else:
                if content:
                    yield _record(start, number, content)
            start, number = lines.offset, lines.number


def _json_text(line: bytes, field: str) -> bytes:
    """The text in a line of JSON; empty for a line of white space."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(line, error.start) from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if not line.strip():
            return b""
        why = error.msg if text[error.pos :].strip() else "the line ends"
        byte = len(text[: error.pos].encode())
        raise _Flaw(f"column {error.colno} is not JSON ({why})", byte) from None
    except RecursionError:
        raise _Flaw("JSON in JSON, too deep to be read") from None
    except ValueError as error:  # a number of too many digits
        raise _Flaw(f"not JSON that can be read ({error})") from None
    del text  # it may be large
    return _text_in(value, field, "the line")


def _text_in(value: Any, field: str, what: str) -> bytes:
    """The text of a record: its field, or the record itself; several strings are its lines."""
    if isinstance(value, dict):
        if field not in value:
            raise _Flaw(_no_field(field, value))
        value, what = value[field], f"the field {field!r}"
        if isinstance(value, list) and all(isinstance(line, str) for line in value):
            value = "\n".join(value)
    if not isinstance(value, str):
        raise _Flaw(f"{what} is {_json_kind(value)}, not a string")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise _Flaw(
            f"{what} is no text at character {error.start}, which is half a surrogate pair"
        ) from None


def _json_kind(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    return {dict: "an object", list: "a list", str: "a string"}.get(type(value), "a number")


def _not_utf8(line: bytes, byte: int) -> _Flaw:
    return _Flaw(f"byte 0x{line[byte]:02x} is not UTF-8", byte)


def _no_field(field: str, there: Iterable[str]) -> str:
    names = [repr(name) for name in itertools.islice(there, 20)]
    hint = did_you_mean(field, there)
    return (
        f"there is no field {field!r} but {', '.join(names) or 'none at all'}; "
        f"give one with --data.text-field.{hint}"
    )


def _read_json(
    source: Source, cursor: int, on_bad: OnBad | None, position: int | None
) -> Iterator[Record]:
    """The items of one list, which memory holds whole."""
    with _open(source.where) as file:
        try:
            items = json.loads(file.read())
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{source.where}: not JSON ({error or 'too deep to be read'}); mend it, or give "
                "--data.format jsonl if each of its lines is a record"
            ) from None
    if not isinstance(items, list):
        raise DataError(
            f"{source.where}: {_json_kind(items)}, but the records are taken from a list; give "
            "--data.format jsonl if each of its lines is a record"
        )
    for number, item in enumerate(items[cursor:], cursor):
        try:
            content = _text_in(item, source.text_field, "the item")
        except _Flaw as flaw:
            error = DataError(f"{source.where}: item {number:,}: {flaw}; mend it{SKIP}")
            _refuse(on_bad, error)
        else:
            if content:
                yield _record(number, number, content)


class _CsvLines(_Lines):
    """Lines as the csv module takes them; what is not UTF-8 is noted, with its byte."""

    flaw: tuple[int, _Flaw] | None = None

    def __next__(self) -> str:
        line = super().__next__()
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            byte = self.offset - len(line) + error.start
            self.flaw = self.flaw or (byte, _not_utf8(line, error.start))
            return line.decode(errors="replace")


def _read_csv(
    source: Source, cursor: int, on_bad: OnBad | None, position: int | None
) -> Iterator[Record]:
    """Of CSV and TSV. In TSV a quote is a character like any other, as IANA's definition has it."""
    csv.field_size_limit(FIELD_LIMIT)  # there is but one for all readers
    form = {"delimiter": ",", "strict": True}
    if source.kind == "tsv":
        form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    with _open(source.where) as file:
        lines = _CsvLines(file)
        rows = csv.reader(lines, **form)
        try:
            header = next(rows, [])
        except csv.Error as error:
            raise DataError(f"{source.where}:1 (byte 0): not a header ({error})") from None
        if lines.offset == 0:  # an empty file
            return
        if source.text_field not in header:
            raise DataError(f"{source.where}:1 (byte 0): {_no_field(source.text_field, header)}")
        column = header.index(source.text_field)
        if cursor:
            lines.move(cursor, position)
        while True:
            start, number, lines.flaw = lines.offset, lines.number, None
            try:
                row = next(rows)
            except StopIteration:
                return
            except DataError as error:  # the file is cut short
                return _refuse(on_bad, error)
            except csv.Error as error:
                _refuse(on_bad, _bad_line(source, number, start, str(error)))
                # A stray quote takes the lines after it along, so go on with the next one.
                lines.move(start, number)
                next(lines)
                continue
            if lines.flaw:
                byte, flaw = lines.flaw
                _refuse(on_bad, _bad_line(source, number, byte, str(flaw)))
            elif row and len(row) != len(header):
                why = f"{len(row):,} fields, but the header names {len(header):,}"
                _refuse(on_bad, _bad_line(source, number, start, why))
            elif row and row[column]:
                yield _record(start, number, row[column].encode())


# --- tables and functions ----------------------------------------------------------------------


def records_of(
    texts: Iterable[str | bytes],
    where: str,
    first: int = 0,
    on_bad: OnBad | None = None,
    remedy: str = "",
) -> Iterator[Record]:
    """A record for each text that a caller, a function or a table gives, numbered from `first`.

    Raises:
      DataError: for what is no text; it begins with `where` and ends with `remedy`.
    """
    _check_several(texts, where)
    for number, text in enumerate(texts, first):
        try:
            content = _to_bytes(text)
        except _Flaw as flaw:
            _refuse(on_bad, DataError(f"{where}: document {number:,} {flaw}{remedy}"))
        else:
            if content:
                yield _record(number, number, content)


def _check_several(texts: Iterable[str | bytes], where: str) -> None:
    if isinstance(texts, str | bytes):
        raise DataError(f"{where}: one {type(texts).__name__} was given; give a list of texts")


def _check_field(source: Source, names: Iterable[str]) -> None:
    if source.text_field not in names:
        raise DataError(f"{source.where}: {_no_field(source.text_field, names)}")


def _read_parquet(
    source: Source, cursor: int, on_bad: OnBad | None, position: int | None
) -> Iterator[Record]:
    parquet = _needed("pyarrow.parquet", "parquet", source.where)
    with _open(source.where) as file:
        try:
            table = parquet.ParquetFile(file)
        except (ValueError, OSError) as error:
            raise DataError(
                f"{source.where}: not a whole Parquet file ({error}); copy it again"
            ) from error
        _check_field(source, table.schema_arrow.names)

        values = _parquet_values(table, source.text_field, cursor)
        yield from records_of(_said_of(source, values), source.where, cursor, on_bad, SKIP)


def _parquet_values(table: Any, field: str, start: int) -> Iterator[str | bytes | None]:
    """The values of a column from number `start` on, read by row groups."""
    first = 0
    for group in range(table.num_row_groups):
        past = first + table.metadata.row_group(group).num_rows
        if past > start:
            batches = table.iter_batches(1024, row_groups=[group], columns=[field])
            values = (value.as_py() for batch in batches for value in batch.column(0))
            yield from itertools.islice(values, max(start - first, 0), None)
        first = past


def _said_of(source: Source, values: Iterable[Any]) -> Iterator[Any]:
    """The same values; when reading one fails, that is said of the source."""
    with _reaching(source.where):
        yield from values


def _read_hf(
    source: Source, cursor: int, on_bad: OnBad | None, position: int | None
) -> Iterator[Record]:
    datasets = _needed("datasets", "hf", source.where)
    with _reaching(source.where):
        data = datasets.load_from_disk(source.where)
    _check_field(source, data.column_names)
    table = data.select_columns([source.text_field]).with_format("arrow")
    values = (
        value.as_py()
        for first in range(cursor, len(data), 1024)
        for value in table[first : first + 1024].column(0)
    )
    yield from records_of(_said_of(source, values), source.where, cursor, on_bad, SKIP)


def _is_hf(folder: Path) -> bool:
    """Whether `datasets` has saved a data set, or a dictionary of them, in a folder."""
    saved = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return saved or (folder / "dataset_dict.json").is_file()


def _hf_source(folder: Path, name: str, label: str, config: DataConfig) -> Source:
    """Of a dictionary of data sets the one that `tfds_split` names."""
    listing = folder / "dataset_dict.json"
    if listing.is_file():
        with _reaching(str(listing)):
            splits = json.loads(listing.read_text())["splits"]
        split = config.tfds_split
        if split not in splits:
            raise DataError(
                f"{label}: {folder}: there is no split {split!r} but "
                f"{', '.join(map(repr, splits))}; give one with --data.tfds-split, or as "
                f"{folder}/SPLIT.{did_you_mean(split, splits)}"
            )
        folder, name = folder / split, f"{name}/{split}"
    return Source(name, str(folder), "hf", config.text_field)


def _read_tfds(
    source: Source, cursor: int, on_bad: OnBad | None, position: int | None
) -> Iterator[Record]:
    builder, split = _tfds_builder(source.where, source.tfds_dir)
    _check_field(source, builder.info.features)
    with _reaching(source.where):
        data = builder.as_data_source(split=split)
    values = (data[i][source.text_field] for i in range(cursor, len(data)))
    yield from records_of(_said_of(source, values), source.where, cursor, on_bad, SKIP)


def _tfds_builder(where: str, folder: str | None) -> tuple[Any, str]:
    """The builder of a TFDS data set, and the split."""
    for module in ("importlib_resources", "array_record"):  # TFDS needs them without saying so
        _needed(module, "tfds", where)
    tfds = _needed("tensorflow_datasets", "tfds", where)
    name, _, split = where.removeprefix("tfds:").partition("@")
    try:
        return tfds.builder(name, data_dir=folder), split
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        place = folder or tfds.core.constants.DATA_DIR
        raise DataError(
            f"{where}: TFDS knows no such data set, and {place} holds none."
            f"{did_you_mean(name.partition('/')[0], known)}"
        ) from None
    except Exception as error:
        raise DataError(f"{where}: TFDS cannot read this data set ({_said(error)})") from error


def _tfds_source(given: str, label: str, config: DataConfig) -> Source:
    """A split of a TFDS data set, prepared now if `tfds_prepare` consents to that."""
    name, _, split = given.removeprefix("tfds:").partition("@")
    split = split or config.tfds_split
    builder, _ = _tfds_builder(given, config.tfds_dir)
    if not builder.is_prepared():
        folder = builder.data_path
        if not config.tfds_prepare:
            raise DataError(
                f"{label}: {given}: this data set is not prepared in {folder}; prepare it with "
                f"tfds.builder({name!r}, data_dir=...).download_and_prepare(file_format="
                "'array_record'), or consent to that being done now with --data.tfds-prepare"
            )
        try:
            builder.download_and_prepare(file_format="array_record")
        except Exception as error:
            raise DataError(f"{label}: {given}: TFDS cannot prepare it ({_said(error)})") from error
    formats = sorted(form.value for form in builder.info.available_file_formats())
    if "array_record" not in formats:
        raise DataError(
            f"{label}: {given}: prepared as {', '.join(formats)}, which cannot be read without "
            "TensorFlow; prepare it anew with --data.tfds-dir FOLDER --data.tfds-prepare"
        )
    try:
        builder.info.splits[split]
    except (ValueError, KeyError):
        splits = list(builder.info.splits)
        raise DataError(
            f"{label}: {given}: there is no split {split!r} but {', '.join(map(repr, splits))}; "
            f"give one with --data.tfds-split, or as tfds:NAME@SPLIT.{did_you_mean(split, splits)}"
        ) from None
    version = "" if ":" in name else f":{builder.version}"
    where = f"tfds:{name}{version}@{split}"
    return Source(where, where, "tfds", config.text_field, config.tfds_dir)


def _tfds_files(source: Source) -> list[str]:
    builder, split = _tfds_builder(source.where, source.tfds_dir)
    return sorted({str(path) for path in builder.info.splits[split].filepaths})


def _read_function(
    source: Source, cursor: int, on_bad: OnBad | None, position: int | None
) -> Iterator[Record]:
    texts = itertools.islice(_yielded(source), cursor, None)
    yield from records_of(texts, source.where, cursor, on_bad, SKIP)


def _yielded(source: Source) -> Iterator[str | bytes]:
    """What a function yields; when it fails, that is said of it."""
    function = load_function(source.where)
    try:
        texts = function()
        _check_several(texts, source.where)
        yield from texts
    except DataError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise DataError(f"{source.where}: failed with {kind}: {error}") from error
