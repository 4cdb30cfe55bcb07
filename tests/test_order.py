"""A file imports only from files above it, importing does nothing, and one file reads the world."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gptjax

PACKAGE = Path(gptjax.__file__).parent

# The reading order.
ORDER = (
    "config",
    "tokenizer",
    "sources",
    "files",
    "store",
    "pool",
    "survey",
    "layout",
    "corpus",
    "data",
    "sharding",
    "attention",
    "model",
    "pipeline",
    "optim",
    "checkpoint",
    "metrics",
    "generate",
    "tasks",
    "evaluate",
    "train",
    "plan",
    "hf",
    "interpret",
    "serve",
    "cli",
)
FILES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imported(file: str) -> set[str]:
    """The files of the package that a file imports, at its top or in a function."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{file}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            assert not isinstance(node, ast.ImportFrom), f"{file}: relative import"
    assert "gptjax" not in names, f"{file}: import the file that has the name, not the package"
    return {name.split(".")[1] for name in names if name.startswith("gptjax.")}


def run_python(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": "", "PYTHONPATH": str(PACKAGE.parent)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("file", FILES)
def test_imports_only_from_files_above(file):
    above = ORDER[: ORDER.index(file)]
    assert imported(file) <= {*above}, f"{file} may import {above}"


@pytest.mark.parametrize("file", [file for file in FILES if file != "cli"])
def test_only_the_command_line_reads_arguments_and_environment(file):
    for node in ast.walk(ast.parse((PACKAGE / f"{file}.py").read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "getenv", "argv"), f"{file}:{node.lineno}"
        if isinstance(node, ast.ImportFrom):
            assert not {"environ", "getenv", "argv"} & {alias.name for alias in node.names}


def test_import_leaves_jax_alone():
    program = "import sys, gptjax, gptjax.cli, gptjax.config; print('jax' in sys.modules)"
    assert run_python(program) == "False\n"


def test_no_file_starts_a_backend_when_it_is_imported():
    files = ", ".join(f"gptjax.{file}" for file in FILES)
    # JAX fails when it starts a backend that does not exist.
    run_python(f"import {files}", JAX_PLATFORMS="none_such")


@pytest.mark.parametrize("name", gptjax.__all__)
def test_every_public_name_is_there(name):
    assert getattr(gptjax, name) is not None


def test_no_public_name_is_also_a_file():
    # `gptjax.train` would mean one thing before that file is imported and another thing after.
    assert not {*gptjax.__all__} & {*ORDER}


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'fitt'"):
        _ = gptjax.fitt
