"""A request to stop is heard in every phase, and costs no step."""

import threading
import time

import pytest
from launch import assert_same, figures, finish, make_folder, start, start_processes

from gptjax.checkpoint import Checkpoints
from gptjax.events import Events
from gptjax.stop import Interrupted, Leaving, Stop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("stops"))


# Phases that one run is stopped in, one after the other, and the step that is then saved. Where it
# would go on by itself, it sleeps for longer than it may take to hear the signal.
PHASES = {
    "to prepare text": ("prepare:term,prepare:sleep=90", None),
    "to compile": ("compile:term,compile:sleep=90", None),
    "the first step": ("step_end:term,step_end:sleep=0.5", 1),
    "to restore": ("restore:term,restore:sleep=90", 1),
    "to wait for data": ("batch_read:sleep=2@2,batch_read:term@2,batch_read:hang@2", 2),
    "an evaluation": ("evaluate:term,evaluate:sleep=0.5", 6),
    "a save in flight": ("written:sleep=1,step_end:term@3,step_end:sleep=0.3@3", 9),
    "the last evaluation": ("evaluate:term,evaluate:sleep=0.5", 12),
    "the sample": ("sample:term,sample:sleep=90", 12),
}


@pytest.mark.slow
def test_a_run_that_is_stopped_in_every_phase_loses_nothing(folder):
    finish(start(folder, "whole"))
    for phase, (fault, saved) in PHASES.items():
        began = time.monotonic()
        output = finish(start(folder, "stopped", fault=fault), 75)
        assert time.monotonic() - began < 60, phase  # all but a few seconds are the start
        words = output.splitlines()[-1]
        assert words.startswith("gptjax: stopped[75]: by SIGTERM"), (phase, output)
        assert Checkpoints(folder / "stopped").latest() == saved, (phase, output)
        assert not (folder / "stopped" / "lock").exists()
    finish(start(folder, "stopped"))
    assert_same(folder, "stopped", "whole")


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once(folder):
    twice = "step_end:term,step_end:sleep=1,step_end:term,step_end:hang"
    output = finish(start(folder, "twice", fault=twice), 143).rstrip("\n")
    # The main thread may be about to end a line of its own.
    assert output.splitlines()[-1] == "gptjax: stopped[143]: by SIGTERM, the second request"


@pytest.mark.slow
def test_one_of_two_processes_is_stopped_while_it_compiles_and_in_an_evaluation(folder):
    for place, saved in ("compile", None), ("evaluate", 6):
        fault = f"{place}:term,{place}:sleep=2"
        processes = start_processes(folder, "both", 2, faults=["", fault])
        outputs = [finish(process, 75) for process in processes]
        assert all("stopped[75]: by " in output.splitlines()[-1] for output in outputs)
        assert Checkpoints(folder / "both").latest() == saved
    assert max(figures(folder, "both")) == 6


# --- without a run -------------------------------------------------------------------------------


class Left(Exception):
    pass


@pytest.fixture
def leave(monkeypatch):
    """What would end the process raises, with the code and the words."""

    def left(self, code, message):
        raise Left(code, message)

    monkeypatch.setattr(Leaving, "__call__", left)
    return Leaving(Events(None))


def test_before_anything_has_begun_a_request_ends_the_process(leave):
    with pytest.raises(Left, match="75, 'by X, before the first step"):
        Stop(leave).ask("X")


def test_what_has_begun_comes_to_its_end_and_nothing_more_begins(leave):
    stop = Stop(leave)
    assert stop.begin() and stop.begin() and not stop.request.done()
    assert stop.ask("X") == 2
    assert stop.request.done() and not stop.begin() and stop.count == 2
    with pytest.raises(Interrupted, match="by X"):
        stop.all_is_saved()


def test_after_all_is_saved_a_request_ends_the_process(leave):
    stop = Stop(leave)
    assert stop.begin()
    stop.all_is_saved()
    with pytest.raises(Left, match="after the last step"):
        stop.ask("X")


@pytest.mark.parametrize("begun", [(3, 5), (5, 3), (4, 4)])
def test_processes_stop_at_the_same_place(leave, begun):
    stops = [Stop(leave, alone=False) for _ in begun]
    for stop, count in zip(stops, begun, strict=True):
        for _ in range(count):
            assert stop.begin()
    told = [stop.ask("X") for stop in stops]
    assert told == [*begun]

    def go_on(stop):
        while stop.begin():
            pass

    threads = [threading.Thread(target=go_on, args=(stop,)) for stop in stops]
    for thread in threads:
        thread.start()
    threads[0].join(0.05)
    assert [stop.count for stop in stops] == told  # each waits for what the others say
    for stop in stops:
        stop.stop_at(max(told))
    for thread in threads:
        thread.join()
    assert [stop.count for stop in stops] == [max(begun)] * 2
    assert all(stop.request.done() for stop in stops)


def test_a_last_act_that_hangs_does_not_keep_the_process(monkeypatch, capsys):
    monkeypatch.setattr("gptjax.stop.LAST_ACTS_SECONDS", 0.2)
    codes, hang = [], threading.Event()
    monkeypatch.setattr("gptjax.stop.end_process", codes.append)
    leave = Leaving(Events(None))
    leave.after(hang.wait)
    first = threading.Thread(target=leave, args=(43, "a peer is lost"))
    first.start()
    leave(1, "another thread, which comes second")
    assert codes == [43]
    assert capsys.readouterr().err == "gptjax: error[43]: a peer is lost\n"
    hang.set()
    first.join()


def test_a_process_that_is_behind_waits_for_its_data(leave):
    stop = Stop(leave, alone=False)
    stop.begin()
    stop.ask("X")
    stop.stop_at(2)
    assert not stop.request.done()  # the second is yet to come
    assert stop.begin() and stop.request.done() and not stop.begin()


def test_another_thread_than_the_main_one_has_no_handlers(leave):
    failures = []

    def use():
        try:
            with Stop(leave) as stop:
                stop.begin()
        except ValueError as error:  # of the module `signal`
            failures.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert not failures
