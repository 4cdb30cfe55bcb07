"""What happened to a run, when, and what its time went to: `events.jsonl`.

A line is a JSON object: `time` in seconds since 1970, `process`, `event`, and what there is to say
of it. A run that is started again goes on with the same file: its whole history is in one place.

    start        attempt, when its process began, versions, devices, the step it goes on from, spent
    config       what differs from the config so far
    data         what differs from the stores so far
    fork         the run and the step that it began from
    phase        data_preparation, initialise, restore, compile, evaluation, sample: its seconds
    first_step   seconds until its figures were there
    progress     the last step that was begun, and spent: the seconds of the main thread so far in
                 this attempt, by what it did
    save         a step is on the disk for good; save_failed, save_skipped
    skipped_update, spike
    rollback     step, and to_step, which the run goes back to
    stop, error  code, message
    end          outcome: done, or the name of what ended it; spent

`report.py` makes its tables of these lines alone.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

# Seconds between two lines of `progress`, at least, and as a share of the attempt's length: what a
# killed process leaves untold is small either way, and weeks do not fill the file.
EVERY_SECONDS, EVERY_SHARE, AT_MOST_SECONDS = 3.0, 0.002, 60.0


class Spent:
    """The seconds of a run's main thread, by what it did; at any moment that is one thing.

        with spent.of("evaluation"):
            ...

    So the seconds add up to those since the process began. Two clock readings are all it costs.
    """

    def __init__(self, began: float | None = None):
        """
        Args:
          began: when the process began, in seconds since 1970; None: now.
        """
        before = 0.0 if began is None else max(time.time() - began, 0.0)
        self._seconds = {"start_up": before}
        self._kind, self._since = "start_up", time.perf_counter()
        self._lock, self._thread = threading.Lock(), threading.get_ident()

    @contextlib.contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """What runs inside counts as this; on another thread than the main one, as nothing."""
        if threading.get_ident() != self._thread:
            yield
            return
        before = self._switch(kind)
        try:
            yield
        finally:
            self._switch(before)

    def move(self, seconds: float, source: str, to: str) -> None:
        """Count seconds as something else than they were counted as."""
        with self._lock:
            self._seconds[source] = self._seconds.get(source, 0.0) - seconds
            self._seconds[to] = self._seconds.get(to, 0.0) + seconds

    def read(self) -> dict[str, float]:
        """The seconds so far, up to now."""
        with self._lock:
            self._charge()
            return {kind: round(seconds, 4) for kind, seconds in self._seconds.items()}

    def _switch(self, kind: str) -> str:
        with self._lock:
            self._charge()
            before, self._kind = self._kind, kind
            return before

    def _charge(self) -> None:
        now = time.perf_counter()
        self._seconds[self._kind] = self._seconds.get(self._kind, 0.0) + now - self._since
        self._since = now


class Events:
    """Events to `events.jsonl`, each on the disk's way as soon as it is written.

        with Events(run_dir) as events:
            events.start(step=0)
            with events.phase("compile"):
                ...
            events.write("save", step=100)

    The log is no reason to fail: on a full disk events are lost, and the run goes on.
    """

    def __init__(self, run_dir: Path | None, process: int = 0, began: float | None = None):
        """
        Args:
          run_dir: None: events go nowhere.
          process: the number of this one in the run.
          began: when it began, in seconds since 1970; None: now.
        """
        self._path = run_dir and Path(run_dir) / "events.jsonl"
        self._process = process
        self._lock = threading.Lock()
        self._began = time.time() if began is None else began
        self._over, self._beat = threading.Event(), None
        self.spent = Spent(began)
        self.step = 0  # the last one that was begun

    def write(self, event: str, **fields: Any) -> None:
        """Add a line; from any thread, and from any process of the run."""
        if not self._path:
            return
        line = {"time": round(time.time(), 4), "process": self._process, "event": event} | fields
        with self._lock, contextlib.suppress(OSError), self._path.open("a+b") as file:
            text = json.dumps(line, default=str) + "\n"
            file.write((text if _ends_whole(file) else "\n" + text).encode())

    @contextlib.contextmanager
    def phase(self, name: str, **fields: Any) -> Iterator[None]:
        """Tell how many seconds a phase took, once it is over; on the main thread, these count as
        spent on it.
        """
        began = time.perf_counter()
        try:
            with self.spent.of(name):
                yield
        finally:
            self.write("phase", phase=name, seconds=time.perf_counter() - began, **fields)

    def start(self, step: int, **fields: Any) -> None:
        """Begin an attempt, which goes on from a step; from then on process 0 tells every few
        seconds what its time went to, also while it waits for something.
        """
        self.step = step
        if self._process or not self._path:
            return
        attempt = 1 + sum(line["event"] == "start" for line in read_events(self._path.parent))
        times = {"began": round(self._began, 4), "spent": self.spent.read()}
        self.write("start", attempt=attempt, step=step, **fields, **times)
        self._beat = threading.Thread(target=self._tell, daemon=True, name="events")
        self._beat.start()

    def progress(self) -> None:
        """Tell what the time went to, up to now."""
        if self._beat:
            self.write("progress", step=self.step, spent=self.spent.read())

    def _tell(self) -> None:
        while not self._over.wait(self._pause()):
            self.progress()

    def _pause(self) -> float:
        so_far = EVERY_SHARE * (time.time() - self._began)
        return min(max(so_far, EVERY_SECONDS), AT_MOST_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        self._over.set()
        if self._beat:
            outcome = {"outcome": kind.__name__, "message": str(error)} if kind else {}
            spent = self.spent.read()
            self.write("end", **{"outcome": "done"} | outcome, step=self.step, spent=spent)


def _ends_whole(file: Any) -> bool:
    """Whether a file's last line is whole: a full disk or a loss of power may have cut it."""
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def read_events(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The events of a run as they were written, one after the other; lines that are not whole, or
    no events, are left out.
    """
    path = Path(run_dir) / "events.jsonl"
    if not path.is_file():
        return
    with path.open("rb") as file:
        for text in file:
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and {"time", "process", "event"} <= line.keys():
                    yield line


def process_began() -> float:
    """When this process began, in seconds since 1970; where the system does not say, now."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        up = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - (up - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()
