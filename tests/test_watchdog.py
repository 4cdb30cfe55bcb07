"""When one process of a run fails, is lost or is stuck, all of them end, and say why."""

import threading
import time

import pytest
from launch import finish, make_folder, start_processes

from gptjax.config import GuardConfig
from gptjax.events import Events
from gptjax.stop import Leaving, Stop
from gptjax.watchdog import Watchdog

RAISED = "RuntimeError: a fault on purpose at batch_read"
STUCK = "error[44]: stuck: process 1, which has begun the least; nothing came to its end for 5 sec"
# What process 1 does at its fourth step, the last words of both, their codes, and within how many
# seconds of each other they end; a machine with much to do is given half as many again.
ENDS = {
    "is killed": ("step_end:kill9@4", ("error[43]: peer lost: process 1 -- ", ""), (43, -9), 30),
    "fails": (
        "batch_read:raise@4",
        (f"error[42]: peer failed: process 1: {RAISED} -- see its log", f"error[1]: {RAISED}"),
        (42, 1),
        5,
    ),
    "cannot read": (
        "batch_read:eio@4",
        ("error[6]: peer failed: process 1: OSError: [Errno 5]", "error[6]: Input/output error"),
        (6, 6),
        5,
    ),
    "is stuck": ("step_end:hang@4", (STUCK, STUCK), (44, 44), 5),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("peers"))


def ends_of(processes):
    """The output of each, and when it ended."""
    ends = [None] * len(processes)

    def wait(i):
        ends[i] = (processes[i].communicate(timeout=120)[0], time.monotonic())

    threads = [threading.Thread(target=wait, args=(i,)) for i in range(len(processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_when_one_process_ends_badly_both_end_and_say_why(folder, end):
    fault, words, codes, seconds = ENDS[end]
    # Where one is stuck, nothing else makes the other wait before its next step.
    limit, save_every = ("5", "100") if end == "is stuck" else ("60", "3")
    options = ("--steps", "40", "--save-every", save_every, "--guard.step-seconds", limit)
    processes = start_processes(folder, end, 2, *options, faults=["", fault])
    ends = ends_of(processes)
    outputs = [output for output, _ in ends]
    assert [process.returncode for process in processes] == [*codes], outputs
    assert abs(ends[0][1] - ends[1][1]) < 1.5 * seconds
    for output, said in zip(outputs, words, strict=True):
        assert output.splitlines()[-1].startswith(f"gptjax: {said}" if said else ""), output
    if end == "is stuck":
        assert all("faults.py" in output or "watchdog.py" in output for output in outputs)
        assert "in _happen" in outputs[1]


@pytest.mark.slow
def test_when_the_coordinator_is_killed_the_other_says_so(folder):
    processes = start_processes(folder, "first", 2, faults=["step_end:kill9@4", ""])
    finish(processes[0], -9)
    last = finish(processes[1], 43).splitlines()[-1]
    assert last.startswith("gptjax: error[43]: peer lost: process 0 -- ")


@pytest.mark.slow
def test_every_process_refuses_a_busy_run_directory(folder):
    (folder / "busy").mkdir()
    holder = start_processes(folder, "busy", 2, faults=["compile:sleep=90", ""])
    while not (folder / "busy" / "config.json").exists():
        time.sleep(0.05)
    for process in start_processes(folder, "busy", 2):
        last = finish(process, 7).splitlines()[-1]
        assert last.startswith(f"gptjax: error[7]: busy is in use by process {holder[0].pid} on")
    holder[1].terminate()
    for process in holder:
        finish(process, 75)


# --- one process ---------------------------------------------------------------------------------


@pytest.fixture
def left(monkeypatch):
    """The codes and words of threads that would have ended the process."""
    ends = []

    def leave(self, code, message):
        ends.append((code, message))
        raise SystemExit  # of the thread

    monkeypatch.setattr(Leaving, "__call__", leave)
    return ends


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_alone_is_found_stuck_too(left, capfd):
    leave = Leaving(Events(None))
    stop = Stop(leave)
    with Watchdog(GuardConfig(step_seconds=0.6), stop, leave) as watchdog:
        for _ in range(4):  # longer than the limit in all
            with watchdog.phase("step"):
                stop.begin()
                time.sleep(0.3)
        time.sleep(1)  # in no phase that has a limit
        assert not left
        with watchdog.phase("step"):
            time.sleep(2)
    ((code, message),) = left
    assert code == 44 and "for 0.6 seconds, in phase 'step' after 4 steps" in message
    assert "test_watchdog.py" in capfd.readouterr().err  # the stacks
