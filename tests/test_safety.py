"""Nothing that is read can make the program do something else: no file of the package loads code or
objects, but for the user's own functions.
"""

import ast
import json
from functools import partial
from pathlib import Path

import pytest
from test_order import FILES, PACKAGE

from gptjax.config import ConfigError, DataConfig
from gptjax.corpus import survey_group
from gptjax.message import from_text, to_text
from gptjax.sources import DataError
from gptjax.survey import Span

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
MODULES |= {"code", "codeop", "imp", "importlib", "runpy", "torch", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "torch.load"}
METHODS |= {"subprocess.getoutput", "subprocess.getstatusoutput", "np.load", "numpy.load"}
# What a multiprocessing connection or queue does to a value is to pickle it.
METHODS |= {"connection.send", "connection.recv", "multiprocessing.Queue", "multiprocessing.Pool"}
# The files that may import code, and why that is none that comes from data.
LOADERS = {
    "__init__.py": "importlib",  # the public names, of this package
    "compiled.py": "importlib",  # the versions of packages
    "config/files.py": "runpy",  # the user's own file, which is there to be run
    "message.py": "importlib",  # names of this package alone
    "plan/topologies.py": "importlib",  # whether the packages of compilers are installed
    "summary.py": "importlib",  # the version of a package
    "sources/opening.py": "importlib",  # packages that are not always installed, by constant names
}


def forbidden(text: str, loader: str = "") -> list[tuple[int, str]]:
    """Lines of a program and what is wrong there.

    Args:
      loader: the one module, of those that are not allowed, that this file may use.
    """
    found = []
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").partition(".")[0]]
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name) for name in METHODS.intersection(members)]
        found += [(node.lineno, name) for name in names if name in MODULES - {loader}]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in CALLS or any(called.endswith(name) for name in METHODS):
            found.append((node.lineno, called))
        for keyword in node.keywords:
            if keyword.arg in ("shell", "allow_pickle") and ast.unparse(keyword.value) != "False":
                found.append((node.lineno, f"{called}({keyword.arg}=)"))
    return found


@pytest.mark.parametrize(
    "path", [PACKAGE / "__init__.py", *FILES], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_no_file_loads_code_or_objects(path: Path):
    name = str(path.relative_to(PACKAGE))
    found = forbidden(path.read_text(), LOADERS.get(name, ""))
    assert not found, "\n".join(f"gptjax/{name}:{line}: {what}" for line, what in found)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import marshal, json",
        "import importlib.util",
        "import shelve",
        "eval(text)",
        "exec(text)",
        "compile(text, 'name', 'exec')",
        "__import__(name)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "load(path, allow_pickle=some)",
        "torch.load(path)",
        "yaml.load(text)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "from os import system",
        "self.connection.send(value)",
        "connection.recv()",
    ],
)
def test_what_loads_code_is_seen(line):
    assert forbidden(line), line


@pytest.mark.parametrize(
    "line",
    [
        "re.compile(text)",
        "jax.jit(f).lower(x).compile()",
        "json.loads(text)",
        "subprocess.run(words, shell=False)",
        "connection.send_bytes(text)",
    ],
)
def test_what_loads_no_code_is_allowed(line):
    assert not forbidden(line), line


# --- messages between processes ------------------------------------------------------------------

VALUES = [
    None,
    [True, 2**70, -0.5, "text \udc80", b"\x00\xff"],
    (1, (2, [3])),
    {"a": 1, 2: ("b",)},
    Path("/some/where"),
    Span(1, 2, 3, 4, 5, dropped=(6, 7)),
    DataConfig(path=("a", "b"), skip=((1, 2),)),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_back_equal(value):
    again = from_text(to_text(value))
    assert again == value
    assert type(again) is type(value)


def test_a_function_comes_back_with_its_arguments():
    again = from_text(to_text(partial(survey_group, 1, folder=Path("x"))))
    assert (again.func, again.args, again.keywords) == (survey_group, (1,), {"folder": Path("x")})


@pytest.mark.parametrize(
    "error, kind, words",
    [
        (DataError("a.txt:3: no text"), DataError, "a.txt:3: no text"),
        (ConfigError("no"), ConfigError, "no"),
        (FileNotFoundError(2, "No such file", "a.txt"), FileNotFoundError, "No such file: 'a.txt'"),
        (KeyError("name"), RuntimeError, "KeyError: 'name'"),
    ],
)
def test_an_error_comes_back_as_one_like_it(error, kind, words):
    again = from_text(to_text(error))
    assert type(again) is kind
    assert words in str(again)


@pytest.mark.parametrize(
    "plain",
    [
        {"function": "os:system"},
        {"function": "gptjax.pool:subprocess"},
        {"function": "gptjax.config.files:Path"},  # its name is there, but not of this package
        {"made": ["builtins:eval", ["1"]]},
        {"made": ["gptjax.config:__import__", ["os"]]},
        {"other": 1},
    ],
)
def test_what_is_not_ours_is_not_made(plain):
    with pytest.raises(ValueError, match=r"is not of gptjax|no kind of value"):
        from_text(json.dumps(plain))


@pytest.mark.parametrize(
    "value", [print, object(), lambda: 0, {1, 2}], ids=["builtin", "object", "lambda", "set"]
)
def test_other_values_are_refused(value):
    with pytest.raises(TypeError, match="no form as text"):
        to_text(value)
