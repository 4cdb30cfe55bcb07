"""Processes that fail, are lost or are stuck: all of a run end soon, with the cause in every log.

The processes talk through the key-value store that JAX's coordinator, in process 0, keeps for them:

gptjax/news/fatal   the cause of the end; who comes first has the word
gptjax/news/quiet   processes that have not been heard of for some seconds
gptjax/news/stop/I  how much process I had begun when it learned that the run is to stop
gptjax/beat/I       how often process I was heard, and where it is
gptjax/left/I       process I needs the store no more
"""

import ctypes
import faulthandler
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple, NoReturn, Self

import jax
from jax._src.distributed import global_state  # the store has no public name

from gptjax.config import GuardConfig
from gptjax.errors import BUG, PEER_FAILED, PEER_LOST, STUCK, explain
from gptjax.stop import Interrupted, Leaving, Stop

HEARTBEAT_SECONDS = 20  # without a sign of a process before JAX takes it for dead
POLL_SECONDS = 0.25
BEAT_SECONDS = 1
QUIET_SECONDS = 6  # without a beat before a process is under suspicion
GRACE_SECONDS = 1  # for an error of its own to come out, where all processes meet the same
ANSWER_SECONDS = 0.4  # that processes may take to answer a request to stop before it is told
LINGER_SECONDS = 3  # at most, that process 0 keeps the store up for the others

# Words of errors that say no more than that another process has gone.
ECHOES = ("gloo", "nccl", "connection", "socket", "unavailable", "deadline", "cancelled", "aborted")


class Fatal(NamedTuple):
    """The cause of the end of a run, as all its processes tell it."""

    code: int  # of those that have done nothing wrong
    process: int
    message: str


