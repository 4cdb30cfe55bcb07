"""What happened to a run, and when: `events.jsonl`.

A line is a JSON object: `time` in seconds since 1970, `process`, `event`, and what there is to say
of it. A run that is started again goes on with the same file: its whole history is in one place.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Events:
    """Events to `events.jsonl`, each on the disk's way as soon as it is written.

        events = Events(run_dir)
        with events.phase("compile"):
            ...
        events.write("save", step=100)

    The log is no reason to fail: on a full disk events are lost, and the run goes on.
    """

    def __init__(self, run_dir: Path | None, process: int = 0):
        """None: events go nowhere."""
        self._path = run_dir and Path(run_dir) / "events.jsonl"
        self._process = process
        self._lock = threading.Lock()

    def write(self, event: str, **fields: Any) -> None:
        """Add a line; from any thread, and from any process of the run."""
        if not self._path:
            return
        line = {"time": round(time.time(), 4), "process": self._process, "event": event} | fields
        with self._lock, contextlib.suppress(OSError), self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    @contextlib.contextmanager
    def phase(self, name: str, **fields: Any) -> Iterator[None]:
        """Tell how many seconds a phase took, once it is over."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.write("phase", phase=name, seconds=time.perf_counter() - began, **fields)
