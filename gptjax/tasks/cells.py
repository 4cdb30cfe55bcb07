"""Records of labelled files, and what is in their columns."""

import itertools
import json
import re
from typing import Any, NamedTuple

from gptjax.config import did_you_mean

NUMBER = re.compile(r"-?[1-9]\d*")  # of a column


class Record(NamedTuple):
    """A line of a table, an item of JSON, or a sentence in columns."""

    where: str  # what a message says of it: FILE:LINE, or FILE: item NUMBER
    value: Any  # an object by column, or a list


class Flaw(ValueError):
    """Why a record cannot be used."""

    def __init__(self, kind: str, why: str):
        super().__init__(why)
        self.kind = kind


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
