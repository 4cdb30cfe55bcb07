"""Records of labelled files, one after the other: their columns, and where each lies."""

import codecs
import collections
import csv
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gptjax.config import DataConfig, TaskConfig, did_you_mean
from gptjax.sources import (
    DataError,
    Source,
    expand,
    needed,
    open_bytes,
    packing_of,
    refuse_unreadable,
)
from gptjax.sources.lines import FIELD_LIMIT
from gptjax.sources.tables import open_parquet, rows_of_hf, rows_of_tfds
from gptjax.tasks.problems import Problems
from gptjax.tasks.tags import plain_tag

NUMBER = re.compile(r"-?[1-9]\d*")  # of a column
MARKUP = (".sgm", ".sgml", ".tmx", ".xlf", ".xml")


class Record(NamedTuple):
    """A line of a table, an item of JSON, or a sentence in columns."""

    where: str  # what a message says of it: FILE:LINE, or FILE: item NUMBER
    value: Any  # an object by column, or a list


class Flaw(ValueError):
    """Why a record cannot be used."""

    def __init__(self, kind: str, why: str):
        super().__init__(why)
        self.kind = kind


def read_records(
    config: TaskConfig, paths: Iterable[str], problems: Problems, *, labelled: bool = True
) -> Iterator[Record]:
    """The records of all files, in order. A file is read as it goes, but for JSON and YAML.

    Args:
      labelled: False: of parallel text the given texts may be alone.
    Raises:
      DataError: for a path that is not there, or a file that cannot be read at all.
    """
    files = list(find_files(config, paths, problems.split))
    if config.file_format == "parallel":
        yield from _parallel(files, problems, labelled)
        return
    roots = {_root(source) for source, *_ in files if "/" in source.name}
    for source, kind, key in files:
        match kind:
            case "folders":
                records = _text_of_folder(source, _root(source) in roots, problems)
            case "tsv" | "csv":
                records = _table(source.where, kind == "tsv", config, problems)
            case "jsonl":
                records = _jsonl(source.where, problems)
            case "json" | "yaml":
                records = _whole(source.where, kind, key, problems)
            case "parquet":
                records = _parquet(source.where, problems)
            case "conll":
                records = _conll(source.where, config, problems)
            case "hf":
                records = _rows(source.where, rows_of_hf(source.where), problems)
            case "tfds":
                rows = rows_of_tfds(source.where, source.tfds_dir)
                records = _rows(source.where, rows, problems)
            case _:
                raise DataError(
                    f"{problems.split}: {source.where}: labelled records are not read of a "
                    f"{kind}: give a file of JSONL, or another format of --task.file-format"
                )
        yield from records


def read_examples(
    config: TaskConfig,
    paths: Iterable[str],
    problems: Problems,
    make: Callable[[Record], Any],
    *,
    labelled: bool = True,
) -> Iterator[Any]:
    """What `make` makes of each record; one in which it finds a flaw is told of, and left out.
    For `labelled` see `read_records`.

    Raises:
      DataError: as `read_records` does.
    """
    for record in read_records(config, paths, problems, labelled=labelled):
        try:
            example = make(record)
        except Flaw as flaw:
            problems.bad(flaw.kind, record.where, str(flaw))
        else:
            yield example


def find_files(
    config: TaskConfig, paths: Iterable[str], label: str
) -> Iterator[tuple[Source, str, str]]:
    """The files that paths name, their formats, and the keys after an `@`."""
    paths = tuple(paths)
    if not paths:
        raise DataError(f"{label} is empty: give files of labelled examples")
    for given in paths:
        path, _, key = given.rpartition("@")
        if not path or os.path.exists(given) or given.startswith("tfds:"):
            path, key = given, ""
        instead = "say what it is with --task.file-format" if config.file_format == "auto" else None
        sources = expand(path, label, DataConfig())
        below = os.path.isdir(path) and any("/" in source.name for source in sources)
        below = below or (len(paths) > 1 and all(map(os.path.isdir, paths)))
        for source in sources:
            refuse_unreadable(source, label, instead)
            yield source, _format(config, source, below), key


def _format(config: TaskConfig, source: Source, below: bool) -> str:
    """Args:
    below: whether there are folders below the given one, or several are given.
    """
    if config.file_format != "auto":
        return config.file_format
    bare = source.name.removesuffix(packing_of(source.name))
    if Path(bare).suffix.lower() in (".yml", ".yaml"):
        return "yaml"
    # A word and its tag in each line are a table by name alone.
    if source.kind == "tsv" and config.kind == "entities" and config.header != "yes":
        return "conll"
    if source.kind != "text":
        return source.kind
    columns = ("text_column", "second_column", "label_column", "label_columns")
    if config.kind == "classify" and below and not any(getattr(config, one) for one in columns):
        return "folders"
    return {"entities": "conll", "questions": "json"}.get(config.kind, "tsv")


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


# --- cells -------------------------------------------------------------------------------------


