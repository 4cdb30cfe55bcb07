"""Checkpoints of a run, saved while it goes on and restored onto any mesh.

What counts as a step is decided here, from the disk alone: it has its name, its manifest and the
files that this lists, with their sizes; before it is read their hashes must agree, and afterwards
the fingerprints of its values.
"""

import contextlib
import errno
import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.sharding import NamedSharding

from gptjax.arrays import begin_save, error_number, load, load_plain, quiet, reason
from gptjax.events import Events
from gptjax.faults import at
from gptjax.integrity import (
    MANIFEST,
    Manifest,
    NotFiniteError,
    by_path,
    changed,
    damage,
    describe,
    differences,
    jit_fingerprint,
    read_manifest,
    refuse_not_finite,
)
from gptjax.rundir import CheckpointError
from gptjax.steps import ABANDONED, QUARANTINE, Steps, num_bytes, remove_path

ITEMS = ("params", "opt_state", "scalars")  # of a step; each can be restored without the others
ROOM = 1.2  # free space that a save must find, in sizes of the last one
ATTEMPTS = 100  # to read a step while a trainer removes steps
# Steps after a save at which the processes of a run ask each other how it went, and how often then.
MEETINGS, MEET_EVERY = (1, 2, 4, 8, 16, 32), 64
MEETING_TIMEOUT = 3600  # seconds; process 0 may have to hash all of a large step meanwhile

State = TypeVar("State", bound=NamedTuple)  # with fields params, opt_state, and any scalar arrays

log = logging.getLogger(__name__)


class Stored(NamedTuple):
    """What a checkpoint says of itself."""

    step: int
    mesh: dict[str, int]  # the axes of the mesh that wrote it
    params: Any  # nested dicts of jax.ShapeDtypeStruct
    opt_state: Any  # likewise, with dicts for tuples and for named ones


