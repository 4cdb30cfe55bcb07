"""Records of text files, JSON, JSONL, CSV and TSV."""

import codecs
import csv
import json
import os
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO

from gptjax.sources.opening import READ_BYTES, file_system, is_url, open_bytes, packing_of, reaching
from gptjax.sources.records import (
    PIECE_BYTES,
    SKIP,
    DataError,
    Flaw,
    OnBad,
    Record,
    make_record,
    no_field,
    refuse,
)

# Characters of a field of CSV. Without a limit, a quote that is never closed would take all that
# follows into memory, at four bytes a character.
FIELD_LIMIT = 1 << 28


# --- text --------------------------------------------------------------------------------------


def read_text(where: str, cursor: int, on_bad: OnBad | None) -> Iterator[Record]:
    if cursor > 0:  # past the only record
        return
    with open_bytes(where) as file:
        begin = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        stop = _size(where)
        if stop is None:
            file.seek(0)
            pieces = iter(partial(file.read, READ_BYTES), b"")
            try:
                stop = sum(map(len, pieces))
            except DataError as error:
                return refuse(on_bad, error)
    if stop > begin:
        yield Record(0, 0, stop - begin, partial(_file_pieces, where, begin, stop))


def _size(where: str) -> int | None:
    """The bytes of a text; None if only reading all of it tells, and whether it is whole."""
    if packing_of(where):
        return None
    if not is_url(where):
        return os.path.getsize(where)
    system, path = file_system(where)
    with reaching(where):
        return system.info(path)["size"]


def _file_pieces(
    where: str, begin: int, end: int, start: int = 0, stop: int | None = None
) -> Iterator[bytes]:
    """The bytes from start to stop of a text that is what a file holds from begin to end."""
    position = begin + start
    stop = end if stop is None else min(begin + stop, end)
    with open_bytes(where) as file:
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


def _while_readable(lines: Iterator[bytes], on_bad: OnBad | None) -> Iterator[bytes]:
    """The lines of a file; one that is cut short ends there, once that is told."""
    while True:
        try:
            line = next(lines, None)
        except DataError as error:
            return refuse(on_bad, error)
        if line is None:
            return
        yield line


def _bad_line(where: str, number: int, byte: int, why: str) -> DataError:
    unpacked = " unpacked" if packing_of(where) else ""
    return DataError(f"{where}:{number} (byte {byte:,}{unpacked}): {why}; mend it{SKIP}")


# --- JSON --------------------------------------------------------------------------------------


def read_jsonl(
    where: str, field: str, cursor: int, on_bad: OnBad | None, position: int | None
) -> Iterator[Record]:
    with open_bytes(where) as file:
        lines = _Lines(file)
        if cursor:
            lines.move(cursor, position)
        start, number = lines.offset, lines.number
        for line in _while_readable(lines, on_bad):
            try:
                content = _json_text(line, field)
            except Flaw as flaw:
                byte = lines.offset - len(line) + flaw.byte
                refuse(on_bad, _bad_line(where, number, byte, str(flaw)))
            else:
                if content:
                    yield make_record(start, number, content)
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
        raise Flaw(f"column {error.colno} is not JSON ({why})", byte) from None
    except RecursionError:
        raise Flaw("JSON in JSON, too deep to be read") from None
    except ValueError as error:  # a number of too many digits
        raise Flaw(f"not JSON that can be read ({error})") from None
    del text  # it may be large
    return _text_in(value, field, "the line")


def _text_in(value: Any, field: str, what: str) -> bytes:
    """The text of a record: its field, or the record itself; several strings are its lines."""
    if isinstance(value, dict):
        if field not in value:
            raise Flaw(no_field(field, value))
        value, what = value[field], f"the field {field!r}"
        if isinstance(value, list) and all(isinstance(line, str) for line in value):
            value = "\n".join(value)
    if not isinstance(value, str):
        raise Flaw(f"{what} is {_json_kind(value)}, not a string")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise Flaw(
            f"{what} is no text at character {error.start}, which is half a surrogate pair"
        ) from None


def _json_kind(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    return {dict: "an object", list: "a list", str: "a string"}.get(type(value), "a number")


def _not_utf8(line: bytes, byte: int) -> Flaw:
    return Flaw(f"byte 0x{line[byte]:02x} is not UTF-8", byte)


def read_json(where: str, field: str, cursor: int, on_bad: OnBad | None) -> Iterator[Record]:
    """The items of one list, which memory holds whole."""
    with open_bytes(where) as file:
        content = file.read()
        try:
            items = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: not JSON ({error or 'too deep to be read'}); mend it, or give "
                "--data.format jsonl if each of its lines is a record"
            ) from None
    del content  # it may be large
    if not isinstance(items, list):
        raise DataError(
            f"{where}: {_json_kind(items)}, but the records are taken from a list; give "
            "--data.format jsonl if each of its lines is a record"
        )
    for number, item in enumerate(items[cursor:], cursor):
        try:
            content = _text_in(item, field, "the item")
        except Flaw as flaw:
            error = DataError(f"{where}: item {number:,}: {flaw}; mend it{SKIP}")
            refuse(on_bad, error)
        else:
            if content:
                yield make_record(number, number, content)


# --- CSV ---------------------------------------------------------------------------------------


class _CsvLines(_Lines):
    """Lines as the csv module takes them; what is not UTF-8 is noted, with its byte."""

    flaw: tuple[int, Flaw] | None = None

    def __next__(self) -> str:
        line = super().__next__()
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            byte = self.offset - len(line) + error.start
            self.flaw = self.flaw or (byte, _not_utf8(line, error.start))
            return line.decode(errors="replace")


def read_csv(
    where: str, field: str, tabs: bool, cursor: int, on_bad: OnBad | None, position: int | None
) -> Iterator[Record]:
    """Of CSV and TSV. In TSV a quote is a character like any other, as IANA's definition has it."""
    csv.field_size_limit(FIELD_LIMIT)  # there is but one for all readers
    form = {"delimiter": ",", "strict": True}
    if tabs:
        form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    with open_bytes(where) as file:
        lines = _CsvLines(file)
        rows = csv.reader(lines, **form)
        try:
            header = next(rows, [])
        except csv.Error as error:
            raise DataError(f"{where}:1 (byte 0): not a header ({error})") from None
        if lines.offset == 0:  # an empty file
            return
        if field not in header:
            raise DataError(f"{where}:1 (byte 0): {no_field(field, header)}")
        column = header.index(field)
        if cursor:
            lines.move(cursor, position)
        while True:
            start, number, lines.flaw = lines.offset, lines.number, None
            try:
                row = next(rows)
            except StopIteration:
                return
            except DataError as error:  # the file is cut short
                return refuse(on_bad, error)
            except csv.Error as error:
                refuse(on_bad, _bad_line(where, number, start, str(error)))
                # A stray quote takes the lines after it along, so go on with the next one.
                lines.move(start, number)
                next(lines)
                continue
            if lines.flaw:
                byte, flaw = lines.flaw
                refuse(on_bad, _bad_line(where, number, byte, str(flaw)))
            elif row and len(row) != len(header):
                why = f"{len(row):,} fields, but the header names {len(header):,}"
                refuse(on_bad, _bad_line(where, number, start, why))
            elif row and row[column]:
                yield make_record(start, number, row[column].encode())
