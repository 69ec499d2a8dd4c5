"""break_even: questions after which a method is cheaper, and what a document of some length costs."""

import pytest

from benchmarks.measuring.aggregate import summarize
from benchmarks.measuring.break_even import at_equal_length


def no_model(checkpoint: str) -> None:
    return None


def by_method(rows: list[dict], name: str = "one entity", kind: str = "summary") -> dict[str, dict]:
    return {r["method"]: r for r in rows if r["kind"] == kind and r["set"] == name and r["task"] != "locality"}


def encyclopedia(cells: list[dict]) -> list[dict]:
    return [row for row in cells if row["task"] == "encyclopedia"]


def test_break_even_uses_costs_at_equal_answer_length(cells) -> None:
    even = by_method(summarize(encyclopedia(cells), cost_model=no_model))["doc_to_lora"]["break_even"]
    assert even["full_context"]["seconds"] == pytest.approx((0.2 - 0.001) / (0.05 - 0.01))
    assert even["full_context"]["seconds_interval"] == pytest.approx([even["full_context"]["seconds"]] * 2)
    assert even["prefix_cache"]["seconds"] == pytest.approx((0.2 - 0.1) / (0.012 - 0.01))
    assert "flops" not in even["full_context"]
    longer = [dict(row) for row in encyclopedia(cells)]
    for row in longer:
        if row["kind"] == "case" and row["method"] == "doc_to_lora":
            row["question_s"] += 1.0  # it answered more at the same rate: no reason to call it dearer
    again = by_method(summarize(longer, cost_model=no_model))["doc_to_lora"]
    assert again["break_even"] == even and at_equal_length(again) == pytest.approx(0.01)


def test_an_alternative_cheaper_in_both_parts_is_never_beaten(cells) -> None:
    for row in cells:
        if row["kind"] == "case" and row["method"] == "doc_to_lora":
            row["first_token_s"] = 1.0
    even = by_method(summarize(encyclopedia(cells), cost_model=no_model))["doc_to_lora"]["break_even"]
    assert even["full_context"] == {"seconds": None, "seconds_interval": [None, None]}


def test_flops_come_from_the_checkpoint_model(cells, cost_model) -> None:
    asked = []
    rows = summarize(encyclopedia(cells), cost_model=lambda checkpoint: asked.append(checkpoint) or cost_model)
    assert asked == ["assets/tiny"]
    sized = cost_model._replace(question_tokens=12, answer_tokens=5, retrieved_tokens=96)
    own, full = sized.costs("doc_to_lora", 60), sized.costs("full_context", 60)
    even = by_method(rows)["doc_to_lora"]["break_even"]["full_context"]
    assert even["flops"] == pytest.approx((own.prepare - full.prepare) / (full.question - own.question))


def test_surface_is_fitted_to_measured_seconds(cells, cost_model) -> None:
    rows = [r for r in summarize(encyclopedia(cells), cost_model=lambda _: cost_model) if r["kind"] == "surface"]
    assert {r["method"] for r in rows} == {"doc_to_lora", "full_context", "prefix_cache", "retrieval"}
    assert all(r["longest_measured"] == 130 and r["fit_error"] < 1e-6 for r in rows)
    own = next(r for r in rows if r["method"] == "doc_to_lora" and r["num_tokens"] == 128)
    assert own["seconds"] == pytest.approx([0.2, 0.01])  # the made costs do not depend on the length
    assert own["flops"][0] == 100 * 2 + 10 * 128


def test_methods_of_several_checkpoints_get_no_flops(cells, cost_model) -> None:
    cells = encyclopedia(cells)
    for row in cells:
        if row["kind"] == "summary" and row["method"] == "doc_to_lora":
            row["run"] = {**row["run"], "config": {**row["run"]["config"], "checkpoint": "elsewhere"}}
    rows = summarize(cells, cost_model=lambda _: cost_model)
    assert "flops" not in by_method(rows)["doc_to_lora"]["break_even"]["full_context"]
    assert not [row for row in rows if row["kind"] == "surface"]
