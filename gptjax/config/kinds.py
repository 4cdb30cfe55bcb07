"""What a field of a config may have, and what is said of one that has something else."""

import dataclasses
import difflib
import reprlib
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A config that cannot run: for each violation what was given, what is allowed, what to do."""


class Range(NamedTuple):
    """The values that a number may have, both ends included."""

    least: float
    most: float


# Counts fit the int32 in which devices count.
Count = Annotated[int, Range(1, 2**31 - 1)]
Whole = Annotated[int, Range(0, 2**31 - 1)]
Positive = Annotated[float, Range(1e-30, 1e30)]
NotNegative = Annotated[float, Range(0.0, 1e30)]
Finite = Annotated[float, Range(-1e30, 1e30)]
Share = Annotated[float, Range(0.0, 0.9999999)]  # a part, never the whole
Probability = Annotated[float, Range(1e-30, 1.0)]


def refuse(problems: list[str]) -> None:
    """Raise one ConfigError that lists all problems, if there are any."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n  - ".join([f"{len(problems)} problems", *problems]))


class Kind(NamedTuple):
    """What a field takes."""

    base: type  # int, float, bool, str, tuple or a dataclass
    choices: tuple[str, ...]  # of a string; () for any
    optional: bool  # None as well
    limits: Range | None
    items: tuple[Any, ...] = ()  # of a tuple: the annotation of each place, or of `many` items
    many: bool = False  # of a tuple: any number of items

    def __str__(self) -> str:
        noun = {
            int: "a whole number",
            float: "a number",
            bool: "True or False",
            str: "a string",
            tuple: f"({', '.join(str(kind_of(item)) for item in self.items)})",
        }.get(self.base, f"a gptjax.{self.base.__name__}")
        if self.many:
            strings = "a tuple of strings, such as ('text.txt',)"
            noun = strings if self.items == (str,) else f"a tuple, each item {noun[1:-1]}"
        if self.choices:
            noun = "one of " + ", ".join(map(repr, self.choices))
        if self.limits:
            noun += f" from {self.limits.least:.12g} to {self.limits.most:.12g}"
        return f"{noun}, or None" if self.optional else noun

    def takes(self, value: Any) -> bool:
        """Whether a field of this kind may have the value; `many` items are not looked at."""
        if value is None:
            return self.optional
        if self.base is tuple:
            if not isinstance(value, tuple) or self.many:
                return isinstance(value, tuple)
            return len(value) == len(self.items) and all(
                kind_of(inner).takes(item) for inner, item in zip(self.items, value, strict=True)
            )
        if isinstance(value, bool) and self.base is not bool:
            return False
        if not isinstance(value, (int, float) if self.base is float else self.base):
            return False
        if self.limits and not self.limits.least <= value <= self.limits.most:  # NaN is not either
            return False
        return not self.choices or value in self.choices


def kind_of(annotation: Any) -> Kind:
    """The kind that a field's annotation stands for."""
    options = [annotation]
    if get_origin(annotation) in (Union, types.UnionType):
        options = [option for option in get_args(annotation) if option is not types.NoneType]
    inner, limits = options[0], None
    if get_origin(inner) is Annotated:
        inner, *notes = get_args(inner)
        limits = next((note for note in notes if isinstance(note, Range)), None)
    choices = get_args(inner) if get_origin(inner) is Literal else ()
    base = str if choices else get_origin(inner) or inner
    items = get_args(inner) if base is tuple else ()
    many = items[-1:] == (...,)
    return Kind(base, choices, options != [annotation], limits, items[: 1 if many else None], many)


def field_problems(value: Any, annotation: Any = None, path: str = "") -> dict[str, str]:
    """The violations of each field's kind, by the field's path.

    Args:
      value: a dataclass, or with `annotation` the value of a field of it.
    """
    kind = kind_of(annotation or type(value))
    if not kind.takes(value):
        near = did_you_mean(value, kind.choices)
        return {
            path: f"{path or 'config'} = {reprlib.repr(value)}: must be {kind}{near and '.' + near}"
        }
    problems = {}
    for i, item in enumerate((value or ()) if kind.many else ()):
        problems |= field_problems(item, kind.items[0], f"{path}[{i}]")
    if dataclasses.is_dataclass(kind.base):
        for name, inner in get_type_hints(kind.base, include_extras=True).items():
            below = f"{path}.{name}".lstrip(".")
            problems |= field_problems(getattr(value, name), inner, below)
    return problems


def did_you_mean(given: object, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the allowed name nearest to a given one, or nothing."""
    near = difflib.get_close_matches(str(given), list(allowed), n=5)
    near.sort(key=lambda name: _edits(str(given), name))
    return f" Did you mean {near[0]!r}?" if near else ""


def _edits(one: str, other: str) -> int:
    """How many letters to leave out, put in, replace, or swap with the next, turn one into the
    other.
    """
    last: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, last, row = last, row, [i]
        for j, wanted in enumerate(other, 1):
            row.append(min(row[-1] + 1, last[j] + 1, last[j - 1] + (letter != wanted)))
            if i > 1 and j > 1 and (one[i - 2], letter) == (wanted, other[j - 2]):
                row[-1] = min(row[-1], before[j - 2] + 1)
    return row[-1]
