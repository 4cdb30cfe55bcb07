"""Checkpoints of a run, saved while it goes on and restored onto any mesh.

All contact with Orbax is in this file. Orbax writes and reads one folder; which folders there are
and which of them count is decided here, from the disk alone. A save is written as `STEP.saving`;
when all of it is on the disk, one rename makes it `STEP`. So what is named by a plain number is
whole, whenever the process was killed.
"""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp

from gptjax.rundir import CheckpointError, sync

FORMAT = "gptjax-1"
ITEMS = ("params", "opt_state", "scalars")  # of a step; each can be restored without the others
SAVE_TIMEOUT = 600  # seconds

State = TypeVar("State", bound=NamedTuple)  # with fields params, opt_state, and any scalar arrays


class Stored(NamedTuple):
    """What a checkpoint says of itself."""

    step: int
    mesh: dict[str, int]  # the axes of the mesh that wrote it
    params: Any  # a tree of jax.ShapeDtypeStruct
    opt_state: Any  # likewise, with lists for tuples and dicts for named ones


def is_valid(folder: Path) -> bool:
    """Whether a folder holds all of a step: cheap, by the presence of files."""
    files = [f"{item}/{name}" for item in ITEMS for name in ("_METADATA", "manifest.ocdbt")]
    return all((folder / name).is_file() for name in ["_CHECKPOINT_METADATA", *files])


