"""The log of events: lines that survive, and seconds that add up."""

import json
import threading
import time

import pytest

from gptjax import events
from gptjax.events import Events, Spent, process_began, read_events


def lines_of(folder):
    return list(read_events(folder))


def test_seconds_add_up_to_those_since_the_process_began():
    began = time.time() - 5
    spent = Spent(began)
    with spent.of("train"):
        time.sleep(0.05)
        with spent.of("evaluation"):
            time.sleep(0.03)
        with pytest.raises(KeyError), spent.of("checkpoint"):
            raise KeyError
        time.sleep(0.02)
    read = spent.read()
    assert sum(read.values()) == pytest.approx(time.time() - began, abs=0.01)
    assert read["start_up"] == pytest.approx(5, abs=0.01)
    assert 0.03 <= read["evaluation"] < read["train"]
    assert read["checkpoint"] < 0.01


def test_another_thread_spends_nothing_of_the_main_one():
    spent = Spent()

    def compile_it():
        with spent.of("compile"):
            time.sleep(0.02)

    thread = threading.Thread(target=compile_it)
    thread.start()
    thread.join()
    assert spent.read().keys() == {"start_up"}


def test_what_is_moved_is_not_lost():
    spent = Spent()
    with spent.of("data_wait"):
        time.sleep(0.03)
    before = spent.read()
    spent.move(0.02, "data_wait", "train")
    after = spent.read()
    assert after["train"] == pytest.approx(0.02)
    assert after["data_wait"] == pytest.approx(before["data_wait"] - 0.02, abs=1e-3)


def test_attempts_are_counted_and_end_with_their_outcome(tmp_path):
    with Events(tmp_path, began=time.time() - 2) as log:
        log.start(0, jax="1")
        with log.phase("restore", step=3):
            time.sleep(0.01)
        log.step = 7
        log.progress()
    with pytest.raises(ValueError, match="too bad"), Events(tmp_path) as log:
        log.start(7)
        raise ValueError("too bad")
    first, phase, progress, end, second, failed = lines_of(tmp_path)
    assert (first["attempt"], first["step"], first["jax"]) == (1, 0, "1")
    assert first["spent"]["start_up"] == pytest.approx(2, abs=0.1)
    assert phase["phase"] == "restore" and phase["seconds"] >= 0.01
    assert progress["step"] == 7 and progress["spent"]["restore"] >= 0.01
    assert (end["outcome"], end["step"]) == ("done", 7)
    assert second["attempt"] == 2
    assert (failed["outcome"], failed["message"]) == ("ValueError", "too bad")


def test_a_run_that_was_refused_says_nothing_of_its_end(tmp_path):
    with pytest.raises(ValueError, match="no"), Events(tmp_path):
        raise ValueError("no")
    assert lines_of(tmp_path) == []


def test_other_processes_write_events_but_no_accounts(tmp_path):
    with Events(tmp_path, process=1) as log:
        log.start(0)
        log.write("error", code=3)
        log.progress()
    (line,) = lines_of(tmp_path)
    assert (line["process"], line["event"], line["code"]) == (1, "error", 3)


def test_while_it_waits_a_run_still_tells_what_its_time_goes_to(tmp_path, monkeypatch):
    monkeypatch.setattr(events, "EVERY_SECONDS", 0.02)
    with Events(tmp_path) as log:
        log.start(0)
        with log.spent.of("data_wait"):
            time.sleep(0.2)
            inside = lines_of(tmp_path)
    assert len(inside) > 3
    assert inside[-1]["spent"]["data_wait"] > inside[1]["spent"]["data_wait"] > 0


def test_a_cut_line_spoils_no_other(tmp_path):
    log = Events(tmp_path)
    log.write("save", step=1)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 3, "process": 0, "ev')
    assert [line["step"] for line in lines_of(tmp_path)] == [1]
    log.write("save", step=2)
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b"\xff\xfe[1]\n[]\n{}\n")
    log.write("save", step=3)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path):
    for folder in (None, tmp_path / "none_such"):
        with Events(folder) as log:
            log.start(0)
            with log.phase("compile"):
                pass
            log.progress()
    assert list(tmp_path.iterdir()) == []
    assert lines_of(tmp_path) == []


def test_lines_are_json_whatever_is_in_them(tmp_path):
    Events(tmp_path).write("error", what=tmp_path, text="é\n\"'")
    (text,) = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(text)["what"] == str(tmp_path)


def test_this_process_began_before_now():
    assert 0 < time.time() - process_began() < 24 * 3600
