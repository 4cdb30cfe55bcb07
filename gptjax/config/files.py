"""Configs as JSON, and experiments and functions that a user names by their file."""

import dataclasses
import json
import re
import reprlib
import runpy
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

from gptjax.config.fields import Config
from gptjax.config.kinds import ConfigError, did_you_mean, field_problems, kind_of, refuse


def to_json(config: Config) -> str:
    """The config as text; `from_json` reads it back equal."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """A config from its text; a field that is not there has its default.

    Raises:
      ConfigError: for text that is not JSON, unknown names, and values not of their field's kind.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the config is not JSON: {error}") from None
    refuse(list(_name_problems("", values, Config)))
    config = _from_value(Config, values)
    refuse(list(field_problems(config).values()))
    return config


def _name_problems(path: str, values: Any, dataclass_type: type) -> Iterator[str]:
    """Names that are no fields, and fields without a default that are not there."""
    if not isinstance(values, dict):
        yield f"{path or 'config'} = {reprlib.repr(values)}: must be an object of fields"
        return
    hints = get_type_hints(dataclass_type)
    for name, value in values.items():
        here = f"{path}.{name}".lstrip(".")
        if name not in hints:
            yield f"{here}: there is no such field.{did_you_mean(name, hints)}"
            continue
        kind = kind_of(hints[name])
        if dataclasses.is_dataclass(kind.base):
            yield from _name_problems(here, value, kind.base)
        elif kind.many and dataclasses.is_dataclass(kind.items[0]) and isinstance(value, list):
            for i, item in enumerate(value):
                yield from _name_problems(f"{here}[{i}]", item, kind.items[0])
    for one in dataclasses.fields(dataclass_type):
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if required and one.name not in values:
            yield f"{path}.{one.name}: it has no default: give it"


def _from_value(annotation: Any, value: Any) -> Any:
    """A value of JSON as its field has it: objects are dataclasses, and lists tuples."""
    kind = kind_of(annotation)
    if isinstance(value, dict) and dataclasses.is_dataclass(kind.base):
        hints = get_type_hints(kind.base)
        return kind.base(**{name: _from_value(hints[name], item) for name, item in value.items()})
    if isinstance(value, list):
        return tuple(_from_value(kind.items[0], item) if kind.many else item for item in value)
    return value


def load_experiment(selector: str) -> Config:
    """The config that an experiment returns.

    Args:
      selector: `FILE.py`, whose function `config` is called, or `FILE.py:function`.
    Raises:
      ConfigError: if there is no such file or function, it fails, or it returns no Config.
    """
    function = load_function(selector, default="config")
    try:
        config = function()
    except (Exception, SystemExit) as error:
        raise ConfigError(_failure(selector, error)) from error
    if not isinstance(config, Config):
        raise ConfigError(
            f"{selector}: returned {reprlib.repr(config)}; an experiment returns a gptjax.Config"
        )
    return config


def load_function(selector: str, default: str = "") -> Callable:
    """The function that `FILE.py:function` names; `default` where no function is named.

    Raises:
      ConfigError: if there is no such file or function, or the file fails.
    """
    match = re.fullmatch(r"(.+\.py)(?::(\w*))?", selector)
    if not match:
        raise ConfigError(f"{selector!r} is not an experiment: give FILE.py or FILE.py:function")
    path, name = Path(match[1]), match[2] or default
    if not path.is_file():
        siblings = (str(sibling) for sibling in path.parent.glob("*.py"))
        raise ConfigError(f"{path}: there is no such file.{did_you_mean(path, siblings)}")
    try:
        # Unlike an import, this leaves no __pycache__ beside a file that belongs to the user.
        module = runpy.run_path(str(path), run_name=path.stem)
    except (Exception, SystemExit) as error:
        raise ConfigError(_failure(str(path), error)) from error
    if not callable(module.get(name)):
        own = [
            key
            for key, value in module.items()
            if callable(value) and getattr(value, "__module__", None) == path.stem
        ]
        raise ConfigError(
            f"{path}: there is no function {name!r}; it has {', '.join(own) or 'none'}."
            + did_you_mean(name, own)
        )
    return module[name]


def _failure(selector: str, error: BaseException) -> str:
    """What failed in a file, and at which of its lines."""
    path = re.sub(r":\w*$", "", selector)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines, error = [error.lineno], type(error)(error.msg)
    where = f" at line {lines[-1]}" if lines else ""
    return f"{selector}: failed{where} with {type(error).__name__}: {error}"