def cell(value: Any, column: str) -> Any:
    """What a record has in a column; `a.b` is column b of the object in column a.

    Raises:
      Flaw: if there is no such column.
    """
    if isinstance(value, dict) and column in value:
        return value[column]
    outer, dot, inner = column.partition(".")
    if dot and isinstance(value, dict) and isinstance(value.get(outer), dict):
        return cell(value[outer], inner)
    if not isinstance(value, dict | list):
        raise Flaw("no such column", f"{kind_of_value(value)}, which has no columns")
    items = list(value.values()) if isinstance(value, dict) else value
    if NUMBER.fullmatch(column):
        number = int(column)
        if abs(number) <= len(items):
            return items[number - 1 if number > 0 else number]
        raise Flaw("no such column", f"it has {len(items)} columns, and none is {column}")
    if isinstance(value, dict):
        names = ", ".join(map(repr, itertools.islice(value, 20))) or "none at all"
        hint = did_you_mean(column, value)
        for name, one in value.items():
            if isinstance(one, dict) and one and not hint:
                hint = f" What is in {name!r} is called as {f'{name}.{next(iter(one))}'!r}."
        raise Flaw("no such column", f"there is no column {column!r} but {names}.{hint}")
    raise Flaw(
        "no such column",
        f"its columns have no names: give a number for {column!r}, or --task.header yes if the "
        "first line names them",
    )


def text_in(value: Any, column: str, *, empty: bool = False) -> str:
    """The text in a column.

    Raises:
      Flaw: if that is no text, or an empty one where that is not allowed.
    """
    text = cell(value, column)
    if isinstance(text, int | float) and not isinstance(text, bool) and text == text:
        text = str(text)
    if not isinstance(text, str):
        raise Flaw("no text", f"column {column!r} is {kind_of_value(text)}, not a string")
    return sound(text, column, empty=empty)


def sound(text: str, what: str, *, empty: bool = False) -> str:
    """The text, if it can be encoded and says something.

    Raises:
      Flaw: otherwise.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Flaw("no text", f"{what!r} has half a surrogate pair at {error.start}") from None
    if not empty and not text.strip():
        raise Flaw("empty text", f"{what!r} is empty")
    return text


def kind_of_value(value: Any) -> str:
    if value is None or isinstance(value, bool) or value != value:
        return json.dumps(value)
    return {dict: "an object", list: "a list", str: "a string"}.get(type(value), "a number")


# --- lines -------------------------------------------------------------------------------------


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


def _jsonl(where: str, problems: Problems) -> Iterator[Record]:
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


_QUOTED = re.compile(r'"[^"]+"')
MOST_UNCLOSED = 100  # quotes of a table that are not closed


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


def _table(where: str, tabs: bool, config: TaskConfig, problems: Problems) -> Iterator[Record]:
    """Of CSV and TSV. In TSV a quote is a character like any other."""
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


def _conll(where: str, config: TaskConfig, problems: Problems) -> Iterator[Record]:
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


def _parallel(
    files: list[tuple[Source, str, str]], problems: Problems, labelled: bool
) -> Iterator[Record]:
    """Lines of two files in turn that belong together; without labels one file is enough."""
    if len(files) == 1 and not labelled:
        ((only, *_),) = files
        with open_bytes(only.where) as file:
            for number, text in _lines(file, only.where, problems):
                if text is not None:
                    problems.read += 1
                    yield Record(f"{only.where}:{number}", {"source": text})
        return
    if len(files) % 2:
        raise DataError(
            f"{problems.split}: {len(files)} files, but parallel text comes in pairs: give the "
            "file of the given texts, then that of what is to be written, and so on"
        )
    sources = [source for source, *_ in files]
    pairs = list(zip(sources[::2], sources[1::2], strict=True))
    bare = [[one.name.removesuffix(packing_of(one.name)) for one in pair] for pair in pairs]
    endings = [[Path(name).suffix for name in names] for names in bare]
    for pair, found in zip(pairs, endings, strict=True):
        for one, ending in zip(pair, found, strict=True):
            if ending in MARKUP:
                raise DataError(
                    f"{problems.split}: {one.where}: markup, whose lines are not sentences: take "
                    "these out of it, one a line"
                )
        if found != endings[0]:
            raise DataError(
                f"{problems.split}: {pair[0].where} would belong to {pair[1].where}, but "
                f"{pairs[0][0].where} to {pairs[0][1].where}: give the two files of each pair, the "
                "given texts first, as in --task.train a.de a.en b.de b.en"
            )
    for one, other in pairs:
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


def _root(source: Source) -> str:
    """The folder that a source's name begins below."""
    return source.where.removesuffix(source.name)


def _text_of_folder(source: Source, below: bool, problems: Problems) -> Iterator[Record]:
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


def _whole(where: str, kind: str, key: str, problems: Problems) -> Iterator[Record]:
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


def _parquet(where: str, problems: Problems) -> Iterator[Record]:
    with open_parquet(where) as table:
        batches = (batch.to_pylist() for batch in table.iter_batches(1024))
        yield from _rows(where, itertools.chain.from_iterable(batches), problems)


def _rows(where: str, rows: Iterable[Any], problems: Problems) -> Iterator[Record]:
    for number, value in enumerate(rows, 1):
        problems.read += 1
        yield Record(f"{where}: row {number}", value)