class Checkpoints:
    """The checkpoints of a run.

    Reading changes nothing on the disk, and may go on while a trainer saves and removes steps: what
    is read is one whole step. Saving is for the `with` statement: to enter it makes the folder and
    clears what a killed process left, to leave it waits for the last save.

        with Checkpoints(run_dir, keep_last=2) as checkpoints:
            start = checkpoints.latest_valid()
            if start is not None:
                state = checkpoints.restore(like, start)
            for step in ...:
                if step % 100 == 0 or step == last or checkpoints.due_again(step):
                    checkpoints.save(step, state, wait=step == last)
                checkpoints.poll()

    A damaged step is read by nobody: the newest one that is whole is taken instead, with a message.
    Within the `with` statement the damaged one is moved to `checkpoints/quarantine/`.

    A save that fails is reported at once, and `due_again` says when to try it again, with the state
    of that time. In a run of several processes each makes the same calls, and learns the same.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        retries: int = 0,
        backoff: float = 0.0,
        events: Events | None = None,
    ):
        """Of the saved steps the `keep_last` newest stay, and the multiples of `keep_every`.

        Args:
          retries: how often a save is tried again that failed, before that is an error.
          backoff: seconds before the first retry; before each further one it is twice as long.
          events: where to write what was saved, and what was not.
        """
        self._steps = Steps(Path(run_dir).absolute() / "checkpoints")
        self._keep_last, self._keep_every = keep_last, keep_every
        self._retries, self._backoff = retries, backoff
        self._events = events or Events(None)
        self._open = contextlib.ExitStack()
        self._background: ThreadPoolExecutor | None = None
        self._pending: Future | None = None  # the same in all processes: there is one or not
        self._told = False  # that the pending save has failed
        self._begun = 0  # step of the last save
        self._kept: tuple[int, ...] = ()  # a step that stays, if there is one
        self._failure: OSError | None = None  # of the last save, if it is to be tried again
        self._failures, self._retry_at = 0, 0.0
        self._needed = 0  # bytes of the last save
        self._fingerprint: Callable | None = None
        self._whole: int | None = None  # the step whose hashes this process has compared
        self._warned = False

    # --- which steps there are ---

    def steps(self) -> list[int]:
        """The steps on the disk that have all their files, ascending; none that is still being
        saved, no foreign folder.
        """
        return self._steps.whole()

    def latest(self) -> int | None:
        """The last of `steps`."""
        return max(self.steps(), default=None)

    def candidates(self) -> list[int]:
        """All that is named as a step, whole or damaged, ascending."""
        return self._steps.candidates()

    def known(self, step: int) -> int:
        """The step, which somebody asks for.

        Raises:
          CheckpointError: if it is not there.
        """
        candidates = self._steps.candidates()
        if not candidates:
            raise self._nothing()
        if step not in candidates:
            known = ", ".join(map(str, candidates))
            raise CheckpointError(
                f"{self._steps.folder.parent} has no checkpoint of step {step}: give one of {known}"
            )
        return step

    def num_bytes(self, step: int) -> int:
        """The size of a step on the disk."""
        return num_bytes(self._steps / step)

    def latest_valid(self) -> int | None:
        """The newest step that is what was saved, byte for byte; None if there is no step at all.

        Within the `with` statement newer ones, which are damaged, are moved to `quarantine/`.

        Raises:
          CheckpointError: if there are steps, and all are damaged.
        """
        self._warn_of_foreign()
        refused: dict[int, list[str]] = {}
        step = self._choose(None, refused, None)
        self._refuse(refused, step)
        return step

    def stored(self, step: int | None = None) -> Stored:
        """What a step holds; None: the latest. Any one device will do, whatever wrote it.

        Raises:
          CheckpointError: if there is no such step, or it is damaged.
        """
        for _ in range(ATTEMPTS):
            found = self.known(step) if step is not None else self.latest()
            if found is None:
                raise self._nothing()
            with contextlib.suppress(CheckpointError):
                manifest = read_manifest(self._steps / found)
                trees = _as_tree(manifest)
                return Stored(found, manifest.mesh, trees["params"], trees["opt_state"])
            if found in self._steps.candidates():
                break
        raise _damaged(self._steps / found, damage(self._steps / found, hashes=False))

    def verify(self, step: int) -> list[str]:
        """What is wrong with a step, a line for each file or leaf; it needs one device.

        Its verdict is that of `restore`.
        """
        folder = self._steps / step
        lines = damage(folder, hashes=True)
        for item in ITEMS if not lines else ():
            try:
                tree = {item: load_plain(folder, item)}
                sums = np.asarray(jit_fingerprint(tree)(tree))
                lines += changed(read_manifest(folder), tree, sums, {item})
            except CheckpointError as error:
                lines.append(str(error))
        return lines

    def prune(
        self,
        *,
        keep: Collection[int] = (),
        keep_last: int | None = None,
        keep_every: int | None = None,
        dry_run: bool = False,
    ) -> list[tuple[Path, int]]:
        """Remove what no run needs, in a run that nobody trains: steps that were set aside, and
        what a killed process left. If it says which to keep: the other steps too, but never the
        newest that is valid.

        Returns:
          what was removed, or with `dry_run` would be, and its bytes.
        """
        leftovers = [(path, num_bytes(path)) for path in self._steps.leftovers()]
        old = []
        if keep_last is not None or keep_every is not None:
            newest = self._choose(None, {}, None)
            keep = {*keep} if newest is None else {*keep, newest}
            old = self._steps.old(keep, keep_last or 1, keep_every)
        sizes = [(self._steps / step, num_bytes(self._steps / step)) for step in old]
        if not dry_run:
            self._steps.clear()
            for path in self._steps.leftovers():
                remove_path(path)
            for step in old:
                self._steps.remove(step)
        return leftovers + sizes

    # --- reading ---

    def restore(self, like: State, step: int | None = None) -> State:
        """The state of a step, bit for bit; None: of the newest that is whole.

        Args:
          like: the state as jax.ShapeDtypeStruct, each leaf with the sharding to restore it with;
            the mesh that wrote it does not matter.
          step: one of `steps()`.
        Raises:
          CheckpointError: if there is no such step, it is damaged, or it differs from `like` in
            names, shapes or dtypes; the message lists all damaged files, or all differences.
        """
        items = self._restore(_items(like), step)
        return like._replace(**items.pop("scalars"), **items)

    def restore_params(self, like: Any, step: int | None = None) -> Any:
        """As `restore`, but the parameters alone: the rest is neither read nor compared."""
        return self._restore({"params": like}, step)["params"]

    def read_params(self, step: int | None = None) -> tuple[int, dict[str, np.ndarray]]:
        """A step, None: the newest that is whole, and its parameters by path, from one device."""
        found = self._choose(step, {}, None)
        if found is None:
            raise self._nothing()
        params = by_path(load_plain(self._steps / found, "params"))
        return found, {path: np.asarray(leaf) for path, leaf in params.items()}

    def _restore(self, like: dict[str, Any], step: int | None) -> dict[str, Any]:
        refused: dict[int, list[str]] = {}
        for _ in range(ATTEMPTS):
            found = self._choose(step, refused, like)
            if found is None:
                raise self._nothing()
            mark = self._mark(found)
            state, lines = self._read(found, like)
            outcomes = _agree(bool(lines), self._mark(found) != mark)
            if not outcomes[:, 0].any():
                self._refuse(refused, found)
                return state
            if outcomes[0, 1]:  # removed or replaced while it was read: begin again
                continue
            refused[found] = lines or ["another process could not read it: see its log"]
            self._whole = None
            if step is not None:
                if any(older < step for older in self.steps()):
                    self._refuse(refused, None)
                raise _damaged(self._steps / found, refused[found])
        raise CheckpointError(f"{self._steps.folder}: steps are removed faster than they are read")

    def _read(self, step: int, like: dict[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
        """Some items of a step, or what is wrong with them."""
        folder = self._steps / step
        try:
            manifest, state = read_manifest(folder), load(folder, like)
        except CheckpointError as error:
            return None, [str(error)]
        compute = self._fingerprint if set(like) == set(ITEMS) else None
        sums = np.asarray((compute or jit_fingerprint(like))(state))
        return state, changed(manifest, state, sums, like.keys())

    def _choose(
        self, step: int | None, refused: dict[int, list[str]], like: dict[str, Any] | None
    ) -> int | None:
        """The newest step that is neither refused nor damaged, or the given one, as process 0 finds
        it; None if there is none at all. Those that are damaged are added to `refused`.
        """
        found, error = None, None
        if jax.process_index() == 0:
            try:
                found = self._choose_alone(step, refused, like)
            except CheckpointError as refusal:
                error = refusal
        (found_there, failed), *_ = _agree(-1 if found is None else found, error is not None)
        if failed:
            raise error or CheckpointError("process 0 found no checkpoint to read: see its log")
        return None if found_there < 0 else int(found_there)

    def _choose_alone(
        self, step: int | None, refused: dict[int, list[str]], like: dict[str, Any] | None
    ) -> int | None:
        for _ in range(ATTEMPTS):
            if step is not None:
                candidates = [self.known(step)]
            else:
                candidates = [one for one in self._steps.candidates() if one not in refused]
            for candidate in reversed(candidates):
                lines = self._examine(candidate, like)
                if lines is None:  # it was removed or replaced meanwhile: list the steps again
                    break
                if not lines:
                    return candidate
                if step is not None:
                    raise _damaged(self._steps / step, lines)
                refused[candidate] = lines
            else:
                if {*self._steps.candidates()} - {*candidates, *refused}:  # one has come meanwhile
                    continue
                if refused:
                    raise self._none_valid(refused)
                return None
        raise CheckpointError(f"{self._steps.folder}: steps are removed faster than they are read")

    def _examine(self, step: int, like: dict[str, Any] | None) -> list[str] | None:
        """What is wrong with a step's files; None if it has gone.

        Raises:
          CheckpointError: if it does not fit.
        """
        folder, mark = self._steps / step, self._mark(step)
        lines = damage(folder, hashes=False)
        if not lines and like is not None:  # before the files are read: that may take long
            _refuse_misfit(folder, like)
        if not lines and self._whole != step:
            lines = damage(folder, hashes=True, among=_of(like))
        if lines and (mark is None or self._mark(step) != mark):
            return None
        if not lines and like is None and self._background:  # nobody else changes it now
            self._whole = step
        return lines

    def _mark(self, step: int) -> tuple[int, bytes] | None:
        """What changes when a step is replaced; None if it is not there."""
        folder = self._steps / step
        try:
            number = folder.stat().st_ino
            return number, (folder / MANIFEST).read_bytes() if (folder / MANIFEST).exists() else b""
        except OSError:
            return None

    def _nothing(self) -> CheckpointError:
        run_dir = self._steps.folder.parent
        return CheckpointError(f"{run_dir} has no checkpoint: give another run, or train it")

    def _none_valid(self, refused: dict[int, list[str]]) -> CheckpointError:
        each = "\n".join(f"step {step:,}:\n{_block(lines, 5)}" for step, lines in refused.items())
        return CheckpointError(
            f"{self._steps.folder} has no checkpoint that is whole, the run cannot go on:\n{each}\n"
            "Restore one from a copy, or begin a new run in another --run-dir"
        )

    def _refuse(self, refused: dict[int, list[str]], instead: int | None) -> None:
        """Tell which steps are damaged; the trainer also moves them out of the way."""
        if jax.process_index() != 0:
            return
        then = "" if instead is None else f"; step {instead:,} is taken instead"
        for step, lines in refused.items():
            moved = None
            if self._background:
                moved = self._steps.set_aside(step, QUARANTINE)
            where = f", moved to {moved}" if moved else ""
            log.warning(
                "checkpoint of step %s is damaged%s%s:\n%s",
                f"{step:,}", where, then, _block(lines),
            )  # fmt: skip
            self._events.write(
                "refused", step=step, damage=lines, moved=moved and str(moved), instead=instead
            )

    def _warn_of_foreign(self) -> None:
        names = self._steps.foreign() if jax.process_index() == 0 and not self._warned else []
        self._warned = True
        if names:
            log.warning("%s: ignored, for these are no steps: %s", self._steps.folder, _few(names))
            self._events.write("ignored", names=names)

    # --- saving ---

    def __enter__(self) -> Self:
        if jax.process_index() == 0:
            self._steps.folder.mkdir(parents=True, exist_ok=True)
            self._steps.clear()
        _agree()
        self._background = self._open.enter_context(ThreadPoolExecutor(1, "checkpoint"))
        self._open.enter_context(quiet())
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        with self._open:
            if error is None:
                self.wait()
            elif self._pending and self._pending.exception():  # the others may never come to wait()
                error.add_note(str(self._pending.exception()))

    def prepare(self, like: State) -> None:
        """Compile what the first save needs, which would stop the run for as long; from any thread.

        Args:
          like: the state as jax.ShapeDtypeStruct, each leaf with its sharding.
        """
        items = _items(like)
        self._fingerprint = jit_fingerprint(items).lower(items).compile()

    def save(self, step: int, state: State, *, wait: bool = False, after_all: bool = False) -> None:
        """Begin to save the state; it may be donated as soon as this returns.

        A step that is there already is replaced. While the save before this one is under way, or a
        failed one must not be tried again yet, nothing happens but a line in the events.

        Args:
          wait: until the step is on the disk, and before that for the save before this one; one
            that fails is tried again at once when its time has come. For the last save of a run.
          after_all: once the save before this one has ended, which is waited for.
        Raises:
          OSError: if a save failed, and none is left of the retries.
          NotFiniteError: if a state to save is not finite; the step before stays the latest.
        """
        assert self._background, "saving is for the with statement"
        while True:
            if not self._settle(block=wait or after_all):
                self._skip(step, f"the save of step {self._begun:,} is under way")
                return
            if wait and self._failure:
                time.sleep(max(0.0, self._retry_at - time.monotonic()))
            elif self._failure and not self._may_retry():
                self._skip(step, "a save failed just now")
                return
            self._begin(step, state)
            if not wait:
                self.poll()
                return
            if self._settle(block=True) and not self._failure:
                return

    def keep(self, step: int | None) -> None:
        """Let a step stay that is saved or will be, for as long as no other one is named."""
        self._kept = () if step is None else (step,)

    def due_again(self, step: int) -> bool:
        """Whether a save failed and is to be tried again after this step. Also does what `poll`
        does.
        """
        self.poll()
        if not (self._pending or self._failure):
            return False
        since = step - self._begun
        if jax.process_count() > 1 and since not in MEETINGS and since % MEET_EVERY:
            return False
        return self._settle(block=False) and self._failure is not None and self._may_retry()

    def poll(self) -> None:
        """Learn whether the last save has failed, without waiting for it.

        Raises:
          OSError: with the cause, once, if none is left of the retries. The next save begins
            afresh. With several processes that is for `due_again`, `save` and `wait`.
          NotFiniteError: likewise.
        """
        if jax.process_count() == 1:
            self._settle(block=False)
        elif self._pending and self._pending.done() and not self._told:
            self._tell(self._pending.exception())

    def wait(self) -> None:
        """Wait until what was saved is on the disk, from all processes.

        Raises:
          OSError: with the cause, once and in every process. The next save begins afresh.
          NotFiniteError: if it was not to be saved.
        """
        self._settle(block=True)
        if self._failure:
            failure, self._failure, self._failures = self._failure, None, 0
            raise failure

    def abandon_after(self, step: int) -> list[int]:
        """Move all later steps to `checkpoints/abandoned/`, for the run goes on from this one; what
        they are.
        """
        assert self._background, "moving steps is for the with statement"
        with contextlib.suppress(OSError):  # a save that failed of a step that is given up
            self.wait()
        later = [one for one in self._steps.candidates() if one > step]
        _agree()  # all have listed them
        if jax.process_index() == 0:
            for one in later:
                self._steps.set_aside(one, ABANDONED)
            if later:
                log.warning(
                    "the run goes on from step %s: steps %s are moved to %s",
                    f"{step:,}", _few(list(map(str, later))), self._steps.folder / ABANDONED,
                )  # fmt: skip
                self._events.write("abandoned", steps=later, goes_on_from=step)
        return later

    def _skip(self, step: int, why: str) -> None:
        self._events.write("save_skipped", step=step, why=why)

    def _may_retry(self) -> bool:
        """Whether the time of the next retry has come, by the clock of process 0."""
        return bool(_agree(time.monotonic() >= self._retry_at)[0, 0])

    def _begin(self, step: int, state: State) -> None:
        """Begin a save; one that cannot begin is one that has failed."""
        items = _items(state)
        self._begun, self._told = step, False
        self._needed = self._needed or sum(leaf.nbytes for leaf in jax.tree.leaves(items))
        obstacle = self._obstacle(step) if jax.process_index() == 0 else None
        if _agree(obstacle is not None)[0, 0]:
            self._pending = Future()
            self._pending.set_exception(obstacle or OSError("process 0 cannot save: see its log"))
            return
        began = time.monotonic()
        # Dispatched before the state is copied, for both only read it.
        sums = (self._fingerprint or jit_fingerprint(items))(items)
        if jax.process_count() > 1 and jax.default_backend() == "cpu":
            sums.block_until_ready()  # Gloo mixes up the messages of what runs at the same time
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), items)
        try:
            written = begin_save(self._steps.saving(step), items)
            at("copied")
        except Exception as error:
            self._pending = Future()
            self._pending.set_exception(self._failed(step, error))
            return
        mesh = _mesh_axes(state.params)
        self._pending = self._background.submit(
            self._finish, step, written, sums, like, mesh, began
        )

    def _obstacle(self, step: int) -> OSError | None:
        """What makes a save useless to begin: no folder to write to, or too little space."""
        try:
            self._steps.clear()
            probe = self._steps.saving(step)
            probe.mkdir()
            probe.rmdir()
            if shutil.disk_usage(self._steps.folder).free < ROOM * self._needed:
                raise OSError(errno.ENOSPC, "too little space is free")
        except OSError as error:
            return self._failed(step, error)
        return None

    def _finish(
        self,
        step: int,
        written: Callable[[], None],
        sums: jax.Array,
        like: dict[str, Any],
        mesh: dict[str, int],
        began: float,
    ) -> None:
        """In the background: turn what is written into a step, and remove those not kept."""
        try:
            found = np.asarray(sums)
            written()
            refuse_not_finite(like, found, step)
            if jax.process_index() > 0:
                return
            manifest = self._steps.commit(step, mesh, describe(like, found))
        except NotFiniteError:
            if jax.process_index() == 0:
                self._steps.clear()
            raise
        except Exception as error:
            raise self._failed(step, error) from error
        self._needed = manifest.size
        self._events.write("save", step=step, bytes=manifest.size, seconds=time.monotonic() - began)
        try:
            self._steps.remove_old({step, *self._kept}, self._keep_last, self._keep_every)
        except OSError as error:  # the step is saved nevertheless
            log.warning("an old checkpoint cannot be removed: %s", error)
            self._events.write("remove_failed", error=str(error))

    def _failed(self, step: int, error: Exception) -> OSError:
        """What a failure is called, once its leftovers are removed."""
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # what broke the save may break this too
                self._steps.clear()
        number, folder = error_number(error), self._steps.folder
        text = f"saving step {step:,} in {folder} failed: {reason(error)}"
        with contextlib.suppress(OSError):
            free, needed = shutil.disk_usage(folder).free, round(ROOM * self._needed)
            text += f"; {needed:,} bytes are needed and {free:,} are free"
        return OSError(number, text) if number else OSError(text)

    def _settle(self, *, block: bool) -> bool:
        """Learn how the last save went, the same in all processes; whether none is under way.

        Raises:
          OSError: if it failed, and none is left of the retries.
          NotFiniteError: if it was not to be saved.
        """
        if self._pending is None:
            return True
        if block:
            wait([self._pending])
        done = self._pending.done()
        error = self._pending.exception() if done else None
        fatal = isinstance(error, NotFiniteError)
        outcomes = _agree(done, error is not None, fatal, getattr(error, "errno", None) or 0)
        all_done, any_failed, any_fatal = outcomes[:, 0].all(), *outcomes[:, 1:3].any(axis=0)
        if not all_done:
            return False
        self._pending = None
        if not any_failed:
            self._failure, self._failures = None, 0
            return True
        if any_fatal:
            raise error
        first = int(outcomes[:, 1].argmax())
        number = int(outcomes[first, 3])
        elsewhere = f"saving failed in process {first}: see its log"
        self._count(error or (OSError(number, elsewhere) if number else OSError(elsewhere)))
        return True

    def _count(self, failure: OSError) -> None:
        """Count a failed save; when to try again, or else raise it."""
        self._tell(failure)
        self._failures += 1
        if self._failures > self._retries:
            self._failure, self._failures = None, 0
            raise failure
        pause = self._backoff * 2 ** (self._failures - 1)
        self._failure, self._retry_at = failure, time.monotonic() + pause
        log.warning(
            "%s; the run goes on, and saves again in %.3g s (retry %s of %s)",
            failure.strerror or failure, pause, self._failures, self._retries,
        )  # fmt: skip

    def _tell(self, failure: BaseException | None) -> None:
        if failure is None or self._told:
            return
        self._told = True
        self._events.write(
            "save_failed", step=self._begun, error=str(failure), errno=getattr(failure, "errno", 0)
        )


# Every process counts the same meetings; what they meet in is one for the process too.
_meetings = itertools.count()


def _agree(*numbers: int | bool) -> np.ndarray:
    """The numbers of each process, a row each, in all processes; nobody goes on before all are
    there. It takes no device, so it neither waits for a step nor meets its messages.
    """
    own = [int(number) for number in numbers]
    if jax.process_count() == 1:
        return np.array([own])
    client, meeting = distributed.global_state.client, f"gptjax/checkpoint/{next(_meetings)}"
    client.key_value_set(f"{meeting}/{jax.process_index()}", json.dumps(own))
    rows = [
        json.loads(client.blocking_key_value_get(f"{meeting}/{index}", 1000 * MEETING_TIMEOUT))
        for index in range(jax.process_count())
    ]
    return np.array(rows)


def _items(state: State) -> dict[str, Any]:
    """A state, or what it is like, by the items of a step."""
    fields = state._asdict()
    params, opt_state = fields.pop("params"), fields.pop("opt_state")
    return {"params": params, "opt_state": opt_state, "scalars": fields}


def _of(like: dict[str, Any] | None) -> Callable[[str], bool]:
    """Whether a file is needed to read some items, by its name; None: all items."""
    return lambda name: like is None or "/" not in name or name.partition("/")[0] in like


def _refuse_misfit(folder: Path, like: dict[str, Any]) -> None:
    """Refuse a step that differs in names, shapes or dtypes, before anything of it is read."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:  # it has just gone, as reading it will tell
        return
    lines = differences(manifest, like, like.keys())
    if lines:
        count = sum(line.startswith("  - ") for line in lines)
        raise CheckpointError(
            f"{folder} does not fit, differences: {count}\n"
            + "\n".join(lines)
            + "\nGive the model and optimizer of its run's config.json, or another run directory."
        )


def _as_tree(manifest: Manifest) -> dict[str, Any]:
    """The leaves of a step as nested dicts of jax.ShapeDtypeStruct."""
    tree: dict[str, Any] = {item: {} for item in ITEMS}
    for path, leaf in manifest.leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return tree


def _mesh_axes(params: Any) -> dict[str, int]:
    sharding = jax.tree.leaves(params)[0].sharding
    return dict(sharding.mesh.shape) if isinstance(sharding, NamedSharding) else {}


def _damaged(folder: Path, lines: list[str]) -> CheckpointError:
    return CheckpointError(f"{folder} is damaged: give another step\n{_block(lines)}")


def _block(lines: list[str], most: int = 20) -> str:
    more = [f"and {len(lines) - most:,} more"] if len(lines) > most else []
    return "\n".join(f"  - {line}" for line in [*lines[:most], *more])


def _few(names: list[str], most: int = 10) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
