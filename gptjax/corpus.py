"""Text on disk, or from a Python function, to stores of tokens that are built once.

A store holds documents in order. Each is its end-of-text token and then its tokens, and a last
end-of-text token closes the store. So that token begins a document, for a model that is to write
one, and is the last target of the one before.
"""

import codecs
import dataclasses
import fcntl
import fnmatch
import glob
import gzip
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import tensorstore as ts
from tqdm import tqdm

from gptjax.config import DataConfig, did_you_mean, load_function
from gptjax.tokenizer import Tokenizer

FORMAT = 1  # of a store; raised when what lies on disk changes its meaning
SHARD_SIZE = 1 << 24  # numbers in a file
CHUNK_SIZE = 1 << 13  # numbers with a checksum of their own: the least that is read at once
CACHE_BYTES = 64 << 20  # chunks kept in memory by an open store
PIECE_BYTES = 1 << 22  # of a text, read and tokenized at once

Accept = Callable[[str, int], None]  # raises if a split of this name and number of tokens is no use

log = logging.getLogger(__name__)


class DataError(ValueError):
    """Text or a store of tokens that cannot be used. Says where, why, and what to do."""


# --- documents ---------------------------------------------------------------------------------


class Document(NamedTuple):
    """A text, or a part of one, that can be read more than once."""

    name: str
    open: Callable[[], AbstractContextManager[BinaryIO]]
    start: int = 0  # bytes
    stop: int | None = None

    def pieces(self) -> Iterator[bytes]:
        """The text from start to stop, in pieces of bounded size."""
        with self.open() as file:
            position = file.seek(self.start)
            stop = sys.maxsize if self.stop is None else self.stop
            while piece := file.read(min(PIECE_BYTES, stop - position)):
                position += len(piece)
                yield piece


def _in_memory(texts: Iterable[str | bytes], name: str) -> Iterator[Document]:
    """A document for each text that a caller or a function gives."""
    if isinstance(texts, str | bytes):
        raise DataError(f"{name}: one {type(texts).__name__} was given; give a list of texts")
    for i, text in enumerate(texts):
        if not isinstance(text, str | bytes):
            kind = type(text).__name__
            raise DataError(f"{name}: document {i} is of type {kind}; give str or bytes")
        try:
            content = text.encode() if isinstance(text, str) else text
        except UnicodeEncodeError as error:
            raise DataError(
                f"{name}: document {i} is no text at character {error.start}, which is half a "
                "surrogate pair; give bytes, such as text.encode(errors='replace')"
            ) from None
        yield Document(f"{name}, document {i}", partial(io.BytesIO, content))


class Source(NamedTuple):
    """A file that documents came from."""

    name: str  # its path below the folder or glob that was given
    size: int  # bytes
    sha256: str
    modified: int  # nanoseconds since 1970; when it differs, the checksum decides


