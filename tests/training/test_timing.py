"""Phases add up, begin and end in different places, and are taken once."""

import itertools

import pytest

from hypernet.training.timing import PhaseTimes


@pytest.fixture
def phases():
    """PhaseTimes with a clock that stands at 0, 1, 3, 6, 10, ... seconds when it is looked at."""
    clock = itertools.accumulate(itertools.count())
    return PhaseTimes(now=lambda: float(next(clock)))


def test_phases_add_up_and_reset_when_taken(phases):
    for _ in range(2):  # from 0 to 1, from 3 to 6
        with phases("encode"):
            pass
    with phases("student"):  # from 10 to 15
        pass
    assert phases.take() == {"encode": 4.0, "student": 5.0}
    assert phases.take() == {}


def test_phase_may_end_where_another_runs(phases):
    phases.begin("backward")  # at 0
    with phases("student"):  # from 1 to 6, and backward ends at 3
        phases.end("backward")
    assert phases.take() == {"backward": 3.0, "student": 5.0}


def test_end_of_a_phase_that_never_began_is_ignored(phases):
    phases.end("backward")
    assert phases.take() == {}
