"""The token store: documents as one sequence of tokens on disk or in a bucket, in shards.

Each document is its end-of-text token and then its tokens, and a last end-of-text token closes the
store. So that token begins a document, for a model that is to write one, and is the last target of
the one before.

A store is a folder:

    manifest.json      what it holds and what it was made from; written last
    shards/00000/      a part of the sequence; a long document may go on in the next one
      tokens           [n] zarr arrays, whose chunks have a checksum each
      offsets          [d] where in `tokens` a document begins
      origins          [d, 2] number of its source in the manifest, position in that source
      shard.json       counts and checksums; written last
"""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from gptjax.files import (
    Folder,
    building,
    join,
    list_folders,
    read_file,
    remove,
    remove_file,
    remove_files,
    spec_of,
    write_json,
    writing,
)
from gptjax.sources import DataError, Fingerprint
from gptjax.tokenizer import Tokenizer

DIGITS = 5  # of a shard's number, or more where there are so many
FORMAT = 2  # of a store; raised when what lies on disk changes its meaning
FILE_SIZE = 1 << 24  # numbers in a file
CHUNK_SIZE = 1 << 13  # numbers with a checksum of their own: the least that is read at once
# Chunks and indices of files kept in memory by an open store. With reads at random places of 1e11
# tokens, a file is read again after 6,000 others, of each an index of 32 KiB and a chunk of 16 KiB:
# where there is room for these, indices stay and a window costs one read.
CACHE_BYTES = 384 << 20
OPEN_ARRAYS = 1 << 14  # of shards, kept open by an open store; they are small, and slow to open
BATCH_WINDOWS = 16  # asked for together; they are read while the next ones are asked for
BATCH_BYTES = 1 << 20  # of short texts, encoded together
SHORT_BYTES = 1 << 16  # texts up to this are short
LISTED = 20  # names that a list of them holds at most


class Text(NamedTuple):
    """A document that is to be written, or the rest of one that the shard before began."""

    name: str  # for messages
    source: int  # number of the source, as the manifest lists them
    position: int  # in the source, as a user reads it
    size: int  # bytes
    pieces: Callable[[], Iterator[bytes]]
    begins: bool = True  # False: it goes on from a place where the tokenizer can cut


class ShardInfo(NamedTuple):
    """What a shard holds; `shard.json` in its folder."""

    documents: int  # that begin in it
    tokens: int
    bytes: int  # of text
    blank: bool  # nothing but white space
    num_not_utf8: int  # documents, or parts of them
    not_utf8: list[str]  # the first of their names
    sha256: dict[str, str]  # of each array's numbers
    made_from: str  # a hash of all that decides what it holds


@dataclass(frozen=True)
class Manifest:
    """What a store holds and what it was made from; `manifest.json` in its folder."""

    source: tuple[Fingerprint, ...]
    split: str  # the rule that chose these documents
    tokenizer: str  # kind
    tokenizer_fingerprint: str
    vocab_size: int  # every id was seen to be below it
    dtype: str  # of the tokens, little-endian
    shard_documents: tuple[int, ...]  # that begin in each shard
    shard_tokens: tuple[int, ...]
    shard_bytes: tuple[int, ...]
    sha256: str  # of the checksums of all shards: two stores with the same one hold the same
    dropped: dict[str, int] = field(default_factory=dict)  # documents left out, by reason
    bad_records: tuple[str, ...] = ()  # the first of their messages
    format: int = FORMAT

    @property
    def num_documents(self) -> int:
        return sum(self.shard_documents)

    @property
    def num_tokens(self) -> int:
        """All of them, with the end-of-text tokens."""
        return sum(self.shard_tokens)

    @property
    def num_bytes(self) -> int:
        """Of text."""
        return sum(self.shard_bytes)


class DocumentInfo(NamedTuple):
    """Where a document lies in a store, and where it came from."""

    number: int
    start: int  # of its leading end-of-text token
    stop: int  # of the token after its last
    source: str  # name
    position: int  # in the source, as a user reads it


