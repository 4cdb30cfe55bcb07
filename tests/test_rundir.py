"""A run directory is one run's at a time, and what cannot be written is known before anything is
compiled.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from test_train import small_run

from gptjax import rundir
from gptjax.rundir import BusyError, RunLock, refuse_busy
from gptjax.train import fit

OTHER = {
    "pid": 7,
    "host": "elsewhere",
    "boot": "",
    "started": "2031-01-01 00:00:00+0000",  # its clock is years ahead of ours
    "processes": 1,
    "id": "other",
    "beat": 1,
}


@pytest.fixture
def quick(monkeypatch):
    """Heartbeats at ten times the rate."""
    monkeypatch.setattr(rundir, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(rundir, "LEASE_SECONDS", 1.0)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


@contextmanager
def living(path):
    """A run on another machine, as its lock shows it."""
    ended = threading.Event()

    def beat():
        beats = 0
        while not ended.wait(0.02):
            beats += 1
            new = path.with_name("lock.new")
            new.write_text(json.dumps(OTHER | {"beat": beats}))
            new.rename(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        while not path.exists():
            time.sleep(0.01)
        yield
    finally:
        ended.set()
        thread.join()


def test_a_second_run_is_refused_at_once_and_changes_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}")
    with RunLock(tmp_path):
        before, began = files(tmp_path), time.monotonic()
        words = f"in use by process {os.getpid()} on .*, started 2.* -- wait for it"
        with pytest.raises(BusyError, match=words):
            RunLock(tmp_path).__enter__()
        with pytest.raises(BusyError, match=words):
            refuse_busy(tmp_path)
        assert time.monotonic() - began < 1
        assert files(tmp_path) == before and (tmp_path / "lock").exists()
    refuse_busy(tmp_path)
    with RunLock(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path):
    program = f"""
from pathlib import Path
from gptjax.rundir import RunLock
with RunLock(Path({str(tmp_path)!r})):
    print("locked", flush=True)
    input()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"locked\n"
    with pytest.raises(BusyError, match=f"process {holder.pid} on"):
        RunLock(tmp_path).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    said, began = [], time.monotonic()
    with RunLock(tmp_path, say=said.append):
        assert time.monotonic() - began < 1
    assert said[0].startswith(f"lock       of process {holder.pid} on ") and "dead" in said[0]


@pytest.mark.parametrize("locks", [True, False])
def test_a_run_of_another_machine_is_known_by_its_heartbeat(tmp_path, quick, monkeypatch, locks):
    if not locks:

        def has_none(file, operation):
            raise OSError(37, "No locks available")

        monkeypatch.setattr(fcntl, "flock", has_none)
    with living(tmp_path / "lock"), pytest.raises(BusyError, match="process 7 on elsewhere"):
        RunLock(tmp_path).__enter__()
    said = []
    with RunLock(tmp_path, say=said.append):  # now it counts no more
        assert "process 7 on elsewhere" in said[0]


def test_a_run_learns_that_another_has_taken_its_lock(tmp_path, quick):
    lost = threading.Event()
    with RunLock(tmp_path, lost=lambda text: lost.set()):
        (tmp_path / "lock").write_text(json.dumps(OTHER))
        assert lost.wait(5)
    assert json.loads((tmp_path / "lock").read_text()) == OTHER  # which is left alone


def test_the_count_goes_up(tmp_path, quick):
    with RunLock(tmp_path):
        beats = set()
        deadline = time.monotonic() + 5
        while len(beats) < 3 and time.monotonic() < deadline:
            beats.add(json.loads((tmp_path / "lock").read_text())["beat"])
            time.sleep(0.02)
        assert len(beats) == 3


def test_where_no_run_began_nothing_is_left(tmp_path):
    with RunLock(tmp_path / "a" / "b") as lock:
        (tmp_path / "a" / "b" / "events.jsonl").write_text("{}")
        lock.release()
    assert not any(tmp_path.iterdir())
    with RunLock(tmp_path / "a"):
        (tmp_path / "a" / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/none_such/run"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_else(tmp_path, name):
    (tmp_path / "file").write_text("")
    began = time.monotonic()
    with pytest.raises(OSError):
        fit(small_run(tmp_path), tmp_path / name)
    assert time.monotonic() - began < 5
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
