"""What there is in a source of text, and where it can be divided."""

import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.config import DataConfig, load_function
from gptjax.pool import Progress
from gptjax.sources import DataError, Fingerprint, OnBad, Record, Source
from gptjax.store import LISTED, Text
from gptjax.tokenizer import Tokenizer

SPAN_BYTES = 4 << 20  # of text in a span, if there is so much
PIECE_BYTES = 1 << 22  # of a text, read at once
OVERLAP = 256  # bytes around the end of a piece, where a place to cut is looked for again
HASH_BYTES = 16  # of a text; that two of 1e9 texts have the same by chance: 1 in 1e21


class Span(NamedTuple):
    """Records of a source that follow one another, or a part of a single one."""

    source: int  # its number
    cursor: int  # of the first record
    position: int  # of the first record
    count: int  # records
    size: int  # bytes of their text, or of the part
    dropped: tuple[int, ...] = ()  # those of the records, from 0, that are left out
    start: int = 0  # of a part: bytes of the only record that is left
    stop: int | None = None
    begins: bool = True  # False: a part that goes on where the one before stops

    @property
    def num_documents(self) -> int:
        """Those that begin in it."""
        return self.count - len(self.dropped) if self.begins else 0


class Survey(NamedTuple):
    """What there is in a source."""

    fingerprint: Fingerprint
    spans: list[Span]
    hashes: list[str]  # for each span, if asked for, those of its records
    num_filtered: int  # records that the filter left out
    num_bad: int
    bad: list[str]  # the first of their messages
    spooled: str  # SHA-256 of what a function has yielded; it may yield something else next time

    @classmethod
    def from_json(cls, fields: list) -> "Survey":
        """From what a tuple of tuples becomes in JSON."""
        fingerprint, spans, *rest = fields
        return cls(Fingerprint(*fingerprint), [Span(*span) for span in spans], *rest)


def survey_source(
    source: Source,
    number: int,
    config: DataConfig,
    tokenizer: Callable[[], Tokenizer],
    spool: Path,
    progress: Progress,
) -> Survey:
    """Read a source once.

    Args:
      number: of the source, for its spans.
      tokenizer: gives the tokenizer, which says where a long text can be cut.
      spool: where to write what a function yields.
      progress: told of the bytes of text.
    Raises:
      DataError: for a bad record, unless they are to be passed over, and for a filter that fails.
    """
    bad = _Bad()
    on_bad = bad if config.on_bad_record == "skip" else None
    fingerprint, spooled = source.fingerprint(), ""
    if source.kind == "function":
        source, spooled = fill_spool(spool, source, on_bad)
    keep = load_function(config.filter) if config.filter else None
    spans, hashes, num_filtered = [], [], 0
    gathered: list[tuple[Record, bool, str]] = []  # the records of the next span

    def close_span() -> None:
        if gathered:
            records, stay, digests = zip(*gathered, strict=True)
            dropped = tuple(i for i, stays in enumerate(stay) if not stays)
            size = sum(record.size for record in records)
            cursor, position = records[0].cursor, records[0].position
            spans.append(Span(number, cursor, position, len(records), size, dropped))
            hashes.append("".join(digests))
            gathered.clear()

    size = 0
    for record in source.records(on_bad=on_bad):
        stays = keep is None or _asked(keep, config.filter, source, record)
        num_filtered += not stays
        digest = _digest(record) if config.deduplicate else ""
        progress(record.size)
        large = record.size > SPAN_BYTES
        if large or size + record.size > SPAN_BYTES:
            close_span()
            size = 0
        gathered.append((record._replace(pieces=None), stays, digest))
        size += record.size
        if large and stays:
            close_span()
            hashes += [""] * (len(parts := _parts(record, tokenizer())) - 1)
            spans[-1:] = [
                spans[-1]._replace(start=start, stop=stop, size=stop - start, begins=start == 0)
                for start, stop in parts
            ]
    close_span()
    return Survey(fingerprint, spans, hashes, num_filtered, bad.count, bad.messages, spooled)


@dataclass
class _Bad:
    """The bad records of a source."""

    count: int = 0
    messages: list[str] = field(default_factory=list)  # the first

    def __call__(self, error: DataError) -> None:
        self.count += 1
        if len(self.messages) < LISTED:
            self.messages.append(str(error))


def _asked(keep: Callable[[str], bool], name: str, source: Source, record: Record) -> bool:
    """What a filter says of a document."""
    text = b"".join(record.pieces()).decode(errors="replace")
    try:
        answer = keep(text)
    except Exception as error:
        kind, where = type(error).__name__, place(source, record.position)
        raise DataError(f"{name}: failed with {kind}: {error}, for {where}") from error
    if not isinstance(answer, bool | np.bool_):
        raise DataError(
            f"{name}: returned {answer!r} for {place(source, record.position)}; return True to "
            "keep a document, or False"
        )
    return bool(answer)