# --- reading -----------------------------------------------------------------------------------


class Store:
    """An open store. Its arrays are opened when they are first read; the last ones stay open."""

    def __init__(self, folder: Folder, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self.num_tokens, self.num_documents = manifest.num_tokens, manifest.num_documents
        self._first_token = np.cumsum([0, *manifest.shard_tokens])
        self._first_document = np.cumsum([0, *manifest.shard_documents])
        context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        self._open = lru_cache(OPEN_ARRAYS)(partial(_open_array, folder, context))

    def read(self, starts: np.ndarray, length: int, pad: int) -> np.ndarray:
        """Windows of tokens, int32 [len(starts), length], with `pad` past the end of the store.

        Raises:
          DataError: if the files have been damaged since they were built.
        """
        return self.begin_read(starts, length, pad)()

    def begin_read(self, starts: np.ndarray, length: int, pad: int) -> Callable[[], np.ndarray]:
        """Begin what `read` does; what is returned waits for the end. So several stores are read at
        once.
        """
        windows = np.full((len(starts), length), pad, np.int32)
        starts = np.asarray(starts, np.int64)
        stops = np.minimum(starts + length, self.num_tokens)
        shards = self._shard_of(starts)
        last = self._shard_of(np.maximum(stops - 1, 0))
        arrays = self._arrays("tokens", {*shards.tolist(), *last.tolist()})
        each, bounds, parts = range(len(starts)), self._first_token.tolist(), []
        starts, stops, shards = starts.tolist(), stops.tolist(), shards.tolist()

        def ask(i: int, batch: ts.Batch) -> None:
            start, shard, column = starts[i], shards[i], 0
            while start < stops[i]:
                until = min(stops[i], bounds[shard + 1])
                if shard not in arrays:  # only a window wider than a shard comes here
                    arrays.update(self._arrays("tokens", {shard}))
                place = slice(start - bounds[shard], until - bounds[shard])
                read = arrays[shard][place].read(batch=batch)
                parts.append((windows[i, column : column + until - start], read))
                column, start, shard = column + until - start, until, shard + 1

        with self._reading():
            for first in each[::BATCH_WINDOWS]:
                with ts.Batch() as batch:  # windows of one chunk share its reading
                    for i in each[first : first + BATCH_WINDOWS]:
                        ask(i, batch)

        def end_read() -> np.ndarray:
            with self._reading():
                for part, read in parts:
                    part[:] = read.result()
            return windows

        return end_read

    def documents(self, positions: np.ndarray) -> np.ndarray:
        """The number of the document that each token lies in, int64 [len(positions)].

        The token that closes the store counts as the last document's.
        """
        positions = np.clip(np.asarray(positions, np.int64), 0, self.num_tokens - 1)
        shards, numbers = self._shard_of(positions), np.empty(len(positions), np.int64)
        arrays = self._arrays("offsets", set(shards.tolist()))
        with self._reading():
            reads = {shard: array.read() for shard, array in arrays.items()}
            for shard, read in reads.items():
                here = shards == shard
                inside = positions[here] - self._first_token[shard]
                begun = np.searchsorted(read.result(), inside, side="right")
                numbers[here] = self._first_document[shard] + begun - 1
        return numbers

    def document(self, number: int) -> DocumentInfo:
        """Where a document lies and came from; its tokens are those from `start` to `stop`."""
        if not 0 <= number < self.num_documents:
            raise DataError(
                f"{self.folder}: there is no document {number:,}: they go from 0 to "
                f"{self.num_documents - 1:,}"
            )
        shard, index = self._place_of(number)
        array = self._arrays("origins", {shard})[shard]
        with self._reading():
            source, position = array[index].read().result().tolist()
        stop = self.num_tokens - 1
        if number + 1 < self.num_documents:
            stop = self._start_of(number + 1)
        name = self.manifest.source[source].name if self.manifest.source else ""
        return DocumentInfo(number, self._start_of(number), stop, name, position)

    def verify(self) -> None:
        """Read everything and compare it with the checksums.

        Raises:
          DataError: naming what differs.
        """
        digests, remedy = hashlib.sha256(), f"delete {self.folder} to build it anew"
        for shard in range(len(self.manifest.shard_tokens)):
            info = read_shard_info(self.folder, shard)
            counts = tuple(column[shard] for column in _columns(self.manifest))
            if info is None or (info.documents, info.tokens, info.bytes) != counts:
                raise DataError(
                    f"{join(self.folder, _shard_name(shard), 'shard.json')}: is not what the "
                    f"manifest says; {remedy}"
                )
            for name, expected in info.sha256.items():
                digest = self._digest(name, shard)
                if digest != expected:
                    raise DataError(
                        f"{join(self.folder, _shard_name(shard), name)}: SHA-256 is {digest}, but "
                        f"was {expected} when the store was built; {remedy}"
                    )
                digests.update(digest.encode())
        if digests.hexdigest() != self.manifest.sha256:
            raise DataError(f"{self.folder}: SHA-256 is not what the manifest says; {remedy}")

    def _digest(self, name: str, shard: int) -> str:
        array, digest = self._arrays(name, {shard})[shard], hashlib.sha256()
        with self._reading():
            for start in range(0, array.shape[0], FILE_SIZE):
                stop = min(start + FILE_SIZE, array.shape[0])
                digest.update(array[start:stop].read().result())
        return digest.hexdigest()

    def _shard_of(self, positions: np.ndarray) -> np.ndarray:
        last = len(self.manifest.shard_tokens) - 1
        return np.minimum(np.searchsorted(self._first_token, positions, side="right") - 1, last)

    def _place_of(self, number: int) -> tuple[int, int]:
        """The shard in which a document begins, and its number there."""
        shard = int(np.searchsorted(self._first_document, number, side="right")) - 1
        return shard, number - int(self._first_document[shard])

    def _start_of(self, number: int) -> int:
        shard, index = self._place_of(number)
        array = self._arrays("offsets", {shard})[shard]
        with self._reading():
            return int(self._first_token[shard]) + int(array[index].read().result())

    def _arrays(self, name: str, shards: Iterable[int]) -> dict[int, ts.TensorStore]:
        """The open arrays of shards; those that are not open yet are opened all at once.

        Raises:
          DataError: for one that is missing or has another size than the manifest says.
        """
        column = "shard_tokens" if name == "tokens" else "shard_documents"
        sizes = getattr(self.manifest, column)
        with self._reading():
            opening = {shard: self._open(_shard_name(shard), name) for shard in shards}
            arrays = {shard: array.result() for shard, array in opening.items()}
        for shard, array in arrays.items():
            if array.shape[0] != sizes[shard]:
                raise DataError(
                    f"{join(self.folder, _shard_name(shard), name)}: {array.shape[0]:,} numbers, "
                    f"but the manifest says {sizes[shard]:,}; delete {self.folder} to build it anew"
                )
        return arrays

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:  # TensorStore's, for what is missing, cut short or altered
            self._open.cache_clear()  # a failure of a network may pass
            if isinstance(error, DataError):
                raise
            reason = str(error).partition(" [")[0]
            raise DataError(
                f"{self.folder}: damaged ({reason}); delete it to build it anew"
            ) from error


def open_store(folder: Folder, tokenizer: Tokenizer) -> Store:
    """Open a store, in a time that does not depend on its size.

    Raises:
      DataError: if there is none, it is damaged, or another tokenizer built it.
    """
    path, remedy = join(folder, "manifest.json"), f"delete {folder} to build it anew"
    content = read_file(folder, "manifest.json")
    if content is None:
        raise DataError(f"{folder}: there is no store here (no manifest.json); build it again")
    try:
        fields = json.loads(content)
        if fields["format"] != FORMAT:
            raise DataError(
                f"{path}: format {fields['format']}, but only {FORMAT} is read; {remedy}"
            )
        source = tuple(Fingerprint(**source) for source in fields.pop("source"))
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        manifest = Manifest(**fields | lists | {"source": source})
        assert len({len(column) for column in _columns(manifest)}) == 1
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise DataError(f"{path}: not a manifest ({error}); {remedy}") from error
    if manifest.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{folder}: built by tokenizer {manifest.tokenizer!r} with fingerprint "
            f"{manifest.tokenizer_fingerprint}, but opened with {tokenizer.kind!r}, "
            f"{tokenizer.fingerprint}; use the first, or build another store"
        )
    return Store(folder, manifest)


