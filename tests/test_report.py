"""What the time of a run went to: every second is counted once, whatever ended the run."""

import html.parser
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gptjax import cli
from gptjax.config import Config, DataConfig
from gptjax.events import read_events
from gptjax.page import downsample, log_ticks, page, ticks, write_page
from gptjax.report import PARTS, facts, goodput, read, summary
from gptjax.rundir import save_run
from gptjax.tokenizer import ByteTokenizer


def start(time, step, attempt=1, spent=2.0, **fields):
    times = {"time": time, "began": time - spent, "spent": {"start_up": spent}}
    return {"process": 0, "event": "start", "step": step, "attempt": attempt} | times | fields


def progress(time, step, event="progress", **spent):
    return {"time": time, "process": 0, "event": event, "step": step, "spent": spent}


def event(time, name, **fields):
    return {"time": time, "process": 0, "event": name} | fields


# An attempt that saved step 10 and was killed after step 15, one that did nothing, and one to the
# end that was stopped for a save.
KILLED = [
    start(102.0, 0),
    progress(110.0, 10, start_up=2.0, compile=3.0, train=5.0),
    event(110.1, "save", step=10),
    progress(114.0, 15, start_up=2.0, compile=3.0, train=8.0, data_wait=1.0),
]
AGAIN = [start(126.0, 10, 2, spent=1.0)]
ENDED = [
    start(132.0, 10, 3),
    progress(137.0, 18, start_up=2.0, train=4.0, evaluation=1.0),
    progress(138.0, 20, "end", start_up=2.0, train=5.0, evaluation=1.0) | {"outcome": "done"},
]


def test_parts_add_up_and_lost_steps_are_told_apart():
    found = goodput([*KILLED, *AGAIN, *ENDED])
    assert found.wall == pytest.approx(38.0)
    assert sum(found.parts.values()) == pytest.approx(found.wall)
    told = {name: seconds for name, seconds in found.parts.items() if abs(seconds) > 1e-9}
    assert told == pytest.approx(
        {
            "productive": 10.0,  # 5 to step 10, and 5 in the last attempt
            "done again": 3.0,
            "data wait": 1.0,
            "evaluation": 1.0,
            "compile": 3.0,
            "start-up": 5.0,
            "restart": 15.0,  # 114 to 125, and 126 to 130
        }
    )
    assert (found.steps, found.lost_steps, found.counts["save"]) == (20, 5, 1)
    assert [one.outcome for one in found.attempts] == ["killed", "killed", "done"]


def test_steps_that_are_lost_twice_count_twice():
    # Two attempts from step 10 are lost, and then step 10 itself, which turned out to be damaged.
    second = [
        start(126.0, 10, 2),
        progress(130.0, 14, start_up=2.0, train=4.0),
    ]
    third = [
        start(142.0, 5, 3),
        progress(147.0, 10, "end", start_up=2.0, train=5.0) | {"outcome": "done"},
    ]
    found = goodput([*KILLED, *second, *third])
    assert found.lost_steps == 5 + 4 + 5
    assert found.parts["done again"] == pytest.approx(3.0 + 4.0 + 2.5)
    assert found.parts["productive"] == pytest.approx(2.5 + 5.0)
    assert found.steps == 10
    fourth = start(157.0, 2, 4)  # and all of the third, and steps 3 to 5 of the first
    found = goodput([*KILLED, *second, *third, fourth])
    assert found.lost_steps == 14 + 5 + 3
    assert found.parts["productive"] == pytest.approx(1.0)


def test_a_rollback_loses_steps_too():
    events = [
        *KILLED,
        event(114.0, "rollback", step=15, to_step=10),
        progress(120.0, 16, start_up=2.0, compile=3.0, train=14.0, data_wait=1.0),
    ]
    found = goodput(events)
    assert (found.lost_steps, found.steps, found.counts["rollback"]) == (5, 16, 1)
    assert found.parts["productive"] == pytest.approx(5.0 + 6.0)


def test_how_an_attempt_ended():
    def outcome(*events, now=1000.0):
        return goodput([*KILLED, *events], now).attempts[-1].outcome

    assert outcome() == "killed"
    assert outcome(now=115.0) == "running"
    stopped = progress(115.0, 16, "end", train=1.0) | {"outcome": "Interrupted", "message": "TERM"}
    assert outcome(stopped) == "stop: TERM"
    failed = {"outcome": "OSError", "message": "disk full"}
    assert outcome(progress(115.0, 16, "end", train=1.0) | failed) == "error: disk full"
    assert outcome(event(115.0, "error", code=44, message="stuck")) == "error: stuck"


def test_events_of_other_processes_and_none_at_all():
    other = [one | {"process": 1} for one in KILLED]
    assert goodput(other) is None
    assert goodput([]) is None
    assert goodput([*KILLED, *other]) == goodput(KILLED)


def test_a_clock_that_was_set_back_loses_no_second_of_an_attempt():
    found = goodput([*KILLED, *[one | {"time": one["time"] - 100} for one in ENDED]])
    assert found.parts["restart"] >= 0
    assert found.parts["productive"] == pytest.approx(10.0)
    assert sum(found.parts.values()) == pytest.approx(found.wall)


# --- the page ------------------------------------------------------------------------------------