def _digest(record: Record) -> str:
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for piece in record.pieces():
        digest.update(piece)
    return digest.hexdigest()


def place(source: Source, position: int) -> str:
    """Where a record lies, for messages."""
    if source.kind == "text":
        return source.where
    if source.kind in ("jsonl", "csv", "tsv"):
        return f"{source.where}:{position}"
    return f"{source.where}, record {position:,}"


# --- places to cut a long text -----------------------------------------------------------------


def _parts(record: Record, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """A long text in parts of SPAN_BYTES or little more, cut where it changes no token."""
    bounds, begin, window = [0], 0, b""  # the window is the text from `begin` on
    for piece in record.pieces():
        window += piece
        whole = character_start(window, len(window) - 1)
        while (after := max(bounds[-1] + SPAN_BYTES - begin, OVERLAP // 2)) < whole:
            cut = tokenizer.cut(window[:whole], after)
            if cut is None:
                break
            bounds.append(begin + cut)
        kept = character_start(window, max(len(window) - OVERLAP, 0))
        begin, window = begin + kept, window[kept:]
    return list(zip(bounds, [*bounds[1:], record.size], strict=True))


def find_cut(record: Record, position: int, tokenizer: Tokenizer) -> int:
    """The first place from `position` on where a text can be cut, or if none is near the character
    that lies there."""
    begin = max(position - OVERLAP, 0)
    window = b"".join(record.pieces(begin, min(position + SPAN_BYTES, record.size)))
    skipped = 0 if begin == 0 else 3 - sum(b & 0xC0 != 0x80 for b in window[:3])
    window, begin = window[skipped:], begin + skipped
    after = character_start(window, position - begin)
    return begin + (tokenizer.cut(window, after) or after)


def character_start(content: bytes, position: int) -> int:
    """The last byte up to `position` that can begin a character of UTF-8, which has at most 4."""
    for start in range(position, max(position - 4, -1), -1):
        if content[start] & 0xC0 != 0x80:
            return start
    return max(position - 3, 0)


# --- records again -----------------------------------------------------------------------------


def texts(source: "Source | Spool", span: Span) -> Iterator[Text]:
    """The documents of a span that stay; bad records are passed over, for the survey has met them.

    Raises:
      DataError: if the source is no longer what it was when it was surveyed.
    """
    dropped, seen, size = set(span.dropped), 0, 0
    again = source.records(span.cursor, lambda error: None, span.position)
    with closing(again) as records:
        for index, record in enumerate(islice(records, span.count)):
            seen += 1
            stop = record.size if span.stop is None else min(span.stop, record.size)
            if index not in dropped:
                yield Text(
                    place(source, record.position),
                    span.source,
                    # Of a text a user reads the byte.
                    record.position + (span.start if source.kind == "text" else 0),
                    stop - span.start,
                    partial(record.pieces, span.start, stop),
                    span.begins,
                )
            elif span.stop is not None:  # a part counts alone
                continue
            size += stop - span.start
    if (seen, size) != (span.count, span.size):
        raise DataError(
            f"{source.where}: has changed while it was read; run again when it is left alone"
        )


@dataclass(frozen=True)
class Spool:
    """What a function has yielded, in a file. It is read like a source."""

    source: Source
    path: str

    HEADER = struct.Struct("<qq")  # of a record: position, bytes of text, which follow

    @property
    def where(self) -> str:
        return self.source.where

    @property
    def kind(self) -> str:
        return self.source.kind

    seekable = True

    def records(
        self, cursor: int = 0, on_bad: OnBad | None = None, position: int | None = None
    ) -> Iterator[Record]:
        """Every record, in order, from the one at `cursor` on."""
        with open(self.path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            while cursor < end:
                file.seek(cursor)
                position, size = self.HEADER.unpack(file.read(self.HEADER.size))
                begin = cursor + self.HEADER.size
                yield Record(cursor, position, size, partial(_read_pieces, self.path, begin, size))
                cursor = begin + size


def fill_spool(path: Path, source: Source, on_bad: OnBad | None) -> tuple[Spool, str]:
    """Write what a source yields, once; the SHA-256 of the file as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for record in source.records(on_bad=on_bad):
            header = Spool.HEADER.pack(record.position, record.size)
            for part in (header, *record.pieces()):
                digest.update(part)
                file.write(part)
    return Spool(source, str(path)), digest.hexdigest()


def is_spooled(path: Path, digest: str) -> bool:
    """Whether a file holds what a function has yielded, by its SHA-256."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def _read_pieces(
    path: str, begin: int, size: int, start: int = 0, stop: int | None = None
) -> Iterator[bytes]:
    position, end = begin + start, begin + (size if stop is None else min(stop, size))
    with open(path, "rb") as file:
        file.seek(position)
        while position < end:
            piece = file.read(min(PIECE_BYTES, end - position))
            position += len(piece)
            yield piece
