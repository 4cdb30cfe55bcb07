"""Small forms of the campaigns of tools/faults.py: real runs, disturbed.

Signals in every phase are in test_stop.py, and processes that are lost in test_watchdog.py.
"""

import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
JOBS = 2  # runs at once: a run starts on one core
SPAN = 0.4  # seconds after the first step in which a kill may fall

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session", autouse=True)
def tools() -> None:
    """The tools can be imported."""
    sys.path.insert(0, str(REPOSITORY / "tools"))


@pytest.fixture(scope="session")
def lab(tools, tmp_path_factory):
    """The text, the experiment, and the runs that nothing disturbs, for all tests."""
    from lab import Lab

    made = Lab(tmp_path_factory.mktemp("lab"), REPOSITORY / ".pytest_cache" / "lab")
    yield made
    assert not made.orphans()


def assert_well(outcome) -> None:
    """All is as it should be; a test that cannot be done here is skipped."""
    assert not outcome.problems, outcome.to_json()
    if outcome.skipped:
        pytest.skip(outcome.skipped)


def test_kills_at_random_instants(lab):
    from faults import kills

    outcome = kills(lab, count=20, steps=150, span=SPAN, jobs=JOBS)
    assert_well(outcome)
    assert outcome.figures["kills"] == 20


def test_kills_of_one_of_two_processes(lab):
    from faults import kills

    # Some of the time the others wait, until they know that one is lost.
    outcome = kills(lab, count=6, steps=60, span=SPAN, processes=2, jobs=3)
    assert_well(outcome)
    assert outcome.figures["kills"] == 6


def test_a_kill_at_each_point(lab):
    from faults import points

    from gptjax.faults import POINTS

    outcome = points(lab, jobs=JOBS)
    assert_well(outcome)
    assert outcome.figures["passed"] == len(POINTS)


def test_changed_bytes(lab):
    from faults import mutations

    outcome = mutations(lab, count=30)
    assert_well(outcome)
    assert outcome.figures["silently_wrong"] == 0
    assert outcome.figures["found"].get("fell back", 0) >= 25


def test_a_full_disk(lab):
    from faults import storage

    assert_well(storage(lab, kinds=["full for a while"]))


def test_wrong_options(lab):
    from faults import configs

    outcome = configs(lab, count=40, jobs=JOBS)
    assert_well(outcome)
    assert outcome.figures["accepted"] == 0
    assert outcome.figures["suggestions"] > 0.9


def test_gradients_that_are_not_finite(lab):
    from faults import numerics

    assert_well(numerics(lab, names=["four in a row"], clean_steps=0))
