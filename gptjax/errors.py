"""How a command ends: exit codes, and the last line on stderr."""

import errno
import os
import sys
import traceback
from contextlib import suppress
from typing import NoReturn

# By the name of an exception's class, for their files import JAX.
EXIT_CODES = {
    "ConfigError": 2,
    "DataError": 3,
    "CheckpointError": 4,
    "DivergenceError": 5,
    "NotFiniteError": 5,
    "OSError": 6,
    "BusyError": 7,
    "DifferenceError": 8,
    "Interrupted": 75,
    "KeyboardInterrupt": 130,
}
BUG = 1
# Of a run of several processes, in those that have done nothing wrong.
PEER_FAILED = 42  # by a bug; other errors have their own code in all processes
PEER_LOST = 43
STUCK = 44  # in all of them, and in a single one
STOPPED = 75  # and can go on
NO_ERRORS = (STOPPED, 130, 143)  # the user, or the machine, asked for it

# What to do about a failure of the file system, where the operating system's words do not say it.
REMEDIES = {
    errno.ENOSPC: "free some space, or give another folder",
    errno.EDQUOT: "free some space, or give another folder",
    errno.EROFS: "give a folder that can be written",
    errno.EACCES: "give a folder that you may read and write",
    errno.EPERM: "give a folder that you may read and write",
    errno.EIO: "check the disk",
}


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code of an error, and what the user reads: what failed, where, what to do."""
    names = (kind.__name__ for kind in type(error).__mro__)
    code = next((EXIT_CODES[name] for name in names if name in EXIT_CODES), BUG)
    if isinstance(error, KeyboardInterrupt):
        return code, "by the keyboard"
    if isinstance(error, OSError):
        where = f" -- {error.filename}" if error.filename else ""
        remedy = REMEDIES.get(error.errno, "check the path")
        return code, f"{error.strerror or error}{where} -- {remedy}"
    if code == BUG:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        where = f"{frame.filename}:{frame.lineno}"
        return code, f"{what} -- {where} -- run again with --debug and report the traceback"
    return code, str(error)


def last_line(code: int, message: str) -> str:
    """What the last line on stderr says."""
    return f"gptjax: {'stopped' if code in NO_ERRORS else 'error'}[{code}]: {message}"


def end_process(code: int) -> NoReturn:
    """End at once, whatever other threads do; what was printed is out."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
