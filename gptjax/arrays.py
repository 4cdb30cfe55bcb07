"""A state to a folder and back, by way of Orbax: all contact with it is in this file.

Which folders there are, and which of them count, is decided elsewhere.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from gptjax.integrity import by_path
from gptjax.rundir import CheckpointError

SAVE_TIMEOUT = 600  # seconds
# Of the file system. Orbax and TensorStore have the system's words for them, and no number.
ERRORS = [
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.EFBIG,
    errno.ESTALE, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY,
]  # fmt: skip


def begin_save(folder: Path, items: dict[str, Any]) -> Callable[[], None]:
    """Begin to write a dict of trees; they may be donated as soon as this returns.

    In a run of several processes each makes the same calls.

    Returns:
      a function that waits until all is written, by all processes, and raises what went wrong.
    """
    leaves = by_path(items)
    assert all(leaf.size for leaf in leaves.values()), "Orbax saves no array without elements"
    assert not any("." in path for path in leaves), "Orbax takes {'a.b': x} for {'a': {'b': x}}"
    with _context():
        return ocp.save_checkpointables_async(folder, items, overwrite=True).result


def load(folder: Path, like: dict[str, Any]) -> dict[str, Any]:
    """Some items of what was saved, placed as `like` says. Compare it first: Orbax casts silently,
    and names no parameter.

    Raises:
      CheckpointError: if it cannot be read.
    """
    placed = all(leaf.sharding for leaf in jax.tree.leaves(like))
    assert placed, "Orbax would take the sharding it saved"
    with _reading(folder):
        return ocp.load_checkpointables(folder, like)


def load_plain(folder: Path, item: str) -> Any:
    """One item on one device, whatever it is like: lists for tuples, dicts for named ones.

    Raises:
      CheckpointError: if it cannot be read.
    """
    sharding = SingleDeviceSharding(jax.devices()[0])
    with _reading(folder):
        found = ocp.checkpointables_metadata(folder).metadata[item]
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), found
    )
    return load(folder, {item: like})[item]


def _context() -> ocp.Context:
    context = ocp.Context()
    context.asynchronous.timeout_secs = SAVE_TIMEOUT
    # Else threads, and the exit with them, wait ten minutes for a folder that cannot be made.
    context.asynchronous.create_directories_asynchronously = False
    context.array.saving.use_compression = False  # 8 % fewer bytes for three times the time
    return context


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Our settings for Orbax, and its errors as ours."""
    try:
        with _context(), quiet():
            yield
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be read: {reason(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the hundreds of lines that Orbax's threads log of an error that is raised too."""

    def is_not_orbax(record: logging.LogRecord) -> bool:
        return "orbax" not in Path(record.pathname).parts

    logger = logging.getLogger("absl")
    logger.addFilter(is_not_orbax)
    try:
        yield
    finally:
        logger.removeFilter(is_not_orbax)


def reason(error: BaseException) -> str:
    """The first cause, which Orbax buries under errors of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def error_number(error: BaseException) -> int | None:
    """Which failure of the file system an error is about, if it is about one."""
    text = ""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        text += str(error)
        error = error.__cause__
    return next((number for number in ERRORS if os.strerror(number) in text), None)