class Checkpoints:
    """The checkpoints of a run.

    Reading changes nothing on the disk. Saving is for the `with` statement: to enter it makes the
    folder and clears what a killed process left, to leave it waits for the last save.

        with Checkpoints(run_dir, keep_last=2) as checkpoints:
            if checkpoints.latest() is not None:
                state = checkpoints.restore(like)
            for step in ...:
                checkpoints.poll()
                checkpoints.save(step, state)

    In a run of several processes each makes the same calls.
    """

    def __init__(self, run_dir: Path, *, keep_last: int = 2, keep_every: int | None = None):
        """Of the saved steps the `keep_last` newest stay, and the multiples of `keep_every`."""
        self._folder = Path(run_dir).absolute() / "checkpoints"
        self._keep_last, self._keep_every = keep_last, keep_every
        self._open = contextlib.ExitStack()
        self._background: ThreadPoolExecutor | None = None
        self._pending: Future | None = None

    def steps(self) -> list[int]:
        """The steps on the disk, ascending; none that is still being saved, no foreign folder."""
        folders = self._folder.iterdir() if self._folder.is_dir() else ()
        return sorted(int(path.name) for path in folders if _is_step(path.name) and is_valid(path))

    def latest(self) -> int | None:
        """The last step on the disk."""
        return max(self.steps(), default=None)

    def stored(self, step: int | None = None) -> Stored:
        """What a step holds; None: the latest. Any one device will do, whatever wrote it.

        Raises:
          CheckpointError: if there is no such step, or it cannot be read.
        """
        folder = self._find(step)
        found, beside = _metadata(folder, "params", "opt_state")
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), found)
        return Stored(int(folder.name), beside["mesh"], **shapes)

    def restore(self, like: State, step: int | None = None) -> State:
        """The state of a step, bit for bit; None: of the latest.

        Args:
          like: the state as jax.ShapeDtypeStruct, each leaf with the sharding to restore it with;
            the mesh that wrote it does not matter.
          step: one of `steps()`.
        Raises:
          CheckpointError: if there is no such step, it cannot be read, or it differs from `like`
            in names, shapes or dtypes; the message lists all differences.
        """
        items = _load(self._find(step), _items(like))
        return like._replace(**items.pop("scalars"), **items)

    def restore_params(self, like: Any, step: int | None = None) -> Any:
        """As `restore`, but the parameters alone: the rest is neither read nor compared."""
        return _load(self._find(step), {"params": like})["params"]

    def _find(self, step: int | None) -> Path:
        run_dir, steps = self._folder.parent, self.steps()
        if not steps:
            raise CheckpointError(f"{run_dir} has no checkpoint: give another run, or train it")
        if step is not None and step not in steps:
            known = ", ".join(map(str, steps))
            raise CheckpointError(
                f"{run_dir} has no checkpoint of step {step}: give one of {known}"
            )
        return self._folder / str(steps[-1] if step is None else step)

    def __enter__(self) -> Self:
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._clear()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("the folder of checkpoints is clear")
        self._background = self._open.enter_context(ThreadPoolExecutor(1, "checkpoint"))
        self._open.enter_context(_quiet())
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        with self._open:
            if error is None:
                self.wait()
            elif self._pending and self._pending.exception():  # the others may never come to wait()
                error.add_note(str(self._pending.exception()))

    def save(self, step: int, state: State) -> None:
        """Begin to save the state; it may be donated as soon as this returns.

        A step that is there already is replaced. The save before this one is waited for.

        Raises:
          OSError: if the save before this one failed, or this one cannot begin. It has not begun.
        """
        assert self._background, "saving is for the with statement"
        self.wait()
        items = _items(state)
        leaves = _by_path(items)
        assert all(leaf.size for leaf in leaves.values()), "Orbax saves no array without elements"
        assert not any("." in path for path in leaves), "Orbax takes {'a.b': x} for {'a': {'b': x}}"
        beside = {"format": FORMAT, "mesh": _mesh_axes(state.params)}
        try:
            with _context():
                response = ocp.save_checkpointables_async(
                    self._saving(step), items, overwrite=True, custom_metadata=beside
                )
        except Exception as error:
            raise self._failure(step, error) from error
        self._pending = self._background.submit(self._finish, step, response)

    def poll(self) -> None:
        """Learn whether the last save has failed, without waiting for it.

        Raises:
          OSError: with the cause, once. The next save begins afresh.
        """
        if self._pending and self._pending.done():
            pending, self._pending = self._pending, None
            pending.result()

    def wait(self) -> None:
        """Wait until what was saved is on the disk, from all processes.

        Raises:
          OSError: with the cause, once and in every process. The next save begins afresh.
        """
        failure = self._pending.exception() if self._pending else None
        self._pending = None
        if jax.process_count() > 1:
            failed = multihost_utils.process_allgather(np.array(failure is not None))
            if failed.any() and not failure:
                failure = OSError(f"saving failed in process {failed.argmax()}: see its log")
        if failure:
            raise failure

    def _finish(self, step: int, response: ocp.AsyncResponse[None]) -> None:
        """Wait for Orbax, then turn the folder into a step and remove those not kept."""
        try:
            response.result()
            if jax.process_index() == 0:
                self._commit(step)
                self._remove_old(step)
        except Exception as error:
            raise self._failure(step, error) from error

    def _failure(self, step: int, error: Exception) -> OSError:
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # what broke the save may break this too
                self._clear()
        return OSError(f"saving step {step} in {self._folder} failed: {_reason(error)}")

    def _commit(self, step: int) -> None:
        new, final = self._saving(step), self._folder / str(step)
        for path in [*new.rglob("*"), new]:
            sync(path)
        replaced = _set_aside(final, "replaced") if final.exists() else None
        new.rename(final)
        sync(self._folder)
        if replaced:
            shutil.rmtree(replaced)

    def _remove_old(self, saved: int) -> None:
        steps = self.steps()
        multiples = [step for step in steps if self._keep_every and step % self._keep_every == 0]
        for step in set(steps) - {saved, *steps[-self._keep_last :], *multiples}:
            shutil.rmtree(_set_aside(self._folder / str(step), "deleting"))

    def _clear(self) -> None:
        """Remove what unfinished saves and removals left, and undo unfinished replacements."""
        for path in self._folder.iterdir():
            name, _, ending = path.name.partition(".")
            if not _is_step(name):
                continue
            if ending == "replaced" and not (self._folder / name).exists():
                path.rename(self._folder / name)
            elif ending in ("replaced", "deleting") or ending.startswith("saving"):
                shutil.rmtree(path)

    def _saving(self, step: int) -> Path:
        return self._folder / f"{step}.saving"