def _columns(manifest: Manifest) -> tuple[tuple[int, ...], ...]:
    return manifest.shard_documents, manifest.shard_tokens, manifest.shard_bytes


def _shard_name(number: int) -> str:
    return f"shards/{number:0{DIGITS}}"


def _open_array(folder: Folder, context: ts.Context, shard: str, name: str) -> ts.Future:
    unchecked = {"recheck_cached_data": False, "recheck_cached_metadata": False}
    return ts.open(_array_spec(folder, shard, name) | unchecked, context=context, read=True)


def _array_spec(folder: Folder, *names: str) -> dict[str, Any]:
    # Zarr leaves out chunks of zeros and reads missing ones as zeros; here what is missing is lost.
    return {
        "driver": "zarr3",
        "kvstore": spec_of(join(folder, *names)),
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }


# --- writing -----------------------------------------------------------------------------------


class ShardWriter:
    """A shard that is being written: `add` texts in order, then `close`.

    Args:
      folder: of the store.
      number: of the shard.
      progress: called with the number of bytes that have become tokens.
    """

    def __init__(
        self,
        folder: Folder,
        number: int,
        tokenizer: Tokenizer,
        progress: Callable[[int], None] = lambda num_bytes: None,
    ):
        self._folder, self._name, self._tokenizer = folder, _shard_name(number), tokenizer
        self._progress = progress
        remove_file(folder, f"{self._name}/shard.json")  # it would speak of what is now replaced
        make = partial(_Appender, folder, self._name)
        self._tokens = make("tokens", dtype_of(tokenizer))
        self._offsets, self._origins = make("offsets", "int64"), make("origins", "int64", 2)
        self._short: list[tuple[Text, bytes]] = []  # not encoded yet
        self._num_short = self._num_bytes = self._num_not_utf8 = 0  # bytes, bytes, texts
        self._blank = True
        self._not_utf8: list[str] = []

    def add(self, text: Text) -> None:
        """Append a document, or the rest of one."""
        if text.begins and text.size <= SHORT_BYTES:
            content = b"".join(text.pieces())
            self._short.append((text, content))
            self._num_short += len(content)
            if self._num_short >= BATCH_BYTES:
                self._flush()
            return
        self._flush()
        if text.begins:
            self._append([np.empty(0, np.int32)], [text])
        for ids in self._tokenizer.encode_pieces(self._noted(text), begins=text.begins):
            self._check(ids)
            self._tokens.append(ids)

    def close(self, made_from: str = "", *, closes: bool = True) -> ShardInfo:
        """Write what is left, then `shard.json`.

        Args:
          made_from: a hash of all that decides what the shard holds.
          closes: whether it is the last of its store, and so adds the closing end-of-text token.
        """
        self._flush()
        if closes:
            self._tokens.append(np.array([self._tokenizer.end]))
        arrays = {"tokens": self._tokens, "offsets": self._offsets, "origins": self._origins}
        with ThreadPoolExecutor(len(arrays)) as pool:  # a disk or a network takes its time
            digests = dict(zip(arrays, pool.map(_Appender.close, arrays.values()), strict=True))
        info = ShardInfo(
            documents=self._offsets.size,
            tokens=self._tokens.size,
            bytes=self._num_bytes,
            blank=self._blank,
            num_not_utf8=self._num_not_utf8,
            not_utf8=self._not_utf8,
            sha256=digests,
            made_from=made_from,
        )
        write_json(self._folder, f"{self._name}/shard.json", info._asdict())
        return info

    def _flush(self) -> None:
        """Encode the short texts that wait."""
        if self._short:
            texts, contents = zip(*self._short, strict=True)
            self._short, self._num_short = [], 0
            for text, content in zip(texts, contents, strict=True):
                for _ in self._noted(text._replace(pieces=lambda content=content: [content])):
                    pass
            self._append(self._tokenizer.encode_batch(contents), texts)

    def _append(self, encoded: list[np.ndarray], texts: Iterable[Text]) -> None:
        """Append documents, each led by its end-of-text token, and what else begins a text."""
        lead = np.array([self._tokenizer.end, self._tokenizer.begin], np.int32)
        lead = lead[: 1 + (self._tokenizer.begin != self._tokenizer.end)]
        lengths = np.array([len(lead) + len(ids) for ids in encoded])
        self._offsets.append(self._tokens.size + np.cumsum(lengths) - lengths)
        self._origins.append(np.array([(text.source, text.position) for text in texts]))
        for ids in encoded:
            self._check(ids)
        self._tokens.append(np.concatenate([part for ids in encoded for part in (lead, ids)]))

    def _check(self, ids: np.ndarray) -> None:
        assert ids.min(initial=0) >= 0 and ids.max(initial=0) < self._tokenizer.vocab_size
        assert not ((ids == self._tokenizer.end) | (ids == self._tokenizer.pad)).any()

    def _noted(self, text: Text) -> Iterator[bytes]:
        """The pieces of a text, while what they are is noted."""
        decoder, valid = codecs.getincrementaldecoder("utf-8")(), True
        for piece in text.pieces():
            self._blank = self._blank and piece.isspace()
            valid = valid and _decodes(decoder, piece)
            yield piece
            self._num_bytes += len(piece)
            self._progress(len(piece))
        if not (valid and _decodes(decoder, b"", final=True)):
            self._num_not_utf8 += 1
            if len(self._not_utf8) < LISTED:
                self._not_utf8.append(text.name)


