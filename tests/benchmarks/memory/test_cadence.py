"""benchmarks.memory.cadence: streams, schedules by hand, and what a small run's rows must show."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from benchmarks.measuring.rows import read_rows
from benchmarks.memory.cadence import SCRIPT, STREAMS, arrivals, costs, measure, schedule
from hypernet.consolidation.cadence import Calendar, EveryN, Pressure

CONF = Path(__file__).parents[3] / "conf"
PAYING = [("5 hours", "default"), ("every n", "default"), ("economic", "default")]
SMALL = ["num_streams=2", "num_tuning=2", "days=40", "check_hours=6", "ratios=[1,10]"]


def settings(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return SCRIPT.check(compose("memory_cadence", [*SMALL, *overrides]))


@pytest.mark.parametrize("kind", STREAMS)
def test_streams_have_one_mean_rate(kind):
    streams = [arrivals(kind, seed, days=180, rate=2) for seed in range(150)]
    counts = [len(one) for one in streams]
    assert all(one == sorted(one) and 0 <= one[0] and one[-1] < 180 for one in streams)
    assert np.mean(counts) == pytest.approx(360, abs=4 * np.std(counts) / 150**0.5)
    assert streams[3] == arrivals(kind, 3, days=180, rate=2) != streams[4]


def test_streams_differ_as_their_names_say():
    gaps = {kind: np.diff(arrivals(kind, 1, days=2000, rate=2)) for kind in STREAMS}
    spread = {kind: gap.std() / gap.mean() for kind, gap in gaps.items()}
    assert spread["stationary"] == pytest.approx(1, abs=0.1) and spread["bursty"] > 2  # of a Poisson process it is 1
    halves = [np.mean(np.array(arrivals("drifting", seed, days=180, rate=4)) > 90) for seed in range(20)]
    assert all(abs(share - 0.5) > 0.1 for share in halves) and min(halves) < 0.5 < max(halves)
    days = np.array(arrivals("seasonal", 0, days=3000, rate=4))
    assert abs(np.exp(2j * np.pi * days / 30).mean()) > 0.35 > 0.1 > abs(np.exp(2j * np.pi * days / 17).mean())


def test_schedules_by_hand():
    span = {"days": 4, "check_hours": 12}
    assert schedule(EveryN(memories=2), [0.1, 0.2, 1.1, 2.6], **span) == [0.5, 3.0]
    assert schedule(Calendar(days=1), [0.1, 0.2, 1.1, 2.6], **span) == [1.5, 3.0]  # the first day ends at 1.1
    assert schedule(Pressure(memory_days=1), [0.5, 1.6], **span) == [1.5, 3.0]
    assert schedule(EveryN(), [], **span) == []


def test_costs_are_those_of_the_formula():
    cfg = settings("night_s=20", "forgotten=0.1", "questions_per_day=50", "forgotten_days=3", "again_s=0.2")
    assert costs(cfg) == pytest.approx((20 + 0.1 * 50 * 3 * 0.2, 50 * cfg.waiting_s))


def test_costs_are_near_those_of_the_committed_rows():
    rows = read_rows(CONF.parent / "benchmarks/results/memory_break_even.jsonl")
    found = {(row["facts"], row["method"]): row for row in rows if row["kind"] == "surface"}
    one, many = (found[number, "full_context"]["question_s"] for number in (1, 16))
    cfg = settings()
    measured = (found[16, "weights"]["prepare_s"], one, (many - one) / 15)
    assert (cfg.night_s, cfg.again_s, cfg.waiting_s) == pytest.approx(measured, rel=0.2)


def test_no_policy_beats_the_clairvoyant_and_k_and_h_help():
    rows = list(measure(settings()))
    found = {(r["stream"], r["ratio"], r["policy"], r["parameters"]): r for r in rows if r["kind"] == "regret"}
    assert len(found) == 4 * 2 * (6 + 4 + 2)
    assert all(r["interval"][0] >= 0 and r["interval"][0] <= r["regret"] <= r["interval"][1] for r in found.values())
    for stream in STREAMS:
        known, default = (found[stream, 10, "economic", parameters]["regret"] for parameters in ("costs", "default"))
        assert known < default
    ratios = {r["ratio"]: r["run_cost"] for r in found.values()}
    assert ratios[10] == pytest.approx(10 * ratios[1])


def test_economic_never_sleeps_where_waiting_costs_nothing():
    for rows in (list(measure(settings("waiting_s=-1"))), list(measure(settings("waiting_s=0.0")))):
        assert {row["kind"] for row in rows} == {"free"}
        assert [row["sleeps"] for row in rows if row["parameters"] == "costs"] == [0]
        assert all(row["sleeps"] > 0 for row in rows if (row["policy"], row["parameters"]) in PAYING)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("num_streams=1", "num_streams should be a whole number, at least 2, got 1."),
        ("ratios=[]", "ratios should be a list of numbers above 0, at least one, got []."),
        ("forgotten=2", "forgotten should be a number from 0 to 1, got 2."),
    ],
)
def test_mistake_in_a_setting_is_one_line(monkeypatch, argument, says):
    monkeypatch.chdir(CONF.parent)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["benchmarks.memory.cadence", argument])
    with pytest.raises(SystemExit, match=re.escape(f"benchmarks.memory.cadence: {says}")):
        runpy.run_module("benchmarks.memory.cadence", run_name="__main__")
    with pytest.raises(ValueError, match="There is no stream 'odd': choose of stationary, bursty"):
        arrivals("odd", 0, days=1, rate=1)
