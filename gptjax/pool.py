"""The same function of many items: in processes of this machine, or under Apache Beam.

A function leaves its result on disk, so nothing but progress comes back, and the two ways to run it
are one to it.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from gptjax.config import ConfigError
from gptjax.message import from_text, to_text
from gptjax.sources import DataError

Progress = Callable[[int], None]  # told of the bytes that have been worked on since the last call
Function = Callable[[Any, Progress], None]

TELL_SECONDS = 0.1  # between two messages of a worker about its progress
STILL_SECONDS = 30  # without a message of a worker before that is told


def run_in_pool(
    function: Function,
    items: Sequence[Any],
    workers: int | None,
    *,
    label: Callable[[Any], str] = str,
    progress: Progress = lambda num_bytes: None,
    still: Callable[[str], None] = lambda text: None,
) -> None:
    """Call function(item, progress) for every item, in any order.

    The workers are programs of their own. They import the file of the function and nothing of the
    caller's, so a caller may have threads, devices and no `if __name__ == "__main__"`. They end
    when this process does, whatever ends it.

    Args:
      function: of this package, also with arguments given; `to_text` has a form for it and the
        items.
      workers: processes; None: as many as there are cores. With one, or one item: this process.
      label: what an error calls an item.
      still: told which workers have made no progress for a while, and where; "" when all do again.
        An item may take any time, so none is given up.
    Raises:
      DataError: if a worker dies; and whatever the function raises, first come.
    """
    workers = min(workers or _num_cores(), len(items))
    if workers <= 1:
        for item in items:
            function(item, progress)
        return
    waiting, team, told = iter(items), {}, ""
    with _team(workers, function) as members:
        for member in members:
            member.begin(next(waiting))
            team[member.connection] = member
        while team:
            ready = wait([*team], timeout=STILL_SECONDS / 4)
            before = time.monotonic() - STILL_SECONDS
            text = ", ".join(
                f"worker {member.process.pid} is still at {label(member.item)}"
                for connection, member in team.items()
                if member.heard < before and connection not in ready
            )
            if text != told:
                still(told := text)
            for connection in ready:
                member = team[connection]
                kind, content = member.receive(label)
                if kind == "progress":
                    progress(content)
                elif kind == "failed":
                    raise content
                elif (item := next(waiting, team)) is not team:
                    member.begin(item)
                else:
                    del team[connection]


def _num_cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass
class _Member:
    """A worker, as this process sees it."""

    process: subprocess.Popen
    connection: Connection
    item: Any = field(default=None)
    heard: float = 0.0  # when it last sent something, or was given an item

    def begin(self, item: Any) -> None:
        self.item, self.heard = item, time.monotonic()
        self._send(item)

    def _send(self, value: Any) -> None:
        with suppress(BrokenPipeError):  # it is dead, which `receive` says
            self.connection.send_bytes(to_text(value).encode())

    def receive(self, label: Callable[[Any], str]) -> tuple[str, Any]:
        self.heard = time.monotonic()
        try:
            return from_text(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            code = self.process.wait()
        how = f"ended with code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += ", perhaps for want of memory"
        raise DataError(
            f"worker {self.process.pid} {how} at {label(self.item)}; run again, which keeps what "
            "is finished; where memory is short, give fewer --data.workers"
        )


@contextmanager
def _team(workers: int, function: Function) -> Iterator[list[_Member]]:
    """Workers, which are killed in the end."""
    members = []
    try:
        for _ in range(workers):
            ours, theirs = Pipe()
            # Ctrl-C in a terminal reaches all of its processes; this one ends the others.
            program = (
                "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import sys; "
                f"sys.path[:] = {sys.path!r}; from gptjax.pool import serve; "
                f"serve({theirs.fileno()})"
            )
            command = [sys.executable, "-c", program]
            with theirs:
                process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
                )
            members.append(_Member(process, ours))
            members[-1]._send(function)
        yield members
    finally:
        for member in members:
            member.process.kill()
            member.connection.close()
        for member in members:
            member.process.wait()


def serve(descriptor: int) -> None:
    """Be a worker: a function comes through the connection, then items for it."""
    connection, told = Connection(descriptor), _Told()
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=[connection, inbox], daemon=True).start()

    def tell(kind: str, content: Any) -> None:
        connection.send_bytes(to_text((kind, content)).encode())

    def progress(num_bytes: int) -> None:
        if sum_ := told.add(num_bytes):
            tell("progress", sum_)

    function = None
    while True:
        content = inbox.get()
        try:
            if function is None:
                function = from_text(content)
                continue
            function(from_text(content), progress)
            message = ("done", None)
        except BaseException as error:
            message = ("failed", error)
        if rest := told.take():
            tell("progress", rest)
        tell(*message)


def _listen(connection: Connection, inbox: queue.SimpleQueue) -> None:
    """Put what comes into the inbox; when the other process is gone, go at once."""
    while True:
        try:
            inbox.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)


class _Told:
    """Bytes that have been worked on and not been told of."""

    def __init__(self):
        self._num_bytes, self._when = 0, 0.0

    def add(self, num_bytes: int) -> int:
        """What to tell now: all of them, or 0 if the last time was just before."""
        self._num_bytes += num_bytes
        return self.take() if time.monotonic() - self._when > TELL_SECONDS else 0

    def take(self) -> int:
        num_bytes, self._num_bytes, self._when = self._num_bytes, 0, time.monotonic()
        return num_bytes


def run_on_beam(
    function: Function,
    items: Sequence[Any],
    options: Sequence[str],
    *,
    label: Callable[[Any], str] = str,
    progress: Progress = lambda num_bytes: None,
    still: Callable[[str], None] = lambda text: None,
) -> None:
    """As `run_in_pool`, in a Beam pipeline, which has ways of its own to tell.

    Args:
      options: of the pipeline, such as --runner=DataflowRunner.
    Raises:
      ConfigError: if Beam is not installed; whatever the pipeline raises.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ConfigError(
            "Apache Beam is not installed: pip install 'gptjax[beam]', or leave out --beam"
        ) from error
    with beam.Pipeline(options=PipelineOptions([*options])) as pipeline:
        apart = pipeline | beam.Create([to_text(item) for item in items]) | beam.Reshuffle()
        _ = apart | beam.Map(_call, to_text(function))


def _call(item: str, function: str) -> None:
    _function_of(function)(from_text(item), lambda num_bytes: None)


@cache  # what comes with it, such as a tokenizer, may take a while to load
def _function_of(text: str) -> Function:
    return from_text(text)
