"""A file imports only from files above it, importing does nothing, and `cli` reads the world."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import gptjax

PACKAGE = Path(gptjax.__file__).parent

# The reading order; a folder is one place.
ORDER = (
    "config",
    "errors",
    "faults",
    "events",
    "tokenizer",
    "sources",
    "files",
    "store",
    "message",
    "pool",
    "survey",
    "layout",
    "corpus",
    "data",
    "exclusions",
    "sharding",
    "attention",
    "layers",
    "losses",
    "model",
    "tuning",
    "pipeline",
    "guard",
    "replicas",
    "optim",
    "rundir",
    "integrity",
    "arrays",
    "steps",
    "checkpoint",
    "hf",
    "metrics",
    "best",
    "loading",
    "programs",
    "sampling",
    "prefill",
    "beams",
    "decoding",
    "tasks",
    "evaluate",
    "rows",
    "labelled",
    "prompting",
    "stop",
    "watchdog",
    "step",
    "compiled",
    "resume",
    "clock",
    "summary",
    "ready",
    "train",
    "report",
    "outcome",
    "page",
    "shrink",
    "proof",
    "plan",
    "interpret",
    "serve",
    "cli",
    "__main__",
)
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
FOLDERS = sorted({path.parent for path in FILES} - {PACKAGE})


def name_of(path: Path) -> str:
    """A file's name where it is imported; a folder's is that of its `__init__.py`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place_of(name: str) -> str:
    """What stands in ORDER: a file, or a folder with all that is in it."""
    return name.split(".")[1]


NAMES = {name_of(path): path for path in FILES}


def imported(file: str) -> set[str]:
    """The names that a file imports of the package's files, at its top or in a function."""
    names = set()
    for node in ast.walk(ast.parse(NAMES[file].read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in NAMES else node.module for name in inner}
            assert node.module != "gptjax", f"{file}: import the file that has the name"
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            assert not isinstance(node, ast.ImportFrom), f"{file}: relative import"
    assert "gptjax" not in names, f"{file}: import the file that has the name"
    return {name for name in names if name.startswith("gptjax.")}


def run_python(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": "", "PYTHONPATH": str(PACKAGE.parent)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("file", NAMES)
def test_imports_only_from_files_above(file):
    place = place_of(file)
    above = ORDER[: ORDER.index(place)]
    others = {place_of(name) for name in imported(file)} - {place}
    assert others <= {*above}, f"{file} may import {above}"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_imports_in_a_folder_have_an_order(folder):
    own = {name for name, path in NAMES.items() if path.parent == folder}
    list(TopologicalSorter({name: imported(name) & own for name in own}).static_order())


@pytest.mark.parametrize("file", [file for file in NAMES if place_of(file) != "cli"])
def test_only_the_command_line_reads_arguments_and_environment(file):
    for node in ast.walk(ast.parse(NAMES[file].read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "getenv", "argv"), f"{file}:{node.lineno}"
        if isinstance(node, ast.ImportFrom):
            assert not {"environ", "getenv", "argv"} & {alias.name for alias in node.names}


def test_import_leaves_jax_alone():
    program = "import sys, gptjax, gptjax.cli, gptjax.config; print('jax' in sys.modules)"
    assert run_python(program) == "False\n"


def test_no_file_starts_a_backend_when_it_is_imported():
    files = ", ".join(NAMES)
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
