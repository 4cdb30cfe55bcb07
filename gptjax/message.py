"""Values as text and back, for processes that work together.

Text is JSON, so nothing in it can do more than make values: numbers, text, bytes, paths, lists,
tuples and dicts of them, and by their names our own functions, classes and errors.
"""

import base64
import dataclasses
import importlib
import inspect
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

OWN = re.compile(r"(gptjax(?:\.\w+)*):(\w+)")


def to_text(value: Any) -> str:
    """The value as text.

    A class of ours is a NamedTuple, a dataclass, or says by `__reduce__` which arguments make it.

    Raises:
      TypeError: for a value of another kind.
    """
    return json.dumps(_plain(value))


def from_text(text: str | bytes) -> Any:
    """The value that became the text.

    Raises:
      ValueError: for other text, and for the name of what is not ours.
    """
    return _value(json.loads(text))


def _plain(value: Any) -> Any:
    """What JSON has a form for. Its objects have one key, which says what they stand for."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case bytes():
            return {"bytes": base64.b64encode(value).decode()}
        case Path():
            return {"path": str(value)}
        case partial():
            return {"partial": _plain([value.func, [*value.args], value.keywords])}
        case OSError():  # its class follows from its number
            where = value.filename and str(value.filename)
            given = [value.errno, value.strerror, where] if value.errno else [str(value)]
            return {"os error": given}
        case BaseException() if _is_own(type(value)):
            return {"made": [_name(type(value)), [str(value)]]}
        case BaseException():
            return {"error": f"{type(value).__name__}: {value}"}
        case list():
            return [_plain(item) for item in value]
        case dict():
            return {"dict": [[_plain(key), _plain(item)] for key, item in value.items()]}
        case tuple() if type(value) is tuple:
            return {"tuple": [_plain(item) for item in value]}
    if inspect.isfunction(value) and _is_own(value):
        return {"function": _name(value)}
    if _is_own(type(value)):
        return {"made": [_name(type(value)), [_plain(item) for item in _arguments(value)]]}
    raise TypeError(f"{value!r} has no form as text")


def _arguments(value: Any) -> tuple:
    """What makes an equal value when its class is called with it."""
    if isinstance(value, tuple):
        return tuple(value)
    if dataclasses.is_dataclass(value):
        return tuple(getattr(value, one.name) for one in dataclasses.fields(value))
    return value.__reduce__()[1]


def _value(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_value(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    match kind:
        case "bytes":
            return base64.b64decode(content)
        case "path":
            return Path(content)
        case "tuple":
            return tuple(_value(item) for item in content)
        case "dict":
            return {_value(key): _value(item) for key, item in content}
        case "function":
            return _own(content)
        case "partial":
            function, given, named = _value(content)
            return partial(function, *given, **named)
        case "made":
            kind, given = _own(content[0]), [_value(item) for item in content[1]]
            if not dataclasses.is_dataclass(kind):
                return kind(*given)
            names = (one.name for one in dataclasses.fields(kind))
            return kind(**dict(zip(names, given, strict=True)))
        case "os error":
            return OSError(*content)
        case "error":
            return RuntimeError(content)
    raise ValueError(f"{kind!r} is no kind of value")


def _is_own(thing: Any) -> bool:
    """Whether another process finds a class or function by its name in this package."""
    return bool(OWN.fullmatch(_name(thing)))


def _name(thing: Any) -> str:
    return f"{thing.__module__}:{thing.__qualname__}"


def _own(name: str) -> Any:
    """The class or function of this package that has a name."""
    match = OWN.fullmatch(name)
    if not match:
        raise ValueError(f"{name!r} is not of gptjax")
    found = getattr(importlib.import_module(match[1]), match[2], None)
    if not (inspect.isclass(found) or inspect.isfunction(found)) or _name(found) != name:
        raise ValueError(f"{name!r} is not of gptjax")
    return found