class Checked(html.parser.HTMLParser):
    """Every tag is closed in its turn, and nothing is loaded or run."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "img", "link", "iframe", "object")
        assert not {name for name, _ in attributes if name in ("src", "href", "onclick", "onload")}
        self.seen.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        while tag != "th" and self.open[-1] == "th":  # it may be left open
            self.open.pop()
        assert self.open.pop() == tag


def check_page(run):
    text, parser = page(run), Checked()
    parser.feed(text)
    assert parser.open == [] and "http" not in text.replace("http-equiv", "")
    return text, parser.seen


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    config = Config(name="<b>&", data=DataConfig(path=("</pre><script>x",)))
    save_run(folder, config, ByteTokenizer())
    return folder


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_page_of_a_run_that_has_nothing_yet(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gptjax", "report", str(run_dir)])
    assert cli.main() == 0
    assert "its time is not known" in capsys.readouterr().out
    text, seen = check_page(read(run_dir))
    assert "svg" not in seen and "No metrics yet" in text
    assert "&lt;b&gt;&amp;" in text and "&lt;/pre&gt;&lt;script&gt;x" in text
    assert (run_dir / "report.html").exists()


def test_a_page_of_a_run_in_progress(run_dir):
    lines = [
        {"step": n, "train/loss": 5 / n, "train/grad_norm": 10.0 ** (n % 3)} for n in (1, 2, 3)
    ]
    lines[1]["train/loss"] = None  # it was not finite
    lines[2] |= {"eval/loss": 2.0, "eval/<i>/loss": 2.5, "perf/mfu": 0.25}
    write(run_dir / "metrics.jsonl", lines)
    error = event(125.0, "error", code=1, message="<u>")
    change = {"name": "steps", "before": 10, "now": 20, "kind": "free"}
    changed = event(125.0, "config", step=2, changes=[change])
    events = [*KILLED, error, start(126.0, 2, 2, device="<a>"), changed]
    write(run_dir / "events.jsonl", events)
    for name in ("metrics.jsonl", "events.jsonl"):  # cut while it is written
        with (run_dir / name).open("a") as file:
            file.write('{"step": 4, "tra')
    run = read(run_dir)
    text, seen = check_page(run)
    assert seen.count("svg") == 3 and "NaN" not in text and "nan" not in text
    assert "eval/&lt;i&gt;/loss" in text and "&lt;u&gt;" in text and "&lt;a&gt;" in text
    assert "started again after step 2" in text and "steps 10 -&gt; 20" in text
    assert "13 more were lost" in dict(facts(run))["steps"]
    words = summary(run)
    assert all(name in words for name in ("productive", "done again", "restart", "total"))
    assert write_page(run).read_text() == page(run) or "as of" in text  # the clock may have gone on


def test_a_long_run_makes_a_small_page_that_keeps_its_extremes(run_dir):
    count = 100_000
    write(
        run_dir / "metrics.jsonl",
        ({"step": n, "train/loss": 3 + math.sin(n) + 50 * (n == 54_321)} for n in range(1, count)),
    )
    run = read(run_dir)
    text, _ = check_page(run)
    assert len(text) < 100_000
    assert "peak 53" in text
    steps, values = downsample(*map(np.asarray, run.curves["train/loss"]))
    assert len(steps) < 2500 and (np.diff(steps) > 0).all()
    assert values.max() == max(run.curves["train/loss"][1])
    assert (steps[0], steps[-1]) == (1, count - 1)


@pytest.mark.parametrize("ends", [(0, 1), (-3e-7, 5e-7), (1, 123_456_789), (99.5, 99.6)])
def test_ticks_are_round_and_few(ends):
    found = ticks(*ends)
    assert 2 <= len(found) <= 7
    assert all(ends[0] - 1e-12 <= tick <= ends[1] * (1 + 1e-9) for tick in found)


@pytest.mark.parametrize("ends", [(-0.03, 0.02), (-0.4, 0.9), (-7.2, 30.5)])
def test_ticks_of_a_logarithm_are_round_and_few(ends):
    found = log_ticks(*ends)
    assert 2 <= len(found) <= 9
    assert all(ends[0] <= math.log10(tick) <= ends[1] for tick in found)
    assert all(float(f"{tick:.3g}") == pytest.approx(tick) for tick in found)


# --- a real run ----------------------------------------------------------------------------------

EXPERIMENT = """
from gptjax import *

def config():
    return Config(
        model=GPTConfig(context_size=32, num_layers=1, width=16, num_heads=2),
        data=DataConfig(path=("text.txt",)),
        sample=SampleConfig(max_tokens=4),
        steps=60, batch_size=8, log_every=10, eval_every=30, save_every=20, tensorboard=False,
    )
"""
MAIN = "import sys; from gptjax.cli import main; sys.exit(main())"


@pytest.mark.slow
def test_the_time_of_a_run_that_is_killed_and_stopped_is_all_told(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be that is the question " * 500)
    (tmp_path / "run.py").write_text(EXPERIMENT)
    began = time.time()
    for fault, code in [
        ("step_end:kill9@35,step_end:sleep=0.3@25-34", -signal.SIGKILL),
        ("step_end:term@15,step_end:sleep=1@15", 75),  # heard, by another thread, in that step
        ("", 0),
    ]:
        done = subprocess.run(
            [sys.executable, "-c", MAIN, "train", "run.py", "--run-dir", "run"],
            cwd=tmp_path,
            env=os.environ | {"GPTJAX_FAULT": fault},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
    seconds = time.time() - began
    found = goodput(read_events(tmp_path / "run"))
    assert found.wall == pytest.approx(seconds, rel=0.1)
    parts = {name: found.parts[name] for name in PARTS if name != "other"}
    assert sum(parts.values()) == pytest.approx(found.wall, rel=0.01)
    assert all(seconds >= 0 for seconds in parts.values())
    assert [one.first_step for one in found.attempts] == [0, 20, 35]
    assert found.steps == 60
    assert 10 <= found.lost_steps <= 15  # of 21 to 35; the last may not have been told
    assert found.parts["done again"] > 1.5
    assert [one.outcome.partition(":")[0] for one in found.attempts] == ["killed", "stop", "done"]
