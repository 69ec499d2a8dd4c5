"""benchmarks.serving.soak: what it would see, and some seconds of it; test_serve.py kills the server."""

import pytest

from benchmarks.serving.soak import Counts, SoakSettings, candidates, growth, measure


def test_documents_differ_in_the_canary_alone():
    users = candidates(num=5, seed=0)
    assert len({user.document.replace(user.canary, "PLACE") for user in users}) == 1
    assert len({user.canary for user in users}) == 5 and len({user.question for user in users}) == 1
    assert all(user.canary not in user.question for user in users)


@pytest.mark.parametrize(("answer", "foreign", "wrong"), [("own", 0, 0), ("other", 1, 1), ("nothing", 0, 1)])
def test_answer_of_another_user_is_counted(answer, foreign, wrong):
    one, other = candidates(num=2, seed=0)
    text = {"own": f"in {one.canary}", "other": other.canary, "nothing": "I do not know"}[answer]
    counts = Counts()
    counts.check(one, [one, other], text, must_hold=True)
    assert (counts.foreign, counts.wrong) == (foreign, wrong)


def test_growth_is_that_of_the_last_half_since_the_restart():
    before = [(float(second), 900.0 + 50 * second) for second in range(10)]
    filling = [(10.0 + second, 400.0 + 30 * second) for second in range(10)]
    flat = [(20.0 + second, 700.0 + second / 60) for second in range(10)]
    assert growth([*before, *filling, *flat], since=10) == pytest.approx(1)
    assert growth(before[:3]) is None


@pytest.mark.story(30)
def test_short_soak_loses_nothing_and_mixes_nothing_up():
    settings = {"checkpoint": "assets/tiny", "minutes": 0.08, "users": 2, "clients": 3, "kills": 0}
    row = measure(SoakSettings(**settings, most_growth=0.0, seed=0, output=None))
    names = ["lost", "back", "foreign_answers", "wrong_answers", "server_errors", "tracebacks_in_the_log"]
    assert not {name: row[name] for name in names if row[name]}, row["examples"]
    assert row["acknowledged_writes"] and row["memory_mib"][0][1] > 50
