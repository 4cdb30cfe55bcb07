"""What a record is, and what is wrong with one."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from gptjax.config import did_you_mean

PIECE_BYTES = 1 << 22  # of a text, at once
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


class Flaw(ValueError):
    """Why a record cannot be used, without where it lies; `byte` counts from its beginning."""

    def __init__(self, why: str, byte: int = 0):
        super().__init__(why)
        self.byte = byte


def refuse(on_bad: OnBad | None, error: DataError) -> None:
    if on_bad is None:
        raise error
    on_bad(error)


def no_field(field: str, there: Iterable[str]) -> str:
    names = [repr(name) for name in itertools.islice(there, 20)]
    hint = did_you_mean(field, there)
    return (
        f"there is no field {field!r} but {', '.join(names) or 'none at all'}; "
        f"give one with --data.text-field.{hint}"
    )


def make_record(cursor: int, position: int, content: bytes) -> Record:
    return Record(cursor, position, len(content), partial(_content_pieces, content))


def _content_pieces(content: bytes, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    stop = len(content) if stop is None else min(stop, len(content))
    for begin in range(start, stop, PIECE_BYTES):
        yield content[begin : min(begin + PIECE_BYTES, stop)]


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
    check_several(texts, where)
    for number, text in enumerate(texts, first):
        try:
            content = _to_bytes(text)
        except Flaw as flaw:
            refuse(on_bad, DataError(f"{where}: document {number:,} {flaw}{remedy}"))
        else:
            if content:
                yield make_record(number, number, content)


def check_several(texts: Iterable[str | bytes], where: str) -> None:
    if isinstance(texts, str | bytes):
        raise DataError(f"{where}: one {type(texts).__name__} was given; give a list of texts")


def _to_bytes(value: Any) -> bytes:
    if not isinstance(value, str | bytes):
        raise Flaw(f"is of type {type(value).__name__}; give str or bytes")
    try:
        return value.encode() if isinstance(value, str) else value
    except UnicodeEncodeError as error:
        raise Flaw(
            f"is no text at character {error.start}, which is half a surrogate pair; give bytes, "
            "such as text.encode(errors='replace')"
        ) from None
