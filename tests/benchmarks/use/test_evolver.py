"""benchmarks.use.evolver: the agent, rejection, a small run, and that the committed rows say what is said."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from benchmarks.forgetting.protocol import load
from benchmarks.measuring.rows import read_rows
from benchmarks.use.evolver import ARMS, SCRIPT, Agent, kept_tries, measure, question_of
from benchmarks.use.figures import evolver, evolver_learned, grouped
from benchmarks.use.world import Outcome
from hypernet.memory.use.principles import Trajectory, Try

ROOT = Path(__file__).parents[3]
SMALL = ["seeds=[0,1]", "num_gates=4", "num_dishes=2", "train_maps=8", "test_maps=6", "max_steps=10"]


def settings(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return SCRIPT.check(compose("use_evolver", [*SMALL, *overrides]))


def test_agent_ranks_by_scores_and_temperature_mixes():
    scores = {"a": -1.0, "b": -3.0, "c": -2.0}
    asked = []

    def scorer(question):
        asked.append(question)
        return scores

    assert Agent(scorer, seed="x")("Corbaford", "key", ["b", "a", "c"]) == ["a", "c", "b"]
    assert asked == ["What is the key of Corbaford?"] == [question_of("Corbaford", "key")]
    drawn = Agent(scorer, seed="x", temperature=1.0)
    first = [drawn("Corbaford", "key", ["b", "a", "c"])[0] for _ in range(3000)]
    # By Gumbel noise the first is drawn by softmax(scores): e^-1 / (e^-1 + e^-2 + e^-3) = .665
    assert first.count("a") / 3000 == pytest.approx(0.665, abs=0.03)


def test_rejection_keeps_each_success_once():
    good, bad = Try("Corbaford", "key", "tin spoons", True), Try("Corbaford", "key", "clay cups", False)
    runs = [Outcome(1.0, Trajectory("t", tries, 1.0)) for tries in ((bad, good), (good,), (bad,))]
    assert kept_tries(runs) == [good]


def test_small_run_has_every_arm():
    rows = list(measure(settings(), load("assets/tiny")))
    arms = grouped(rows, "arm", "arm")
    assert tuple(arms) == ARMS and {len(own) for own in arms.values()} == {2}
    assert all(len(row["items"]) == 6 and 0 <= row["return"] <= 1 for own in arms.values() for row in own)
    learned = [row for row in rows if row["kind"] == "learned"]
    assert all(row["runs"] == 16 and row["rules"] == 8 and 0 < row["principles_2"] <= 8 for row in learned)
    assert evolver(rows).lines[0][0] == ARMS[0] and len(evolver_learned(rows).lines) == 2


def test_committed_rows_show_what_the_page_says():
    rows = read_rows(ROOT / "benchmarks/results/use_evolver.jsonl")
    found = {line[0]: [float(cell) for cell in line[1:]] for line in evolver(rows).lines}
    assert tuple(found) == ARMS
    nothing, own, others, adapter, others_adapter, weights, others_weights = (found[arm] for arm in ARMS)
    assert own[0] > others[0] > nothing[0] and own[1] > others[2]
    assert adapter[0] > others_adapter[0] and weights[0] > others_weights[0]
    assert min(adapter[0], weights[0]) > nothing[2]


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("seeds=[0]", "seeds should be a list of whole numbers, at least two, got [0]."),
        ("num_gates=3", "num_gates should be a whole number, at least 4, got 3."),
    ],
)
def test_mistake_in_a_setting_is_one_line(monkeypatch, argument, says):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["benchmarks.use.evolver", argument, "output=null"])
    with pytest.raises(SystemExit, match=re.escape(f"benchmarks.use.evolver: {says}")):
        runpy.run_module("benchmarks.use.evolver", run_name="__main__")