class Watchdog:
    """Ends this process when it is stuck, and when another one has failed or is lost.

        with Watchdog(guard, stop, leave) as watchdog:
            with watchdog.phase("start"):
                ...
            with watchdog.phase("step"):
                while stop.begin():
                    ...

    A phase has a limit; whenever something is begun, it starts anew.
    """

    def __init__(self, guard: GuardConfig, stop: Stop, leave: Leaving):
        self._limits = {
            "start": guard.start_seconds,
            "step": guard.step_seconds,
            "evaluate": guard.evaluate_seconds,
            "save": guard.save_seconds,
        }
        self._stop, self._leave = stop, leave
        self._me, self._count = jax.process_index(), jax.process_count()
        self._store = global_state.client if self._count > 1 else None
        self._phase = "prepare"
        self._closed, self._open = threading.Event(), ExitStack()
        self._failed = False  # this process has an error of its own
        self._quiet: list[int] = []
        self._asked: float | None = None  # when this process told the others that it is to stop
        self._heard = time.monotonic()  # when the store last answered
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if self._store:
            self._threads.append(threading.Thread(target=self._talk, name="peers", daemon=True))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done now has the limit of this phase; other names have none."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the other processes of an error before anything is wound up, which may take long."""
        try:
            yield
        except Exception as error:
            self._tell(error)
            raise

    def __enter__(self) -> Self:
        if self._store:
            self._open.enter_context(_on_abort(self._lost_by_abort))
            self._leave.after(self._take_leave)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception):
            self._tell(error)
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=LINGER_SECONDS)  # it may wait for a store that does not answer
        if self._failed:
            with suppress(jax.errors.JaxRuntimeError):  # the error of this process stays its own
                self._take_leave()
        if self._store and self._me == 0 and isinstance(error, Interrupted):
            self._store.key_value_delete("gptjax/news/")  # a next run is not asked to stop
        self._open.close()

    # --- this process ----------------------------------------------------------------------------

    def _watch(self) -> None:
        """End the process when the place where it is stays the same for too long.

        Time in which this thread did not run either is no time: the process was stopped, or the
        machine slept.
        """
        place, seconds, before = None, 0.0, time.monotonic()
        while not self._closed.wait(POLL_SECONDS):
            now = time.monotonic()
            seconds, before = seconds + min(now - before, 1.0), now
            if place != (here := (self._stop.count, self._phase)):
                place, seconds = here, 0.0
            limit = self._limits.get(self._phase)
            if limit and seconds > limit:
                self._end_stuck(limit)

    def _end_stuck(self, limit: float) -> NoReturn:
        faulthandler.dump_traceback(sys.stderr)
        where, who = f"in phase {self._phase!r} after {self._stop.count:,} steps and batches", ""
        process = self._me
        if self._store:
            with suppress(jax.errors.JaxRuntimeError):  # it may answer no more
                process, who = self._laggard()
        fatal = Fatal(
            STUCK,
            process,
            f"stuck: {who}nothing came to its end for {limit:g} seconds, {where} -- the stacks of "
            f"all threads are above -- see what they wait for, or raise the guard's limits",
        )
        if self._store:
            fatal = self._publish(fatal)
        self._leave(fatal.code, fatal.message)

    def _laggard(self) -> tuple[int, str]:
        """The process that has begun the least, for which the others wait."""
        begun = {process: beat[1] for process, beat in self._beats().items()}
        least = min(begun.values(), default=0)
        behind = [process for process, count in begun.items() if count == least]
        if len(behind) < len(begun):
            names = ", ".join(map(str, sorted(behind)))
            return min(behind), f"process {names}, which has begun the least; "
        return self._me, "all processes have begun as much; "

    # --- the others ------------------------------------------------------------------------------

    def _talk(self) -> None:
        """Exchange news with the other processes."""
        beats, next_beat, failures = 0, 0.0, 0
        seen: dict[int, tuple[list, float]] = {}
        while not self._closed.wait(POLL_SECONDS):
            try:
                if time.monotonic() >= next_beat:
                    beats, next_beat = beats + 1, time.monotonic() + BEAT_SECONDS
                    self._set(f"beat/{self._me}", [beats, self._stop.count, self._phase])
                    if self._me == 0:
                        self._suspect(seen)
                news = self._get("news/")
                self._heard, failures = time.monotonic(), 0
                self._quiet = news.pop("quiet", [])
                if "fatal" in news:
                    self._end_with(Fatal(*news.pop("fatal")))
                self._agree(news)
            except jax.errors.JaxRuntimeError:
                failures += 1
                if failures > 1 and self._me and not self._failed:
                    self._end_lost([0])

    def _agree(self, stops: dict[str, int]) -> None:
        """Where to stop, once all processes have told how much they have begun."""
        if not stops and not self._stop.asked:
            return
        if self._asked is None:
            self._set(f"news/stop/{self._me}", self._stop.ask("another process's signal"))
            self._asked = time.monotonic()
        elif len(stops) == self._count:
            self._stop.stop_at(max(stops.values()))
        else:
            self._miss([i for i in range(self._count) if f"stop/{i}" not in stops])

    def _miss(self, silent: list[int]) -> None:
        """Say who does not answer, and wait for no one who is lost.

        `mpirun` asks processes to stop because another one was killed, and kills them soon.
        """
        if lost := [process for process in silent if process in self._quiet]:
            self._end_lost(lost)
        if 0 < self._asked < time.monotonic() - ANSWER_SECONDS:
            names, self._asked = ", ".join(map(str, silent)), 0.0
            words = f"gptjax: to stop by {self._stop.asked}, but process {names} does not answer"
            print(words, file=sys.stderr, flush=True)

    def _suspect(self, seen: dict[int, tuple[list, float]]) -> None:
        """Tell which processes have become quiet; the clocks of others do not matter."""
        now = time.monotonic()
        for process, beat in self._beats().items():
            if process not in seen or seen[process][0] != beat:
                seen[process] = (beat, now)
        quiet = [process for process, (_, when) in seen.items() if now - when > QUIET_SECONDS]
        if quiet != self._quiet:
            self._set("news/quiet", quiet)

    def _end_with(self, fatal: Fatal) -> None:
        """End as another process wants it, unless there is an error of this one's own."""
        time.sleep(GRACE_SECONDS)
        if self._failed or self._closed.is_set():
            return
        if fatal.code == STUCK:
            faulthandler.dump_traceback(sys.stderr)
        self._leave(fatal.code, fatal.message)

    def _end_lost(self, processes: list[int]) -> NoReturn:
        names = ", ".join(map(str, processes))
        cause = "it was killed, or its machine or the network failed"
        message = f"peer lost: process {names} -- {cause} -- start all processes again, they go on"
        fatal = Fatal(PEER_LOST, processes[0], message)
        if 0 in processes:
            self._store = None  # it answers no more
        if self._store:
            fatal = self._publish(fatal)
        self._leave(fatal.code, fatal.message)

    def _lost_by_abort(self) -> None:
        """JAX aborts this process, which it does when another one is lost: say so, and which."""
        silent = time.monotonic() - self._heard > QUIET_SECONDS
        if self._me and not silent and not self._quiet:
            silent = not _answers(global_state.coordinator_address)
        if self._me and silent:
            self._end_lost([0])
        if self._quiet:
            self._store = None  # it answers no more
            self._end_lost(self._quiet)

    def _tell(self, error: Exception) -> None:
        """Tell the others that this process fails, and why."""
        if not self._store or self._failed or isinstance(error, Interrupted):
            return
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        if isinstance(error, jax.errors.JaxRuntimeError) and any(
            word in what.lower() for word in ECHOES
        ):
            self._await_cause()
        self._failed = True
        # An error that would come again has its code in all processes, so that whoever starts runs
        # again sees it whichever of them it looks at.
        code, _ = explain(error)
        code = PEER_FAILED if code == BUG else code
        with suppress(jax.errors.JaxRuntimeError):
            message = f"peer failed: process {self._me}: {what} -- see its log"
            self._publish(Fatal(code, self._me, message))

    def _await_cause(self) -> None:
        """Wait for what another process tells of itself, or until one is known to be lost."""
        until = time.monotonic() + HEARTBEAT_SECONDS + QUIET_SECONDS
        while time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            if self._quiet:
                self._end_lost(self._quiet)

    def _take_leave(self) -> None:
        """Process 0 has the store, so it goes last of those that are not lost."""
        if not self._store:
            return
        if self._me:
            self._set(f"left/{self._me}", True)
            return
        until = time.monotonic() + LINGER_SECONDS
        others = self._count - 1 - len(self._quiet)
        while time.monotonic() < until and len(self._get("left/")) < others:
            time.sleep(POLL_SECONDS / 4)

    # --- the store -------------------------------------------------------------------------------

    def _publish(self, fatal: Fatal) -> Fatal:
        """Make this the cause of the end; what is the cause if another one was first."""
        with suppress(jax.errors.JaxRuntimeError):
            self._store.key_value_set("gptjax/news/fatal", json.dumps(fatal))
            return fatal
        with suppress(jax.errors.JaxRuntimeError):
            return Fatal(*self._get("news/").get("fatal", fatal))
        return fatal

    def _beats(self) -> dict[int, list]:
        return {int(process): beat for process, beat in self._get("beat/").items()}

    def _set(self, name: str, value: Any) -> None:
        self._store.key_value_set(f"gptjax/{name}", json.dumps(value), allow_overwrite=True)

    def _get(self, folder: str) -> dict[str, Any]:
        """What is in a folder, by name."""
        found = self._store.key_value_dir_get(f"gptjax/{folder}")
        return {path.rpartition(f"gptjax/{folder}")[2]: json.loads(text) for path, text in found}


def join_processes(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Find the other processes of a run: as given, or as the cluster says if it is all None.

    Signals are left to `Stop`, which also hears them before the first step.

    Raises:
      ValueError: by JAX, if there is no cluster, or it does not say all that is needed.
    """
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=120,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=10,  # for the others, when one has failed
    )
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        # Programs that were compiled by another process mix up the messages of their collectives.
        jax.config.update("jax_enable_compilation_cache", False)


def _answers(address: str) -> bool:
    """Whether anyone listens there."""
    host, _, port = address.rpartition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=2):
        return True
    return False


@contextmanager
def _on_abort(act: Callable[[], None]) -> Iterator[None]:
    """Let a function have the last word when C++ aborts the process.

    JAX does that where a process is lost, and lets no Python code say anything: a handler of
    Python's own `signal` would be called later, which is never.
    """
    handler_type = ctypes.CFUNCTYPE(None, ctypes.c_int)
    handler = handler_type(lambda number: act())
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes = [ctypes.c_int, ctypes.c_void_p]
    set_handler.restype = ctypes.c_void_p
    before = set_handler(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        set_handler(signal.SIGABRT, before)