def dtype_of(tokenizer: Tokenizer) -> str:
    """The type of a store's tokens."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _decodes(decoder: codecs.IncrementalDecoder, piece: bytes, final: bool = False) -> bool:
    try:
        decoder.decode(piece, final)
    except UnicodeDecodeError:
        return False
    return True


class _Appender:
    """An array that grows at its end, in whole files; what was there before is gone."""

    def __init__(self, folder: Folder, shard: str, name: str, dtype: str, width: int | None = None):
        self.size = 0
        self._folder, self._spec = folder, _array_spec(folder, shard, name)
        self._rest = [] if width is None else [width]
        self._buffer = np.empty((FILE_SIZE, *self._rest), np.dtype(dtype).newbyteorder("<"))
        self._array: ts.TensorStore | None = None
        self._digest = hashlib.sha256()

    def append(self, values: np.ndarray) -> None:
        while len(values):
            used = self.size % FILE_SIZE
            part, values = np.split(values, [FILE_SIZE - used])
            self._buffer[used : used + len(part)] = part
            self.size += len(part)
            if self.size % FILE_SIZE == 0:
                self._flush(FILE_SIZE)

    def close(self) -> str:
        """Write the rest; the SHA-256 of all numbers, in hex."""
        if self.size % FILE_SIZE or not self.size:
            self._flush(self.size % FILE_SIZE)
        return self._digest.hexdigest()

    def _flush(self, count: int) -> None:
        self._digest.update(self._buffer[:count])
        with writing(self._folder):
            if self._array is None:
                spec = self._spec | {"metadata": self._metadata()}
                self._array = ts.open(spec, create=True, delete_existing=True).result()
            else:
                self._array = self._array.resize(exclusive_max=[self.size, *self._rest]).result()
            self._array[self.size - count : self.size].write(self._buffer[:count]).result()

    def _metadata(self) -> dict[str, Any]:
        little = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        chunks = {
            "chunk_shape": [CHUNK_SIZE, *self._rest],
            "codecs": little,
            "index_codecs": little,
        }
        files = {"chunk_shape": [FILE_SIZE, *self._rest]}
        return {
            "shape": [self.size, *self._rest],
            "data_type": self._buffer.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": files},
            "codecs": [{"name": "sharding_indexed", "configuration": chunks}],
        }


def read_shard_info(folder: Folder, number: int) -> ShardInfo | None:
    """What a shard of a store holds; None if it is not whole."""
    content = read_file(folder, f"{_shard_name(number)}/shard.json")
    try:
        return None if content is None else ShardInfo(**json.loads(content))
    except (ValueError, TypeError):
        return None


def remove_shards(folder: Folder, first: int) -> None:
    """Delete the shards of a store from this one on."""
    if first < 10**DIGITS:  # then all that follow by their letters do; this finds locks too
        remove_files(folder, _shard_name(first), "shards0")  # 0 follows the slash
    for name in list_folders(folder, "shards"):
        if name.isdecimal() and int(name) >= first:
            remove_files(folder, f"shards/{name}/", f"shards/{name}0")


def write_manifest(
    folder: Folder,
    tokenizer: Tokenizer,
    shards: Iterable[ShardInfo],
    source: tuple[Fingerprint, ...],
    split: str,
    **fields: Any,
) -> Manifest:
    """Make a store of the shards that lie in a folder.

    Args:
      split: the rule that chose the documents.
      fields: others of `Manifest`.
    """
    digests, shards = hashlib.sha256(), list(shards)
    for info in shards:
        digests.update("".join(info.sha256.values()).encode())
    manifest = Manifest(
        source=source,
        split=split,
        tokenizer=tokenizer.kind,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype_of(tokenizer),
        shard_documents=tuple(info.documents for info in shards),
        shard_tokens=tuple(info.tokens for info in shards),
        shard_bytes=tuple(info.bytes for info in shards),
        sha256=digests.hexdigest(),
        **fields,
    )
    fields = asdict(manifest) | {"source": [one._asdict() for one in source]}
    write_json(folder, "manifest.json", fields)
    return manifest


def build_store(
    documents: Iterable[str | bytes],
    tokenizer: Tokenizer,
    folder: Folder,
    *,
    source: tuple[Fingerprint, ...] = (),
) -> Store:
    """Build a store of documents, which memory need not hold at once; empty ones are left out.

    It is built beside `folder` and renamed at the end, so what has a store's name is a whole one.

    Args:
      source: what the manifest is to say of their origin.
    Raises:
      DataError: if the folder is there already, there is no text, or a document is not one.
    """
    with building(folder) as place:
        if place is None:
            raise DataError(f"{folder}: is there already; delete it, or give another folder")
        writer = ShardWriter(place, 0, tokenizer)
        for number, content in enumerate(_contents(documents)):
            if content:
                pieces = partial(iter, [content])
                writer.add(Text(f"document {number}", 0, number, len(content), pieces))
        info = writer.close()
        if info.blank:
            remove(place)
            raise DataError("documents: there is nothing but white space; give texts")
        write_manifest(place, tokenizer, [info], source, "all documents")
    return open_store(folder, tokenizer)


def _contents(documents: Iterable[str | bytes]) -> Iterator[bytes]:
    """The bytes of each document."""
    if isinstance(documents, str | bytes):
        kind = type(documents).__name__
        raise DataError(f"documents: one {kind} was given; give a list of texts")
    for i, text in enumerate(documents):
        if not isinstance(text, str | bytes):
            kind = type(text).__name__
            raise DataError(f"documents: document {i} is of type {kind}; give str or bytes")
        try:
            yield text.encode() if isinstance(text, str) else text
        except UnicodeEncodeError as error:
            raise DataError(
                f"documents: document {i} is no text at character {error.start}, which is half a "
                "surrogate pair; give bytes, such as text.encode(errors='replace')"
            ) from None
