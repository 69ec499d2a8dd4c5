"""Phases add up, begin and end in different places, and are taken once."""

import time

from hypernet.training.timing import PhaseTimes


def test_phases_add_up_and_are_taken_once():
    phases = PhaseTimes()
    for _ in range(2):
        with phases("encode"):
            time.sleep(0.01)
    phases.begin("backward")
    time.sleep(0.005)
    phases.end("backward")
    phases.end("never begun")
    taken = phases.take()
    assert set(taken) == {"encode", "backward"}
    assert taken["encode"] >= 0.02 and taken["backward"] >= 0.005
    assert phases.take() == {}
