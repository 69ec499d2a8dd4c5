"""benchmarks.use.memrl: the world, credit and controls on a small one, and that the committed rows say what is said."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from benchmarks.forgetting.protocol import load
from benchmarks.measuring.rows import read_rows
from benchmarks.use.figures import markdown
from benchmarks.use.memrl import (
    ALONE,
    ARMS,
    CREDITED,
    ORACLE,
    SCRIPT,
    SIMILARITY,
    UTILITY,
    Agent,
    episodes,
    measure,
    rules,
)
from hypernet.memory.use.utilities import Utility

ROOT = Path(__file__).parents[3]
SMALL = ["seeds=[0]", "num_rules=3", "num_statements=3", "episodes=40", "kept=3", "num_after=12", "num_candidates=4"]


def settings(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return SCRIPT.check(compose("use_memrl", [*SMALL, *overrides]))


def says(*texts):
    """A reader that answers what its text says, of these."""
    return lambda _question, text: next((one for one in texts if text and one in text), "unknown")


def test_rules_have_one_right_statement_of_several():
    found = rules(1, 30, num_statements=4)
    assert len({one.questions for one in found}) == 30
    assert found == rules(1, 30, num_statements=4) != rules(2, 30, num_statements=4)
    for one in found:
        assert len(set(one.answers)) == len(one.statements) == 4
        pairs = zip(one.answers, one.statements, strict=True)
        assert all(answer.casefold() in text.casefold() for answer, text in pairs)
    told = episodes(found, 4000, seed="a", noise=0.25)
    assert sum(one.misreported for one in told) / 4000 == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(("arm", "num_credited"), [(UTILITY, 1), (ALONE, 1), (CREDITED, 3), (SIMILARITY, 0)])
def test_who_learns_of_an_outcome(tmp_path, arm, num_credited):
    (rule,) = rules(0, 1, num_statements=3)
    cfg = settings("num_rules=1", "rate=0.5")
    agent = Agent(arm, [rule], says(*rule.answers), cfg, seed=0, folder=tmp_path / "memory")
    (episode,) = episodes([rule], 1, seed="a", noise=0.0)
    right = agent.act(episode)
    expected = 0.75 if right else 0.25  # .5 + .5 (outcome - .5)
    assert list(agent.utilities.of().values()) == [Utility(expected, 1)] * num_credited
    agent.act(episode._replace(misreported=True), learns=False)
    assert len(agent.utilities.of()) == num_credited
    if arm == UTILITY:  # told wrongly, the same memory learns the opposite
        before = agent.utilities.get(agent.utilities.ranked(agent.search(episode.question))[0].ref)
        right = agent.act(episode._replace(misreported=True))
        after = sorted(agent.utilities.of().values())
        assert any(one.value == before.value + 0.5 * ((not right) - before.value) for one in after)


def test_evicted_memories_come_back(tmp_path):
    found = rules(0, 3, num_statements=3)
    agent = Agent(UTILITY, found, says(), settings(), seed=0, folder=tmp_path / "memory")
    everything = agent.memory.list()
    agent.utilities.credit([everything[4].ref], 1.0)
    for kept in ("the most useful", "the newest", "some at random"):
        batch = agent.evict(kept, 2, seed=0)
        left = [memory.ref for memory in agent.memory.list()]
        assert len(left) == 2
        assert kept != "the most useful" or everything[4].ref in left
        assert kept != "the newest" or left == [memory.ref for memory in everything[-2:]]
        agent.take_back(batch)
        assert agent.memory.list() == everything


def test_small_run_has_every_arm_and_leaves_the_weights():
    model = load("assets/tiny")
    rows = list(measure(settings(), model))
    arms = {row["arm"]: row for row in rows if row["kind"] == "arm"}
    assert set(arms) == set(ARMS) and all(len(row["outcomes"]) == 40 for row in arms.values())
    assert arms[ORACLE]["success"] > arms[SIMILARITY]["success"] and arms["no memory"]["success"] == 0
    assert {row["kept"]: row["memories"] for row in rows if row["kind"] == "evicted"} == {
        **{"all": 9, "the most useful": 3, "the most useful, ranked by similarity": 3},
        **{"the newest": 3, "some at random": 3},
    }
    assert [row["right"] for row in rows if row.get("kept") == "all"] == [3]
    assert rows[-1]["kind"] == "weights" and rows[-1]["unchanged"]
    with MovedParameter(model):
        (*_, last) = measure(settings("arms=[no memory]"), model)
        assert last["sha256"] != rows[-1]["sha256"]  # the hash sees a change of one number
    assert "| no memory | 0.00 |" in markdown(rows, "memrl")


class MovedParameter:
    def __init__(self, model):
        self.parameter = next(model.parameters())

    def __enter__(self):
        self.parameter.data.view(-1)[0] += 1

    def __exit__(self, *_):
        self.parameter.data.view(-1)[0] -= 1


def test_committed_rows_show_what_the_page_says():
    rows = read_rows(ROOT / "benchmarks/results/use_memrl.jsonl")
    lines = [line.strip("| ").split(" | ") for line in markdown(rows, "memrl").splitlines()[2:]]
    success = {line[0]: [float(cell) for cell in line[1:4]] for line in lines}
    assert set(success) == set(ARMS)
    for control in ("shuffled utilities", "similarity", "no memory", "all credited"):
        assert success[UTILITY][1] > success[control][2]  # intervals do not meet
    assert [row["unchanged"] for row in rows if row["kind"] == "weights"] == [True]


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("arms=[odd]", "There is no arm 'odd': choose of utility, utility alone"),
        ("kept=100000", "kept is 100000, and there are 200 memories"),
        ("num_statements=1", "num_statements should be a whole number, at least 2, got 1."),
    ],
)
def test_mistake_in_a_setting_is_one_line(monkeypatch, argument, says):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["benchmarks.use.memrl", argument, "output=null"])
    with pytest.raises(SystemExit, match=re.escape(f"benchmarks.use.memrl: {says}")):
        runpy.run_module("benchmarks.use.memrl", run_name="__main__")
