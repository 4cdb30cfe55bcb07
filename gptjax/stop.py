"""Requests to stop a run, in whatever it is just doing."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NoReturn, Self

from gptjax.errors import NO_ERRORS, STOPPED, end_process, last_line
from gptjax.events import Events

LAST_ACTS_SECONDS = 6  # that they may take; among them is process 0's wait for the others


class Interrupted(RuntimeError):
    """The run was asked to stop, and its last step is saved: the same command goes on from
    there.
    """


class Leaving:
    """The way out of the process from a thread, while the main one is busy and cannot be stopped.

    with Leaving(events) as leave:
        leave.after(lock.release)
        ...
        leave(75, "by SIGTERM")  # in any thread; it does not return
    """

    def __init__(self, events: Events):
        self._events, self._last_acts = events, []
        self._turn = threading.Lock()
        self._said: tuple[int, str] | None = None

    def after(self, act: Callable[[], None]) -> None:
        """Do this before the process ends; what was asked last is done first."""
        self._last_acts.append(act)

    def __call__(self, code: int, message: str) -> NoReturn:
        # Who comes second waits here for the end, unless an act of the first waits for ever: for
        # JAX's coordinator, perhaps, which stands still while JAX aborts the process.
        if self._turn.acquire(timeout=LAST_ACTS_SECONDS):
            self._said = code, message
            self._events.write("stop" if code in NO_ERRORS else "error", code=code, message=message)
            for act in reversed(self._last_acts):
                with suppress(Exception):
                    act()
        while self._said is None:  # the main thread is on its way out, without any of this
            self._turn.acquire()
        code, message = self._said
        with suppress(OSError, ValueError):
            print(last_line(code, message), file=sys.stderr)
        end_process(code)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._turn.acquire()  # a thread that is leaving already has the last word


class Stop:
    """Whether a run is to stop, and after what.

    A run counts what it begins: its steps, and the batches of its evaluations. While nothing was
    begun there is nothing to lose, so a request ends the process at once, whatever it is doing.
    Later it lets what was begun come to its end, and nothing more begin.

        with Stop(leave) as stop:
            ...  # compile, restore
            while stop.begin():
                ...  # a step
            ...  # save
            stop.all_is_saved()  # and again there is nothing to lose

    All processes of a run begin the same in the same order, so a count is a place that all of them
    come to. When one is asked to stop, each tells how much it has begun and waits; all of them go
    on to the largest count. The watchdog carries these messages.

    Requests are SIGTERM and SIGINT. A second one ends the process at once, with 143 or 130.
    """

    def __init__(self, leave: Leaving, *, alone: bool = True):
        """alone: False for one of several processes."""
        self._leave, self._alone = leave, alone
        self._changed = threading.Condition()
        self._last: int | None = None  # the count to stop at
        self._saved = False
        self._handlers: dict[int, Any] = {}
        self.count = 0
        self.asked = ""  # why, if it is to stop
        # Done when nothing more may begin: who waits for what may never come looks at it.
        self.request: Future[None] = Future()

    def begin(self) -> bool:
        """Whether the next step or batch may begin; it is counted."""
        with self._changed:
            if self.asked:  # until it is known how much the other processes have begun
                self._changed.wait_for(lambda: self._last is not None)
            if self._last is not None and self.count >= self._last:
                self._end_begun()
                return False
            self.count += 1
            if self.count == self._last:
                self._end_begun()
            return True

    def all_is_saved(self) -> None:
        """Nothing can be lost any more.

        Raises:
          Interrupted: if it is to stop.
        """
        with self._changed:
            self._saved = True
            if self._last is not None:
                raise Interrupted(f"by {self.asked}: everything is saved")

    def ask(self, why: str) -> int:
        """Ask to stop, from any thread; what was begun, which is all until `stop_at` is called."""
        with self._changed:
            self.asked = self.asked or why
            count = self.count
        if self._alone:
            self.stop_at(count)
        return count

    def stop_at(self, count: int) -> None:
        """Stop when so much was begun."""
        with self._changed:
            self._last = count
            self._changed.notify_all()
            if self.count >= count:
                self._end_begun()
            at_once = count == 0 or self._saved
        if at_once:
            where = "after the last step" if self._saved else "before the first step"
            self._leave(STOPPED, f"by {self.asked}, {where}: nothing is lost")

    def _end_begun(self) -> None:
        if not self.request.done():
            self.request.set_result(None)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # none else may have handlers
            self._listen()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup_before)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            os.write(self._writing, b"\0")
            self._listener.join()
            os.close(self._reading)
            os.close(self._writing)

    def _listen(self) -> None:
        """Hear signals on a thread: the main one hears them only between two lines of Python."""
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._listener = threading.Thread(target=self._hear, name="signals", daemon=True)
        self._listener.start()
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.getsignal(number)
            signal.signal(number, lambda *_: None)

    def _hear(self) -> None:
        requests = 0
        while number := os.read(self._reading, 1)[0]:
            if number not in self._handlers:
                continue
            requests += 1
            name = signal.Signals(number).name
            if requests > 1:
                with suppress(OSError, ValueError):
                    line = last_line(128 + number, f"by {name}, the second request")
                    print(line, file=sys.stderr)
                end_process(128 + number)
            # On a thread of its own: to leave takes a moment, in which a second one must be heard.
            threading.Thread(target=self.ask, args=(name,), name="stop", daemon=True).start()
