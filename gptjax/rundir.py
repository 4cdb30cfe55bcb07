"""The run directory, and that one run at a time is in it.

RUN/config.json  RUN/tokenizer/  RUN/checkpoints/STEP/  RUN/metrics.jsonl  RUN/tensorboard/
RUN/events.jsonl  RUN/compiled/  RUN/lock
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Self

from gptjax.config import Config, ConfigError, did_you_mean, from_json, to_json
from gptjax.faults import at
from gptjax.tokenizer import Tokenizer, load_tokenizer


class CheckpointError(ValueError):
    """A run or checkpoint that is not there, cannot be read, or is not what is asked for."""


class BusyError(RuntimeError):
    """Another run is in the run directory."""


def save_run(run_dir: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Write what later commands need to know of a run: all of it, whenever the process is killed.

    Raises:
      OSError: if the folder cannot be written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(run_dir / "tokenizer")
    for path in [*(run_dir / "tokenizer").iterdir(), run_dir / "tokenizer"]:
        sync(path)
    new = run_dir / "config.json.new"
    new.write_text(to_json(config))
    sync(new)
    new.rename(run_dir / "config.json")
    sync(run_dir)


def read_run(run_dir: Path) -> tuple[Config, Tokenizer]:
    """What `save_run` wrote.

    Raises:
      CheckpointError: if there is no such folder, it is not of a run, or its config or tokenizer
        cannot be read.
    """
    if not run_dir.is_dir():
        siblings = [path.name for path in _runs_in(run_dir.parent)]
        hint = did_you_mean(run_dir.name, siblings)
        raise CheckpointError(f"{run_dir}: there is no such folder.{hint}")
    path = run_dir / "config.json"
    if not path.is_file():
        runs = ", ".join(map(str, _runs_in(run_dir)))
        hint = f"give one of {runs}" if runs else "give the folder that `gptjax train` wrote to"
        raise CheckpointError(f"{run_dir} is not a run directory, it has no config.json: {hint}")
    try:
        return from_json(path.read_text()), load_tokenizer(run_dir / "tokenizer")
    except (ConfigError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{run_dir} cannot be read as a run: {error}") from error


def _runs_in(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/config.json"))


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- one run at a time ---------------------------------------------------------------------------

BEAT_SECONDS = 1
LEASE_SECONDS = 10  # without a beat before a run is taken for dead that cannot be asked otherwise
# How a file system says that it has no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class RunLock:
    """A run directory is this run's alone until it is left.

        with RunLock(run_dir):
            ...

    The operating system's lock on RUN/lock tells runs of one machine apart, and goes with the
    process that has it, however that ends. Where machines do not see each other's locks, or a file
    system has none, a count in the file tells: while it goes up, the run lives. No two clocks are
    compared.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        num_processes: int = 1,
        say: Callable[[str], None] = lambda text: None,
        lost: Callable[[str], None] = lambda text: None,
    ):
        """num_processes: of the run.

        say: told of the lock of a dead run. lost: told when another run has taken this lock, as may
        happen to one that stood still for long.
        """
        self._run_dir, self._path = Path(run_dir), Path(run_dir) / "lock"
        self._say, self._lost = say, lost
        self._made: list[Path] = []  # folders that were not there, the innermost first
        self._file = -1
        self._beating: threading.Thread | None = None
        self._closed = threading.Event()
        self._content = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "boot": _boot(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S%z"),
            "processes": num_processes,
            "id": uuid.uuid4().hex,
            "beat": 0,
        }

    def __enter__(self) -> Self:
        """Take the lock, and see whether the folder can be written.

        Raises:
          BusyError: if another run has it; nothing was changed.
          OSError: if the folder cannot be made or written.
        """
        for folder in [self._run_dir, *self._run_dir.parents]:
            if folder.exists():
                break
            self._made.append(folder)
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._take()
            self._probe()
        except OSError:
            self.release()
            raise
        self._beating = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._beating.start()
        at("locked")
        return self

    def __exit__(self, *error: Any) -> None:
        self.release()

    def release(self) -> None:
        """Leave the folder to others; one in which no run began is left as it was."""
        self._closed.set()
        if self._beating and self._beating is not threading.current_thread():
            self._beating.join()  # else it might write to what has the number of this file then
        if self._file < 0:
            self._remove_made()
            return
        if not (self._run_dir / "config.json").exists():
            (self._run_dir / "events.jsonl").unlink(missing_ok=True)
        with suppress(OSError):
            if self._is_mine():
                self._path.unlink()
        os.close(self._file)
        self._file = -1
        self._remove_made()

    def _remove_made(self) -> None:
        with suppress(OSError):  # it holds a run
            for folder in self._made:
                folder.rmdir()

    def _take(self) -> None:
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            locks = self._lock()
            if os.fstat(self._file).st_nlink:
                break
            os.close(self._file)  # removed by the run before, just after it was opened
        before = _read_lock(self._path)
        here = (self._content["host"], self._content["boot"])
        if before and not (locks and (before["host"], before["boot"]) == here):
            self._observe(before)
        if before:
            self._say(f"lock       of {_who(before)} is taken over: that run is dead")
        self._write()
        if not locks:  # another may have thought the same: who wrote last has it
            time.sleep(2 * BEAT_SECONDS)
            if not self._is_mine():
                self._refuse(_read_lock(self._path))

    def _lock(self) -> bool:
        """Whether the operating system gave the lock; False: it has none here."""
        for attempt in range(3):  # one that only looks has it for a moment
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(0.1 * attempt)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                return False
        return self._refuse(_read_lock(self._path))

    def _observe(self, before: dict[str, Any]) -> None:
        """Look whether the run that wrote the lock still counts."""
        until = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < until:
            time.sleep(BEAT_SECONDS / 4)
            now = _read_lock(self._path)
            if now and now != before:
                self._refuse(now)

    def _refuse(self, other: dict[str, Any] | None) -> NoReturn:
        os.close(self._file)
        self._file = -1
        raise busy(self._run_dir, other)

    def _probe(self) -> None:
        """Write a file and see that it stays."""
        path = self._run_dir / "probe"
        try:
            path.write_text("can this folder be written?")
            sync(path)
        finally:
            path.unlink(missing_ok=True)

    def _write(self) -> None:
        self._content["beat"] += 1
        content = json.dumps(self._content).encode()
        os.pwrite(self._file, content.ljust(512), 0)

    def _is_mine(self) -> bool:
        return (_read_lock(self._path) or {}).get("id") == self._content["id"]

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            other = _read_lock(self._path)
            if other and other["id"] != self._content["id"]:
                self._lost(str(busy(self._run_dir, other)))
                return
            with suppress(OSError):  # a full disk; where it is not there, saving will tell
                self._write()


def refuse_busy(run_dir: Path) -> None:
    """Refuse a run directory that a run of one process is in, before anything is imported; of one
    of several processes this may be another one.

    Raises:
      BusyError: if so. `RunLock` finds all others.
    """
    with suppress(OSError):
        file = os.open(run_dir / "lock", os.O_RDONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            other = _read_lock(run_dir / "lock")
            if other and other["processes"] == 1:
                raise busy(run_dir, other) from None
        finally:
            os.close(file)


def busy(run_dir: Path, other: dict[str, Any] | None) -> BusyError:
    who = _who(other) if other else "another run"
    return BusyError(f"{run_dir} is in use by {who} -- wait for it, or give another --run-dir")


def _who(content: dict[str, Any]) -> str:
    return f"process {content['pid']} on {content['host']}, started {content['started']}"


def _read_lock(path: Path) -> dict[str, Any] | None:
    """What the run that has the lock wrote; None if nothing, or not all of it yet."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "id" in content else None


def _boot() -> str:
    """Which machine this is, since it was last started, where the system says so."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
