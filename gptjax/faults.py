"""Faults on purpose: named instants at which a test can make a run fail, exactly.

    arm("renamed:kill9@3,batch_read:sleep=2")

arms two of them: the third time that the run comes to the point `renamed` its process is killed,
and the first time that a batch is read it takes two seconds longer. Where nothing is armed, a point
costs one look into an empty dict. The command line arms what the environment's `GPTJAX_FAULT` says.
"""

import errno
import os
import signal
import sys
import threading
import time
from typing import NamedTuple

# Where a run can be made to fail, in the order in which it comes there.
POINTS = (
    "locked",  # the run directory is this run's alone
    "prepare",  # before text is read and tokenised, in process 0
    "compile",  # on the thread that compiles
    "restore",  # before a checkpoint is read
    "batch_read",  # on the thread that makes batches ahead
    "step_end",  # a step is dispatched, its metrics are not fetched
    "evaluate",
    "sample",  # everything is saved
    "copied",  # a save has its own copy of the state
    "written",  # all files of a save are written, none is certain to stay
    "sealed",  # with its manifest, and certain to stay
    "renamed",  # it counts
    "deleting",  # an old step is half removed
)
ACTIONS = (
    "kill9",  # kill this process
    "term",  # what a cluster sends to a job that must go
    "stop",  # stop this process, as a debugger does
    "hang",  # sleep for ever
    "sleep",  # sleep=SECONDS
    "raise",  # an error in the code
    "enospc",  # no space left on the device
    "eio",  # the device fails
    "nan",  # what is computed here is not a number: the caller sees to it
)


class _Fault(NamedTuple):
    action: str
    value: float  # of sleep: seconds
    first: int  # the visit to the point at which it happens
    last: int  # and the last one


_armed: dict[str, list[_Fault]] = {}
_visits: dict[str, int] = {}
_lock = threading.Lock()


def arm(text: str) -> None:
    """Arm faults, `POINT:ACTION`, `POINT:ACTION@N`, `POINT:ACTION@N-M` or with `=VALUE` after the
    action, separated by commas; "" disarms all. Visits of a point are counted from 1.

    Raises:
      ValueError: for a point or an action that there is not.
    """
    _armed.clear()
    _visits.clear()
    for one in filter(None, text.split(",")):
        point, _, rest = one.partition(":")
        what, _, when = rest.partition("@")
        action, _, value = what.partition("=")
        if point not in POINTS or action not in ACTIONS:
            raise ValueError(f"{one!r}: give POINT:ACTION of {POINTS} and {ACTIONS}")
        first, _, last = (when or "1").partition("-")
        fault = _Fault(action, float(value or 0), int(first), int(last or first))
        _armed.setdefault(point, []).append(fault)


def at(point: str) -> bool:
    """Do what is armed for this visit of a point; whether that is "nan"."""
    if not _armed:
        return False
    with _lock:  # points are visited by several threads
        _visits[point] = visit = _visits.get(point, 0) + 1
    poisoned = False
    for fault in _armed.get(point, ()):
        if fault.first <= visit <= fault.last:
            poisoned |= fault.action == "nan"
            _happen(fault, point)
    return poisoned


def _happen(fault: _Fault, point: str) -> None:
    # Whoever armed it may wait for this. Not print, which writes the end of the line by itself:
    # another thread may come between.
    sys.stderr.write(f"gptjax: fault on purpose: {fault.action} at {point}\n")
    sys.stderr.flush()
    match fault.action:
        case "kill9":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            while True:
                time.sleep(3600)
        case "sleep":
            time.sleep(fault.value)
        case "raise":
            raise RuntimeError(f"a fault on purpose at {point}")
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)
        case "eio":
            raise OSError(errno.EIO, os.strerror(errno.EIO), point)
