"""Arguments to options: parsed by tyro, checked here."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tyro

from gptjax.cli.runs import Train, launch_problems
from gptjax.config import Config, Kind, did_you_mean, field_problems, kind_of, violations

T = TypeVar("T")


def parse(default: T, prog: str, arguments: Sequence[str]) -> tuple[T, list[str]]:
    """Options with the values that arguments give them, and all violations.

    Those are unknown options, values of a wrong kind, and rules of the config that do not hold.

    Raises:
      SystemExit: with code 0, after `--help`.
    """
    known = list(_options(type(default)))
    given, unknown = tyro.cli(
        type(default),
        prog=prog,
        default=default,
        args=_as_flags(arguments, known),
        registry=_lenient(),
        return_unknown_args=True,
    )
    unknown = [token for token in unknown if token.startswith("-")] or unknown
    problems = [_unknown(token, known) for token in unknown]
    if not hasattr(given, "config"):
        return given, [*problems, *field_problems(given).values()]
    wrong = field_problems(dataclasses.replace(given, config=Config()))
    problems += wrong.values()
    if not wrong and isinstance(given, Train):
        problems += launch_problems(given)
    task, options = given.config.task, [one.partition("=")[0] for one in arguments]
    if "--steps" in options and getattr(task, "epochs", None) is not None:
        problems.append(
            f"--steps {given.config.steps}, but task.epochs = {task.epochs}: give --task.epochs "
            "None with --steps, or epochs alone"
        )
    # `train` takes the model over, and applies its rules then.
    taken_over = isinstance(given, Train) and given.config.init_from and task.kind
    return given, problems + violations(given.config, settled=not taken_over)


def _lenient() -> tyro.constructors.ConstructorRegistry:
    """Rules by which a value that is not of its field's kind stays text.

    tyro would stop at the first such value. So they all reach the checks, which name them together.
    """
    registry = tyro.constructors.ConstructorRegistry()
    words = {int: "INT", float: "FLOAT", str: "TEXT"}

    def word(kind: Kind) -> str:
        if kind.base is not tuple:
            return "|".join(kind.choices) or words[kind.base]
        if dataclasses.is_dataclass(kind.items[0]):
            return "(in FILE.py)"
        each = " ".join(word(kind_of(item)) for item in kind.items)
        return f"[{each} ...]" if kind.many else each

    @registry.primitive_rule
    def value(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec | None:
        kind = kind_of(info.type)
        if kind.base is not tuple and kind.base not in words:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1 if tyro.conf.Positional in info.markers and kind.base is not tuple else "*",
            metavar=f"{word(kind)}|None" if kind.optional else word(kind),
            instance_from_str=lambda texts: _value(texts, kind),
            is_instance=kind.takes,
            str_from_instance=lambda given: [*_texts(given)],
        )

    return registry


def _value(texts: list[str], kind: Kind) -> Any:
    """What texts stand for in a field of a kind; where that is nothing, the texts themselves."""
    if kind.optional and texts == ["None"]:
        return None
    if kind.base is tuple:
        inner = kind_of(kind.items[0])
        if kind.many and inner.base is tuple:  # pairs, written one after the other
            size = len(inner.items)
            return tuple(_value(texts[i : i + size], inner) for i in range(0, len(texts), size))
        kinds = [inner] * len(texts) if kind.many else map(kind_of, kind.items)
        known = tuple(_value([text], one) for text, one in zip(texts, kinds, strict=False))
        return known + tuple(texts[len(known) :])
    if len(texts) != 1:
        return tuple(texts)
    try:
        return kind.base(texts[0])
    except (TypeError, ValueError):
        return texts[0]


def _texts(given: Any) -> Iterator[str]:
    """The texts that stand for a value; of a store of a mixture its name."""
    for item in given if isinstance(given, tuple) else [getattr(given, "name", given)]:
        if isinstance(item, tuple) or dataclasses.is_dataclass(item):
            yield from _texts(item)
        else:
            yield str(item)


def _options(dataclass_type: type, prefix: str = "") -> Iterator[str]:
    """The options that tyro makes of a dataclass."""
    for field in dataclasses.fields(dataclass_type):
        base, name = kind_of(field.type).base, field.name.replace("_", "-")
        if dataclasses.is_dataclass(base):
            yield from _options(base, "" if base is Config else f"{prefix}{name}.")
        elif tyro.conf.Positional not in getattr(field.type, "__metadata__", ()):
            yield f"--{prefix}{name}"
            if base is bool:
                yield f"--{prefix}no-{name}"


def _as_flags(arguments: Sequence[str], options: list[str]) -> list[str]:
    """Arguments with switches as tyro takes them: `--x True` and `--x=True` as `--x`, and what is
    False as `--no-x`.
    """
    found: list[str] = []
    for before, token in itertools.pairwise(["", *arguments]):
        option, _, value = token.partition("=")
        if not value:
            option, value = before, token
        section, dot, name = option.replace("_", "-").removeprefix("--").rpartition(".")
        off = f"--{section}{dot}no-{name}"
        if value not in ("True", "False") or off not in options:
            found.append(token)
            continue
        if token == value:
            found.pop()
        found.append(option if value == "True" else off)
    return found


def _unknown(token: str, options: list[str]) -> str:
    if not token.startswith("-"):
        return f"{token!r}: one argument too many"
    option = token.partition("=")[0]
    name = option.replace("_", "-")
    same = [known for known in options if known.endswith(f".{name.strip('-')}")]  # less its section
    return f"{option}: there is no such option.{did_you_mean(same[0] if same else name, options)}"
