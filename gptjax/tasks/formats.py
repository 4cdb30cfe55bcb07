"""The records of a labelled file, by its format."""

import codecs
import collections
import csv
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gptjax.config import TaskConfig, did_you_mean
from gptjax.sources import DataError, Source, needed, open_bytes, packing_of
from gptjax.sources.lines import FIELD_LIMIT
from gptjax.sources.tables import open_parquet
from gptjax.tasks.cells import NUMBER, Record, kind_of_value
from gptjax.tasks.problems import Problems
from gptjax.tasks.tags import plain_tag

MOST_UNCLOSED = 100  # quotes of a table that are not closed
MARKUP = (".sgm", ".sgml", ".tmx", ".xlf", ".xml")  # endings of what is no text in lines
_QUOTED = re.compile(r'"[^"]+"')  # a name of a column that is in quotes


def _lines(file: BinaryIO, where: str, problems: Problems) -> Iterator[tuple[int, str | None]]:
    """The lines of a file with their numbers, without their ends; None for one that is not
    UTF-8, which is told.
    """
    for number, line in enumerate(file, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        try:
            yield number, line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            problems.read += 1
            _tell_not_utf8(error, f"{where}:{number}", problems)
            yield number, None


def _tell_not_utf8(error: UnicodeDecodeError, where: str, problems: Problems) -> None:
    why = f"byte 0x{error.object[error.start]:02x} at {error.start} is not UTF-8; perhaps "
    why += f"`iconv -f {_perhaps(error.object)} -t UTF-8` makes it so"
    problems.bad("not UTF-8", where, why)


def _perhaps(content: bytes) -> str:
    """An encoding that bytes may be in, as iconv calls it."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        return "UTF-16"
    try:  # pairs of bytes that are both beyond ASCII, as single accents are not
        content.decode("gb2312")
    except UnicodeDecodeError:
        return "CP1252"
    return "GB18030"


def jsonl_records(where: str, problems: Problems) -> Iterator[Record]:
    """A record for each line of JSON."""
    with open_bytes(where) as file:
        for number, line in _lines(file, where, problems):
            if line is None or not line.strip():
                continue
            problems.read += 1
            try:
                yield Record(f"{where}:{number}", json.loads(line))
            except (ValueError, RecursionError) as error:
                why = str(error) or "too deep to be read"
                problems.bad("not JSON", f"{where}:{number}", why)


def _has_header(config: TaskConfig) -> bool:
    """Whether the first line of a table names its columns."""
    return config.header == "yes" or (config.header == "auto" and not by_number(config))


def by_number(config: TaskConfig) -> bool:
    """Whether columns are given, and all by their number."""
    names = ("text", "second", "label", "source", "target")
    fields = {f"{name}_column": getattr(config, f"{name}_column") for name in names}
    given = [one for name, one in fields.items() if one != getattr(TaskConfig(), name)]
    given += config.label_columns
    return bool(given) and all(NUMBER.fullmatch(one or "") for one in given)


class _TextLines:
    """The lines of a table as the csv module takes them, of which some may come again."""

    def __init__(self, file: BinaryIO, where: str, problems: Problems):
        self._lines = _lines(file, where, problems)
        self._taken: list[tuple[int, str | None]] = []  # of the record
        self._again: collections.deque[tuple[int, str | None]] = collections.deque()
        self.number = 0  # of the last one

    def begin(self) -> int:
        """A record begins; the number of its first line."""
        self._taken = []
        return self.number + 1

    @property
    def broken(self) -> bool:
        """Whether a line of the record is not UTF-8."""
        return any(line is None for _, line in self._taken)

    def give_back(self) -> None:
        """The lines of the record but the first come again."""
        self._again.extendleft(reversed(self._taken[1:]))
        self.number = self._taken[0][0]

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        one = self._again.popleft() if self._again else next(self._lines)
        self._taken.append(one)
        self.number = one[0]
        return f"{one[1] or ''}\n"


def table_records(
    where: str, config: TaskConfig, problems: Problems, *, tabs: bool
) -> Iterator[Record]:
    """Of CSV and, with tabs, TSV, in which a quote is a character like any other."""
    csv.field_size_limit(FIELD_LIMIT)  # there is but one for all readers
    form = {"delimiter": config.delimiter or ",", "strict": True}
    if tabs and config.delimiter is None:
        form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    with open_bytes(where) as file:
        lines = _TextLines(file, where, problems)
        rows, names, width, unclosed = csv.reader(lines, **form), None, 0, 0
        while True:
            first = lines.begin()
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                problems.read += 1
                why = str(error)
                if "unexpected end" in why:
                    why, unclosed = "a quote that is not closed before the file ends", unclosed + 1
                if unclosed > MOST_UNCLOSED:  # each time all that follows is read
                    raise DataError(
                        f"{where}:{first}: {why}, and so for {MOST_UNCLOSED} lines before: double "
                        "the quotes that are text, or save it as TSV"
                    ) from error
                if lines.number > first:
                    why += f"; lines {first + 1:,} to {lines.number:,} are read without it"
                problems.bad("not CSV", f"{where}:{first}", why)
                lines.give_back()  # the quote may be one of the text's
                continue
            if not row or lines.broken:
                continue
            width, before = width or len(row), width
            if not before and _has_header(config):
                names = row
                if tabs and config.delimiter is None and all(map(_QUOTED.fullmatch, names)):
                    raise DataError(
                        f"{where}:{first}: the names of columns are in quotes, which are text in "
                        "TSV: give --task.delimiter $'\\t', with which cells may have quotes"
                    )
                twice = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
                if twice:
                    raise DataError(
                        f"{where}:{first}: more than one column is called {twice[0]!r}: rename all "
                        "but one, or give numbers of columns and --task.header no without this line"
                    )
                continue
            problems.read += 1
            if len(row) == width:
                value = row if names is None else dict(zip(names, row, strict=True))
                yield Record(f"{where}:{first}", value)
            else:
                why = f"{len(row):,} columns, but the "
                why += f"first line has {width:,}" if names is None else f"header names {width:,}"
                problems.bad("wrong number of columns", f"{where}:{first}", why)


def conll_records(where: str, config: TaskConfig, problems: Problems) -> Iterator[Record]:
    """A record for each sentence: a list of its words, each the line's number and its columns.

    The first line that does not begin with `#` says whether columns have tabs between them or
    blanks, and how many there are. A line with another number of them spoils its sentence, unless
    it begins with `#`: then it is a comment. Lines of -DOCSTART- end a sentence. Where words are
    not in the first column, that numbers them as CoNLL-U does, and lines for several words at once,
    3-4, or for none, 3.1, are left out.
    """
    numbered = config.text_column not in (None, "1")
    with open_bytes(where) as file:
        lines = _lines(file, where, problems)
        held, like = [], ""
        for number, line in lines:
            held.append((number, line))
            if line and line.strip() and not line.startswith(("#", "-DOCSTART-")):
                like = line
                break
        else:
            like = next((line for _, line in held if line and line.strip()), "")
        split = _by_tabs if "\t" in like else _by_blanks
        width = len(split(like))
        words: list[tuple[int, list[str]]] = []
        first, whole = 0, True

        def sentence() -> Iterator[Record]:
            if words and whole:
                problems.read += 1
                yield Record(f"{where}:{first}", words)

        for number, line in itertools.chain(held, lines):
            if line is None:
                whole = False
                continue
            if not line.strip() or line.startswith("-DOCSTART-"):
                yield from sentence()
                words, whole = [], True
                continue
            columns = split(line)
            if line.startswith("#") and _is_comment(line, columns, width, config, bool(words)):
                continue
            if len(columns) != width:
                if whole:
                    problems.read += 1
                    why = f"{len(columns):,} columns, but the first line of words has {width:,}"
                    problems.bad("wrong number of columns", f"{where}:{number}", why)
                whole = False
                continue
            if numbered and re.fullmatch(r"\d+[-.]\d+", columns[0]):
                continue
            first = first if words else number
            words.append((number, columns))
        yield from sentence()


def _by_tabs(line: str) -> list[str]:
    return line.split("\t")


def _by_blanks(line: str) -> list[str]:
    """Other white space may be a word."""
    return re.split(r"[ \t]+", line.rstrip(" \t"))


def _is_comment(
    line: str, columns: list[str], width: int, config: TaskConfig, inside: bool
) -> bool:
    """Whether a line with `#` at its beginning is one, and no word. As many columns as words have
    are by chance before a sentence, after `# ` or `## `, if the last of them cannot be a tag, as
    one with a blank in it.
    """
    if len(columns) != width:
        return True
    if inside or width == 1 or not re.match(r"##?[ \t]", line):
        return False
    return " " in columns[-1].strip() or plain_tag(columns[-1], config.scheme) is None


def _pairs(sources: Sequence[Source], label: str) -> list[tuple[Source, Source]]:
    """Files that belong together: each two in turn.

    Raises:
      DataError: if they cannot, as where a folder has a text in more than two languages.
    """
    if len(sources) % 2:
        raise DataError(
            f"{label}: {len(sources)} files, but parallel text comes in pairs: give the file of "
            "the given texts, then that of what is to be written, and so on"
        )
    pairs = list(zip(sources[::2], sources[1::2], strict=True))
    before: dict[str, tuple[Source, Source]] = {}
    for pair in pairs:
        bare = [Path(one.where.removesuffix(packing_of(one.where))) for one in pair]
        for one, path in zip(pair, bare, strict=True):
            if path.suffix.lower() in MARKUP:
                raise DataError(
                    f"{label}: {one.where}: markup, whose lines are not sentences: take these out "
                    "of it, one a line"
                )
        if bare[0].with_suffix("") != bare[1].with_suffix(""):
            continue
        first = before.setdefault(str(bare[0].with_suffix("")), pair)
        if not {one.where for one in first} & {one.where for one in pair}:
            raise DataError(
                f"{label}: {pair[0].where} would belong to {pair[1].where}, but {first[0].where} "
                f"to {first[1].where}: give two languages, the given texts first, as in "
                "--task.train x.de x.en"
            )
    return pairs


def parallel_records(
    sources: Sequence[Source], problems: Problems, *, labelled: bool
) -> Iterator[Record]:
    """Lines of two files in turn that belong together; without labels one file is enough."""
    if len(sources) == 1 and not labelled:
        (only,) = sources
        with open_bytes(only.where) as file:
            for number, text in _lines(file, only.where, problems):
                if text is not None:
                    problems.read += 1
                    yield Record(f"{only.where}:{number}", {"source": text})
        return
    for one, other in _pairs(sources, problems.split):
        with open_bytes(one.where) as left, open_bytes(other.where) as right:
            both = itertools.zip_longest(
                _lines(left, one.where, problems), _lines(right, other.where, problems)
            )
            for source, target in both:
                if source is None or target is None:
                    number, shorter = (source or target)[0], one if source is None else other
                    raise DataError(
                        f"{shorter.where}: ends before line {number:,}, which its partner has: "
                        "lines must belong together"
                    )
                if source[1] is not None and target[1] is not None:
                    problems.read += 1
                    value = {"source": source[1], "target": target[1]}
                    if re.fullmatch(r"\s*<[^<>]+>.*", source[1] or target[1]):
                        why = f"{source[1][:80]!r}; take such lines out of both files"
                        problems.note("perhaps markup", f"{one.where}:{source[0]}", why, "kept")
                    yield Record(f"{one.where}:{source[0]}", value)


# --- files that memory holds -------------------------------------------------------------------


def folder_records(source: Source, problems: Problems, *, below: bool) -> Iterator[Record]:
    """The text of a file, and the name of the folder that it lies in as its label.

    Args:
      below: whether the given folder has others, which are the labels.
    """
    problems.read += 1
    if below and "/" not in source.name:
        why = "lies beside the folders that are labels: give each of these, and not what is above"
        problems.bad("no label", source.where, why)
        return
    with open_bytes(source.where) as file:
        content = file.read().removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        _tell_not_utf8(error, source.where, problems)
        return
    folder = os.path.basename(os.path.dirname(os.path.abspath(source.where)))
    yield Record(source.where, {"text": text, "label": folder})


def whole_records(where: str, kind: str, key: str, problems: Problems) -> Iterator[Record]:
    """The items of a list in JSON or YAML, which may be the value of a key."""
    value = load_whole(where, kind)
    if key:
        if not isinstance(value, dict) or key not in value:
            there = value if isinstance(value, dict) else ()
            raise DataError(
                f"{where}@{key}: there is no key {key!r} but "
                f"{', '.join(map(repr, there)) or 'none at all'}.{did_you_mean(key, there)}"
            )
        value = value[key]
    if not isinstance(value, list):
        keys = f"; its keys are {', '.join(map(repr, value))}" if isinstance(value, dict) else ""
        raise DataError(
            f"{where}: {kind_of_value(value)}, but records come in a list: give {where}@KEY{keys}"
        )
    for number, item in enumerate(value, 1):
        problems.read += 1
        yield Record(f"{where}: item {number}", item)


def load_whole(where: str, kind: str) -> Any:
    """The value of a file of JSON or YAML."""
    with open_bytes(where) as file:
        content = file.read()
    if kind == "yaml":
        yaml = needed("yaml", "tasks", where)
        try:
            return yaml.safe_load(content)
        except yaml.YAMLError as error:
            raise DataError(f"{where}: not YAML ({error}); mend it") from None
    try:
        return json.loads(content.removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not JSON ({error or 'too deep to be read'}); mend it, or give "
            "--task.file-format jsonl if each of its lines is a record"
        ) from None


def parquet_records(where: str, problems: Problems) -> Iterator[Record]:
    """A record for each row, read in batches."""
    with open_parquet(where) as table:
        batches = (batch.to_pylist() for batch in table.iter_batches(1024))
        yield from numbered_rows(where, itertools.chain.from_iterable(batches), problems)


def numbered_rows(where: str, rows: Iterable[Any], problems: Problems) -> Iterator[Record]:
    """A record for each row of a table that a library reads."""
    for number, value in enumerate(rows, 1):
        problems.read += 1
        yield Record(f"{where}: row {number}", value)