def _is_step(name: str) -> bool:
    return name.isdecimal() and name == str(int(name))


def _set_aside(folder: Path, ending: str) -> Path:
    """Rename a step that is to go, for what is half removed must not look like one."""
    return folder.rename(folder.with_name(f"{folder.name}.{ending}"))


# --- Orbax ---------------------------------------------------------------------------------------


def _context() -> ocp.Context:
    context = ocp.Context()
    context.asynchronous.timeout_secs = SAVE_TIMEOUT
    # Else threads, and the exit with them, wait ten minutes for a folder that cannot be made.
    context.asynchronous.create_directories_asynchronously = False
    context.array.saving.use_compression = False  # 8 % fewer bytes for three times the time
    return context


def _items(state: State) -> dict[str, Any]:
    """A state, or what it is like, by the items of a step."""
    fields = state._asdict()
    params, opt_state = fields.pop("params"), fields.pop("opt_state")
    return {"params": params, "opt_state": opt_state, "scalars": fields}


def _load(folder: Path, like: dict[str, Any]) -> dict[str, Any]:
    """Some items of a step, compared first: Orbax casts silently, and names no parameter."""
    wanted, stored = _by_path(like), _by_path(_metadata(folder, *like)[0])
    assert all(leaf.sharding for leaf in wanted.values()), "Orbax would take the sharding it saved"
    differences = [
        f"  - {path}: stored {_describe(stored.get(path))}, wanted {_describe(wanted.get(path))}"
        for path in sorted(stored | wanted)
        if _describe(stored.get(path)) != _describe(wanted.get(path))
    ]
    if differences:
        raise CheckpointError(
            f"{folder} does not fit, differences: {len(differences)}\n"
            + "\n".join(differences)
            + "\nGive the model and optimizer of its run's config.json, or another run directory."
        )
    with _reading(folder):
        return ocp.load_checkpointables(folder, like)


def _metadata(folder: Path, *items: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shape and dtype of the leaves of some items, and what `save` wrote beside all items."""
    with _reading(folder):
        found = ocp.checkpointables_metadata(folder)
    damaged = [item for item in items if found.metadata.get(item) is None]
    if damaged:
        names = ", ".join(damaged)
        raise CheckpointError(f"{folder} cannot be read, damaged: {names}; give another step")
    beside = found.custom_metadata or {}
    if beside.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has the format {beside.get('format')!r}, but this version of gptjax reads "
            f"{FORMAT!r}: use the version that wrote it"
        )
    return {item: found.metadata[item] for item in items}, beside


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Our settings for Orbax, and its errors as ours."""
    try:
        with _context(), _quiet():
            yield
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be read: {_reason(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the hundreds of lines that Orbax's threads log of an error that is raised too."""

    def is_not_orbax(record: logging.LogRecord) -> bool:
        return "orbax" not in Path(record.pathname).parts

    logger = logging.getLogger("absl")
    logger.addFilter(is_not_orbax)
    try:
        yield
    finally:
        logger.removeFilter(is_not_orbax)


def _by_path(tree: Any) -> dict[str, Any]:
    """Leaves by path, such as "params/blocks/ffn/up", the same for tuples, lists and dicts."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _describe(leaf: Any) -> str:
    return "nothing" if leaf is None else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _mesh_axes(params: Any) -> dict[str, int]:
    sharding = jax.tree.leaves(params)[0].sharding
    return dict(sharding.mesh.shape) if isinstance(sharding, NamedSharding) else {}


def _reason(error: BaseException) -> str:
    """The first cause, which Orbax buries under errors of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
