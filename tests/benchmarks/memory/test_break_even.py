"""benchmarks.memory.break_even: predictions and agreement by hand, and the rows of a small run on the shipped model."""

import math
import re
import runpy
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from benchmarks.measuring.cost import Line
from benchmarks.memory.break_even import (
    SCRIPT,
    TIERS,
    Bench,
    ConsolidatedWeights,
    CostSurface,
    Length,
    Made,
    _shares,
    agreement,
    measure,
    surface,
)
from hypernet.consolidation.rehearsal import NoRehearsal

ROOT = Path(__file__).parents[3]
SMALL = ["seeds=[0]", "fitted=[1,3]", "held_out=[2]", "surface=[1,2,5]", "questions=[1,3]", "num_documents=2"]
SMALL += ["repeats=1", "least_questions=1", "num_timed=2", "num_scored=2"]


def settings(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("memory_break_even", [f"checkpoint={ROOT / 'assets/tiny'}", *SMALL, *overrides])
    return SCRIPT.check(cfg)


def measured(method, facts, prepare, question, **more):
    row = {"kind": "cost", "seed": 0, "facts": facts, "tokens": 10.0 * facts, "method": method, "accuracy": 1 / facts}
    row |= {"prepare_s": prepare, "question_s": question, "prepare_flops": 1000.0 * facts, "answer_tokens": 3.0}
    return row | {"prompt_tokens": 12.0} | more


@pytest.fixture
def fitted(cost_model):
    """Seconds are 1e-6 of the FLOPs plus 0.5; preparing without FLOPs takes 1e-3 a token."""
    model = cost_model._replace(question_tokens=12, answer_tokens=3.0, retrieved_tokens=20)
    rows = []
    for facts in (1, 4, 9):
        length = Length(facts, 10.0 * facts)
        for method in TIERS:
            surface_of = CostSurface(dict.fromkeys(TIERS, model), {}, Line(0, 500.0), lambda n: 2.0 * n, 60)
            work = surface_of.flops(method, length)
            prepare = 1e-6 * work.prepare + 0.5 if work.prepare else 1e-3 * length.tokens
            more = {"prompt_tokens": 32.0} if method == "retrieval" else {}
            rows.append(measured(method, facts, prepare, 1e-6 * work.question + 0.5, **more))
    return CostSurface.fitted(cost_model, rows, trained=lambda n: 2.0 * n, room=60), model, rows


def test_prediction_between_lengths_is_the_formula(fitted):
    predicted, model, _ = fitted
    for facts in (2, 7):
        length = Length(facts, 10.0 * facts)
        for method in ("full_context", "prefix_cache", "retrieval", "doc_to_lora"):
            flops = model.costs(
                method, min(10.0 * facts, 60) if method in ("full_context", "prefix_cache") else 10.0 * facts
            )
            assert predicted.flops(method, length) == pytest.approx(flops)
            assert predicted.costs(method, length).question == pytest.approx(1e-6 * flops.question + 0.5)
        asked_alone = model.costs("full_context", 0).question
        assert predicted.flops("weights", length) == pytest.approx((1000 * facts, asked_alone))
        assert predicted.flops("no_context", length) == pytest.approx((0, asked_alone))
        assert predicted.costs("weights", length).prepare == pytest.approx(1e-3 * facts + 0.5)
        assert predicted.costs("no_context", length).prepare == pytest.approx(1e-2 * facts)


def test_break_even_of_the_surface_is_that_of_the_costs(fitted):
    predicted, _, rows = fitted
    found = {(r["facts"], r["method"]): r for r in surface(settings(), predicted, rows)}
    assert len(found) == 3 * len(TIERS)
    for number in (1, 2, 5):
        full, own = found[number, "full_context"], found[number, "prefix_cache"]
        saved = full["question_s"] - own["question_s"]
        assert own["break_even_s"] == pytest.approx((own["prepare_s"] - full["prepare_s"]) / saved)
        assert full["break_even_s"] is None and own["tokens"] == pytest.approx(10 * number)
    assert found[1, "weights"]["accuracy"] == 1 and found[1, "weights"]["measured_accuracy"] == 1
    between = 1 + (1 / 4 - 1) * math.log(2) / math.log(4)
    assert (
        found[2, "weights"]["accuracy"] == pytest.approx(between) and found[2, "weights"]["measured_accuracy"] is None
    )


def scheduled(seed, costs):
    return [
        {"kind": "schedule", "seed": seed, "facts": 2, "updates": 0, "questions": 4, "method": name}
        | {"seconds": seconds, "predicted_seconds": predicted}
        for name, (seconds, predicted) in costs.items()
    ]


def test_agreement_counts_pairs_by_hand():
    # a < b and a < c as predicted; b and c differ by less than 10 %, in the other order than predicted.
    right = scheduled(0, {"a": (1, 1), "b": (2, 5), "c": (2.1, 4)})
    wrong = scheduled(1, {"a": (3, 1), "b": (2, 5), "c": (9, 8)})  # a and b
    row = agreement([*right, *wrong], currency="seconds")
    assert (row["pairs"], row["near"], row["agreement"]) == (6, 1, pytest.approx(4 / 5))
    assert row["of_all_pairs"] == pytest.approx(4 / 6) and row["points"] == 2 and row["whole_order"] == 0.5
    assert row["interval"][0] == pytest.approx(2 / 3) and row["interval"][1] == 1
    assert agreement([*right, *wrong], currency="seconds", without=("b",))["agreement"] == 1
    assert agreement(right, currency="seconds")["interval"] is None


def test_questions_are_shared_out_evenly():
    assert _shares(7, 3) == [2, 2, 3] and _shares(1, 2) == [0, 1] and _shares(4, 1) == [4]


@pytest.mark.story(11)
def test_small_run_measures_and_predicts_every_tier(monkeypatch):
    # Consolidation takes seconds a document; a test of its own runs it once.
    monkeypatch.setattr(ConsolidatedWeights, "_consolidated", lambda self, told: Made({}, 7, 0.25, 2e9, True))
    rows = list(measure(settings("updates=[1]")))
    cost = {(r["facts"], r["method"]): r for r in rows if r["kind"] == "cost"}
    assert set(cost) == {(n, m) for n in (1, 2, 3) for m in (*TIERS, "wrong_document")}
    assert cost[3, "full_context"]["accuracy"] > 0.5 > cost[3, "no_context"]["accuracy"] == 0
    assert cost[3, "doc_to_lora"]["accuracy"] > 0.5 > cost[3, "wrong_document"]["accuracy"] == 0
    assert cost[3, "weights"] | {"prepare_s": 0.25, "prepare_flops": 2e9, "bytes": 7} == cost[3, "weights"]
    assert "prepare_s" not in cost[2, "full_context"]
    schedules = [r for r in rows if r["kind"] == "schedule"]
    assert len(schedules) == 2 * len(TIERS)
    for row in schedules:
        if row["method"] in ("full_context", "prefix_cache"):  # counted by torch, against the formula
            assert row["predicted_flops"] == pytest.approx(row["flops"], rel=0.2)
        if row["method"] == "weights":
            assert row["seconds"] > 0.25 * (1 + row["updates"]) and row["flops"] > 2e9 * (1 + row["updates"])
    kinds = [row["kind"] for row in rows]
    assert kinds.count("agreement") == 4 and kinds.count("surface") == 3 * len(TIERS)


def test_weights_answer_and_leave_the_base_model_as_it_was():
    none = ["~consolidator.rehearsal.number", f"consolidator.rehearsal._target_={NoRehearsal.__module__}.NoRehearsal"]
    cfg = settings("least_steps=2", "steps_per_fact=0", *none)
    bench = Bench(cfg)
    case, before = bench.case(0, 1), bench.model.base_model_fingerprint
    bench.weights.prepare(case)
    made = bench.weights.made[case.documents[0]]
    assert made.seconds > 0 and made.flops > 1e8 and made.num_bytes > 0 and made.tensors
    (answer,) = bench.weights.answer(case.questions)
    assert answer.log_likelihood != bench.methods["no_context"].answer(case.questions)[0].log_likelihood
    assert bench.model.base_model_fingerprint == before
    bench.weights.prepare(case)  # what was consolidated is not again
    assert bench.weights.made[case.documents[0]] is made and bench.weights.prepare_flops(case) == round(made.flops)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("fitted=[1]", "fitted should be a list of at least two whole numbers, got [1]."),
        ("checkpoint=''", "checkpoint should be a text, got ''."),
        ("num_documents=1", "num_documents should be a whole number, at least 2, got 1."),
    ],
)
def test_mistake_in_a_setting_is_one_line(monkeypatch, argument, says):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["benchmarks.memory.break_even", argument])
    with pytest.raises(SystemExit, match=re.escape(f"benchmarks.memory.break_even: {says}")):
        runpy.run_module("benchmarks.memory.break_even", run_name="__main__")