class _File(NamedTuple):
    """A file that holds a document, or a function that yields documents."""

    name: str  # its path below the folder or glob that was given, the same on every machine
    path: Path
    function: str | None = None  # as `load_function` takes it

    @property
    def holds_its_text(self) -> bool:
        """Whether the file's size is the text's."""
        return self.function is None and self.path.suffix != ".gz"

    def documents(self) -> Iterator[Document]:
        if self.function is None:
            yield Document(str(self.path), partial(_open, self.path))
            return
        function = load_function(self.function)
        try:
            yield from _in_memory(function(), self.function)
        except DataError:
            raise
        except Exception as error:
            kind = type(error).__name__
            raise DataError(f"{self.function}: failed with {kind}: {error}") from error

    def describe(self) -> Source:
        with open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            stat = os.stat(file.fileno())
        return Source(self.name, stat.st_size, digest, stat.st_mtime_ns)


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, those inside for `.gz`."""
    if path.suffix != ".gz":
        with open(path, "rb") as file:
            yield file
        return
    try:
        with gzip.open(path) as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}); copy it again") from error


def find_files(
    paths: Iterable[str], exclude: Iterable[str] = (), field: str = "data.path"
) -> list[_File]:
    """The files that paths name: for each path in turn, sorted by their place below it; each once.

    Args:
      paths: files, folders (all files below, except hidden ones), globs (`**` crosses folders),
        FILE.py:function.
      exclude: globs whose `*` crosses folders, matched with a file's place below its path, with
        and without a slash before it; so `*/test/*` means every folder of that name.
      field: what an error calls `paths`.
    Raises:
      DataError: for a path that is not there, or if no file is left.
    """
    excluded = re.compile("|".join(map(fnmatch.translate, exclude)) or r"(?!)")
    found = [file for given in paths for file in _expand(given, field)]
    kept = [
        one for one in found if not (excluded.match(one.name) or excluded.match(f"/{one.name}"))
    ]
    if not kept:
        raise DataError(
            f"{field}: data.exclude leaves out all of {len(found):,} files; give fewer globs"
        )
    unique: dict[tuple, _File] = {}
    for one in kept:
        unique.setdefault((os.path.realpath(one.path), one.function), one)
    return list(unique.values())


def _expand(given: str, field: str) -> list[_File]:
    path, magic = Path(given), re.compile(r"[*?[]")
    if ".py:" in given:
        path = Path(given.partition(".py:")[0] + ".py")
        if path.is_file():
            return [_File(f"{path.name}:{given.partition('.py:')[2]}", path, given)]
    elif path.is_file():
        return [_File(path.name, path)]
    elif path.is_dir():
        files = []
        for inside, folders, names in os.walk(path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            files += [Path(inside, name) for name in names if not name.startswith(".")]
        if not files:
            raise DataError(
                f"{field}: {given}: this folder holds no files but hidden ones; give another"
            )
        return _sorted(path, files)
    elif magic.search(given):
        path = Path(*itertools.takewhile(lambda part: not magic.search(part), path.parts))
        matches = [Path(match) for match in glob.glob(given, recursive=True)]
        files = [match for match in matches if match.is_file()]
        if files:
            return _sorted(path, files)
        if matches:
            deeper = f"{given.rstrip('/')}/**"
            raise DataError(
                f"{field}: {given}: matches only folders; give {deeper} for the files below them"
            )
        if path.is_dir():
            names = sorted(os.listdir(path))
            listing = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            holds = f"{path.absolute()} holds {listing or 'nothing'}"
            raise DataError(f"{field}: {given}: matches nothing; {holds}")
    while not path.parent.is_dir():
        path = path.parent
    hint = did_you_mean(path.name, os.listdir(path.parent))
    where = path.parent.absolute()
    raise DataError(f"{field}: {given}: there is no {path.name!r} in {where}.{hint}")


def _sorted(root: Path, files: list[Path]) -> list[_File]:
    found = (_File(file.relative_to(root).as_posix(), file) for file in files)
    return sorted(file for file in found if file.path.is_file())


# --- the store ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest:
    """What a store holds and what it was made from; `manifest.json` in its folder."""

    source: tuple[Source, ...]
    split: str  # the rule that chose these documents
    tokenizer: str  # kind
    tokenizer_fingerprint: str
    vocab_size: int  # every id was seen to be below it
    num_documents: int
    num_tokens: int  # with the end-of-text tokens
    num_bytes: int  # of text
    dtype: str  # of the tokens, little-endian
    tokens_sha256: str
    offsets_sha256: str
    format: int = FORMAT


class DocumentInfo(NamedTuple):
    """A document of a store: its tokens, with the leading end-of-text, and where it came from."""

    number: int
    start: int
    stop: int
    source: str
    position: int


@dataclass(frozen=True)
class Store:
    """An open store of tokens.

    `tokens` [num_tokens] are the documents, each led by its end-of-text token, and a last one.
    `offsets` [num_documents + 1] int64 says where each leading token is, and the last one.
    """

    folder: Path
    manifest: Manifest
    tokens: ts.TensorStore
    offsets: ts.TensorStore

    @property
    def num_tokens(self) -> int:
        return self.manifest.num_tokens

    @property
    def num_documents(self) -> int:
        return self.manifest.num_documents

    def read(self, starts: np.ndarray, length: int, pad: int) -> np.ndarray:
        """Windows of tokens, int32 [len(starts), length], with `pad` past the end of the store.

        Raises:
          DataError: if the files have been damaged since they were built.
        """
        windows = np.full((len(starts), length), pad, np.int32)
        with _reading(self.folder):
            with ts.Batch() as batch:  # windows of one chunk share its reading
                bounds = np.minimum([starts, np.add(starts, length)], self.num_tokens).T.tolist()
                reads = [self.tokens[start:stop].read(batch=batch) for start, stop in bounds]
            for window, (start, stop), read in zip(windows, bounds, reads, strict=True):
                window[: stop - start] = read.result()
        return windows

    def documents(self, positions: np.ndarray) -> np.ndarray:
        """The number of the document that each token lies in, int64."""
        with _reading(self.folder):
            offsets = self.offsets.read().result()
        return np.searchsorted(offsets, positions, side="right") - 1

    def document(self, number: int) -> DocumentInfo:
        """A document by its number."""
        with _reading(self.folder):
            start, stop = self.offsets[number : number + 2].read().result().tolist()
        names = [one.name for one in self.manifest.source]
        return DocumentInfo(
            number, start, stop, names[0] if len(names) == 1 else str(self.folder), 0
        )

    def verify(self) -> None:
        """Read everything and compare it with the manifest's checksums.

        Raises:
          DataError: naming what differs.
        """
        for name in ("tokens", "offsets"):
            array, digest = getattr(self, name), hashlib.sha256()
            with _reading(self.folder):
                for start in range(0, array.shape[0], SHARD_SIZE):
                    stop = min(start + SHARD_SIZE, array.shape[0])
                    digest.update(array[start:stop].read().result())
            expected = getattr(self.manifest, f"{name}_sha256")
            if digest.hexdigest() != expected:
                raise DataError(
                    f"{self.folder / name}: SHA-256 is {digest.hexdigest()}, but was {expected} "
                    "when the store was built; delete the store to build it anew"
                )


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # TensorStore's, for what is missing, cut short or altered
        reason = str(error).partition(" [")[0]
        raise DataError(f"{folder}: damaged ({reason}); delete it to build it anew") from error


def open_store(folder: Path, tokenizer: Tokenizer) -> Store:
    """Open a store, in a time that does not depend on its size.

    Raises:
      DataError: if there is none, it is damaged, or another tokenizer built it.
    """
    path, remedy = folder / "manifest.json", f"delete {folder} to build it anew"
    if not path.is_file():
        raise DataError(f"{folder}: there is no store here (no manifest.json); build it again")
    try:
        fields = json.loads(path.read_text())
        source = tuple(Source(**source) for source in fields["source"])
        manifest = Manifest(**fields | {"source": source})
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not a manifest ({error}); {remedy}") from error
    if manifest.format != FORMAT:
        raise DataError(f"{path}: format {manifest.format}, but only {FORMAT} is read; {remedy}")
    if manifest.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{folder}: built by tokenizer {manifest.tokenizer!r} with fingerprint "
            f"{manifest.tokenizer_fingerprint}, but opened with {tokenizer.kind!r}, "
            f"{tokenizer.fingerprint}; use the first, or build another store"
        )
    context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    sizes = {"tokens": manifest.num_tokens, "offsets": manifest.num_documents + 1}
    arrays = {}
    for name, size in sizes.items():
        unchecked = {"recheck_cached_data": False, "recheck_cached_metadata": False}
        with _reading(folder):
            spec = _spec(folder / name) | unchecked
            arrays[name] = ts.open(spec, context=context, read=True).result()
        if arrays[name].shape != (size,):
            given = arrays[name].shape[0]
            raise DataError(
                f"{folder / name}: {given:,} numbers, but the manifest says {size:,}; {remedy}"
            )
    return Store(folder, manifest, **arrays)


def _spec(path: Path) -> dict:
    # Zarr leaves out chunks of zeros and reads missing ones as zeros; here what is missing is lost.
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path.absolute())},
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }


class _Appender:
    """An array on disk that grows at its end, in whole shards."""

    def __init__(self, path: Path, dtype: str):
        little = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        sharding = {"chunk_shape": [CHUNK_SIZE], "codecs": little, "index_codecs": little}
        metadata = {
            "shape": [0],
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD_SIZE]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }
        self.size = 0
        self._array = ts.open(_spec(path) | {"metadata": metadata}, create=True).result()
        self._buffer = np.empty(SHARD_SIZE, np.dtype(dtype).newbyteorder("<"))
        self._digest = hashlib.sha256()

    def append(self, values: np.ndarray) -> None:
        while len(values):
            used = self.size % SHARD_SIZE
            part, values = np.split(values, [SHARD_SIZE - used])
            self._buffer[used : used + len(part)] = part
            self.size += len(part)
            if self.size % SHARD_SIZE == 0:
                self._flush(SHARD_SIZE)

    def close(self) -> str:
        """Write the rest; the SHA-256 of all numbers, in hex."""
        self._flush(self.size % SHARD_SIZE)
        return self._digest.hexdigest()

    def _flush(self, count: int) -> None:
        if count:
            self._digest.update(self._buffer[:count])
            self._array = self._array.resize(exclusive_max=[self.size]).result()
            self._array[self.size - count : self.size].write(self._buffer[:count]).result()


class _Writer:
    """A store that is being built in a folder."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, bar: tqdm):
        self.num_documents = 0
        self.blank = True  # nothing but white space so far
        self.not_utf8: list[str] = []  # documents
        self._folder, self._tokenizer, self._bar = folder, tokenizer, bar
        self._num_bytes = 0
        self._dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        self._tokens = _Appender(folder / "tokens", self._dtype)
        self._offsets = _Appender(folder / "offsets", "int64")

    def add(self, document: Document) -> None:
        """Append a document."""
        self.num_documents += 1
        self._add_end()
        end, pad, vocab_size = self._tokenizer.end, self._tokenizer.pad, self._tokenizer.vocab_size
        for ids in self._tokenizer.encode_pieces(self._counted(document)):
            assert ids.min(initial=0) >= 0 and ids.max(initial=0) < vocab_size
            assert not ((ids == end) | (ids == pad)).any()
            self._tokens.append(ids)

    def close(self, source: tuple[Source, ...], split: str) -> Manifest:
        """End the last document and write the manifest."""
        self._add_end()
        manifest = Manifest(
            source=source,
            split=split,
            tokenizer=self._tokenizer.kind,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            vocab_size=self._tokenizer.vocab_size,
            num_documents=self.num_documents,
            num_tokens=self._tokens.size,
            num_bytes=self._num_bytes,
            dtype=self._dtype,
            tokens_sha256=self._tokens.close(),
            offsets_sha256=self._offsets.close(),
        )
        fields = dataclasses.asdict(manifest) | {"source": [one._asdict() for one in source]}
        with open(self._folder / "manifest.json", "w") as file:
            json.dump(fields, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        return manifest

    def _add_end(self) -> None:
        self._offsets.append(np.array([self._tokens.size]))
        self._tokens.append(np.array([self._tokenizer.end]))

    def _counted(self, document: Document) -> Iterator[bytes]:
        """The pieces of a document, while what they are is noted."""
        decoder, valid = codecs.getincrementaldecoder("utf-8")(), True
        for piece in document.pieces():
            self._num_bytes += len(piece)
            self._bar.update(len(piece))
            self.blank = self.blank and piece.isspace()
            valid = valid and _decodes(decoder, piece)
            yield piece
        if not (valid and _decodes(decoder, b"", final=True)):
            self.not_utf8.append(document.name)


def _decodes(decoder: codecs.IncrementalDecoder, piece: bytes, final: bool = False) -> bool:
    try:
        decoder.decode(piece, final)
    except UnicodeDecodeError:
        return False
    return True


@contextmanager
def _building(folder: Path) -> Iterator[Path | None]:
    """A temporary folder that becomes `folder` if all goes well; None if `folder` is there already.

    Processes that want the same folder at once take turns. What a killed one leaves has a hidden
    name, and the next one removes it.
    """
    new_parent = not folder.parent.exists()
    try:
        with _alone_in(folder.with_name(f".{folder.name}.building")) as workshop:
            if folder.exists():
                yield None
                return
            temporary = workshop / "store"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            for inside, _, _ in os.walk(temporary):
                _sync(inside)
            temporary.rename(folder)
            _sync(folder.parent)
    finally:
        if new_parent:
            with suppress(OSError):  # it holds a store
                folder.parent.rmdir()


@contextmanager
def _alone_in(workshop: Path) -> Iterator[Path]:
    """A folder that one process at a time is in; it exists only as long. A kill ends the turn."""
    while True:
        try:
            workshop.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(workshop / "lock", os.O_CREAT | os.O_WRONLY)
        except (FileExistsError, FileNotFoundError):  # the one before is just removing the folder
            continue
        with open(descriptor, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink == 0:  # removed while this process waited for it
                continue
            try:
                yield workshop
            finally:
                shutil.rmtree(workshop, ignore_errors=True)
            return


def _sync(folder: str | Path) -> None:
    """Make the names in a folder outlive a loss of power; TensorStore does so for its files."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def build_store(
    documents: Iterable[str | bytes],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    source: tuple[Source, ...] = (),
) -> Store:
    """Build a store of documents, which memory need not hold at once; empty ones are left out.

    It is built beside `folder` and renamed at the end, so what has a store's name is a whole one.

    Args:
      source: what the manifest is to say of their origin.
    Raises:
      DataError: if the folder is there already, there is no text, or a document is not one.
    """
    with _building(folder) as temporary, tqdm(disable=True) as bar:
        if temporary is None:
            raise DataError(f"{folder}: is there already; delete it, or give another folder")
        writer = _Writer(temporary, tokenizer, bar)
        for document in _with_text(_in_memory(documents, "documents")):
            writer.add(document)
        if writer.blank:
            raise DataError("documents: there is nothing but white space; give texts")
        writer.close(source, "all documents")
    return open_store(folder, tokenizer)


# --- a run's stores ----------------------------------------------------------------------------


def load_corpus(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    accept: Accept = lambda split, num_tokens: None,
    progress: bool = False,
) -> tuple[Store, Store | None]:
    """The stores for training and validation: built on first use in `store_dir`, and found again.

    Args:
      accept: called with the name of each split, train or valid, and its number of tokens; what it
        raises leaves no new store behind.
      progress: show on stderr how text becomes tokens.
    Returns:
      training, validation; None for the second if `holdout` is 0 and there is no `valid_path`.
    Raises:
      DataError: for a path that is not there, text that cannot be used, or a store that is damaged
        or older than its text.
      ConfigError: for a FILE.py:function that is not there or fails to load.
    """
    if not config.path:
        raise DataError(
            "data.path is empty: give files, folders, globs or FILE.py:function, such as "
            "--data.path input.txt"
        )
    files = {"train": find_files(config.path, config.exclude)}
    if config.valid_path:
        files["valid"] = find_files(config.valid_path, config.exclude, "data.valid_path")
    names = ["train", "valid"] if config.valid_path or config.holdout else ["train"]
    chosen = [config.path, config.exclude, config.valid_path, config.holdout]
    identity = json.dumps([*chosen, tokenizer.fingerprint, FORMAT])
    digest = hashlib.sha256(identity.encode()).hexdigest()
    label = re.sub(r"[^\w.-]+", "-", Path(config.path[0]).name)[-32:].strip("-.") or "text"
    folder = Path(config.store_dir, f"{label}-{digest[:12]}")
    if not folder.exists():
        _build_corpus(folder, names, files, config, tokenizer, accept, progress)
    stores = {name: open_store(folder / name, tokenizer) for name in names}
    for name, store in stores.items():
        accept(name, store.num_tokens)
    for name, listed in files.items():
        _check_source(folder, stores[name].manifest.source, listed)
    return stores["train"], stores.get("valid")


def _build_corpus(
    folder: Path,
    names: list[str],
    files: dict[str, list[_File]],
    config: DataConfig,
    tokenizer: Tokenizer,
    accept: Accept,
    progress: bool,
) -> None:
    """Build a store below `folder` for each of `names`."""
    rule, documents = _route(files, config)
    sources = {name: tuple(file.describe() for file in listed) for name, listed in files.items()}
    size = sum(one.size for listed in sources.values() for one in listed)
    known = all(file.holds_its_text for listed in files.values() for file in listed)
    bar = tqdm(
        desc=f"building {folder}",
        total=size if known else None,
        unit="B",
        unit_scale=True,
        disable=not progress,
    )
    with _building(folder) as temporary, bar:
        if temporary is None:  # another process has built it meanwhile
            return
        writers = {name: _Writer(temporary / name, tokenizer, bar) for name in names}
        for name, document in documents:
            writers[name].add(document)
        num_documents = sum(writer.num_documents for writer in writers.values())
        for name, writer in writers.items():
            if writer.blank:
                raise DataError(_no_text(name, num_documents, config))
            manifest = writer.close(sources.get(name, sources["train"]), rule)
            accept(name, manifest.num_tokens)
            if progress:
                counts = f"{manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens"
                tqdm.write(f"{folder / name}: {counts}", file=sys.stderr)
    strange = list(dict.fromkeys(name for one in writers.values() for name in one.not_utf8))
    if strange:
        more = f" and {len(strange) - 1:,} more" if len(strange) > 1 else ""
        log.warning("%s%s: not UTF-8; the bytes are taken as they are", strange[0], more)


def _route(
    files: dict[str, list[_File]], config: DataConfig
) -> tuple[str, Iterator[tuple[str, Document]]]:
    """How documents are split, in words; and the documents, each with the name of its store.

    Raises:
      DataError: if there is no text, as far as the first document tells.
    """
    documents = {
        name: _with_text(document for file in listed for document in file.documents())
        for name, listed in files.items()
    }
    share = Fraction(str(config.holdout))  # as written: 0.29 of 100 documents are 29, not 28.999
    if config.valid_path or not share:
        rule = "as data.valid_path says" if config.valid_path else "nothing is held out"
        return rule, ((name, document) for name, stream in documents.items() for document in stream)
    first, second = next(documents["train"], None), next(documents["train"], None)
    if second is not None:
        rule = "document i is held out if floor((i + 1) x {0}) > floor(i x {0})"
        return rule.format(config.holdout), (
            ("valid" if math.floor((i + 1) * share) > math.floor(i * share) else "train", document)
            for i, document in enumerate(itertools.chain([first, second], documents["train"]))
        )
    if first is None or all(piece.isspace() for piece in first.pieces()):
        raise DataError(_no_text("train", int(first is not None), config))
    with first.open() as file:
        length = file.seek(0, os.SEEK_END)
    cut = _character_start(first, math.floor(length * (1 - share)))
    parts = {"train": first._replace(stop=cut), "valid": first._replace(start=cut)}
    return f"the last {config.holdout} is held out, from byte {cut} on", iter(parts.items())


def _with_text(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents that have any bytes: an empty one would teach to end a text where it begins."""
    for document in documents:
        with document.open() as file:
            empty = not file.read(1)
        if not empty:
            yield document


def _character_start(document: Document, position: int) -> int:
    """The last byte up to `position` that can begin a character of UTF-8, which has at most 4."""
    earliest = max(position - 3, 0)
    with document.open() as file:
        file.seek(earliest)
        around = file.read(position - earliest + 1)
    while position > earliest and around[position - earliest] & 0xC0 == 0x80:  # inside a character
        position -= 1
    return position


def _no_text(name: str, num_documents: int, config: DataConfig) -> str:
    """Why a split has no text, and what to do."""
    if name == "valid" and not config.valid_path and num_documents * config.holdout < 1:
        return (
            f"data.holdout = {config.holdout}: of {num_documents} documents that is none; give at "
            f"least {math.ceil(100 / num_documents) / 100}, or data.valid_path, or more documents"
        )
    field = "valid_path" if name == "valid" and config.valid_path else "path"
    what = {"train": "training", "valid": "validation"}[name]
    paths = " ".join(getattr(config, field))
    return f"data.{field}: {paths}: nothing but white space for {what}; give files with text"


def _check_source(folder: Path, source: tuple[Source, ...], files: list[_File]) -> None:
    """Refuse a store whose text has changed since.

    Raises:
      DataError: naming the first file that differs.
    """
    before, now = [one.name for one in source], [file.name for file in files]
    if before != now:
        gone, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
        what = f"{gone[0]} is gone" if gone else f"{new[0]} is new" if new else "the order differs"
        raise _changed(folder, what)
    for one, file in zip(source, files, strict=True):
        stat = file.path.stat()
        if stat.st_size != one.size:
            raise _changed(folder, f"{file.path} has {stat.st_size:,} bytes, but had {one.size:,}")
        if stat.st_mtime_ns != one.modified and file.describe().sha256 != one.sha256:
            raise _changed(folder, f"the content of {file.path} differs")


def _changed(folder: Path, what: str) -> DataError:
    return DataError(
        f"{folder}: the text has changed since this store was built ({what}); "
        "delete the folder to build it anew, or give another data.store_dir"
    )
