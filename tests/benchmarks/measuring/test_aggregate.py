"""benchmarks/measuring/aggregate.py: rows of tables and plots that follow from synthetic cells."""

import pytest

from benchmarks.measuring.aggregate import commands, describe, summarize


def no_model(checkpoint: str) -> None:
    return None


def by_method(rows: list[dict], name: str = "one entity", kind: str = "summary") -> dict[str, dict]:
    return {r["method"]: r for r in rows if r["kind"] == kind and r["set"] == name and r["task"] != "locality"}


def encyclopedia(cells: list[dict]) -> list[dict]:
    return [row for row in cells if row["task"] == "encyclopedia"]


def test_scores_are_compared_with_full_context_and_the_floor(cells) -> None:
    rows = summarize(encyclopedia(cells), cost_model=no_model)
    own = by_method(rows)["doc_to_lora"]
    assert (own["exact_match"], own["questions"], own["cases"], own["seeds"]) == (0.5, 4, 4, 1)
    assert own["relative"] == own["gap_closed"] == pytest.approx(2 / 3)
    assert own["gap_closed_interval"] is None or own["gap_closed_interval"][0] <= 2 / 3 <= own["gap_closed_interval"][1]
    assert own["over_floor"] == 0.5 and own["against"]["retrieval"]["difference"] == -0.5
    assert own["against"]["full_context"]["interval"][1] <= 0
    assert by_method(rows)["no_context"]["gap_closed"] == 0
    assert [r["method"] for r in rows][:5] == ["no_context", "full_context", "prefix_cache", "retrieval", "doc_to_lora"]


def test_questions_are_grouped_by_the_values_of_attributes(cells) -> None:
    rows = summarize([row for row in cells if row["task"] in ("encyclopedia", "needles")], cost_model=no_model)
    slices = [r for r in rows if r["kind"] == "slice" and r["method"] == "doc_to_lora"]
    assert {tuple(r["by"]) for r in slices if r["task"] == "needles"} == {("num_chunks",)}  # one depth is no axis
    assert {r["attributes"]["num_chunks"] for r in slices if r["task"] == "needles"} == {1, 8}
    assert all(r["questions"] == 4 and r["exact_match"] == 0.5 for r in slices)
    assert not [r for r in slices if r["task"] == "encyclopedia"]


def test_rows_without_attributes_give_same_tables(cells) -> None:
    cells = [row for row in cells if row["task"] in ("encyclopedia", "needles")]
    bare = [{key: value for key, value in row.items() if key != "attributes"} for row in cells]
    kept = [row for row in summarize(cells, cost_model=no_model) if row["kind"] == "summary"]
    found = summarize(bare, cost_model=no_model)
    assert [{**row, "attributes": {}} for row in kept] == found


def test_slices_separate_sets_with_equal_case_names(cells) -> None:
    for row in cells:
        if row["task"] == "needles" and row["kind"] != "summary":
            row["case"] = row["case"].split("/")[1]
            row["attributes"] = {"depth": float(row["case"])}
    rows = summarize([row for row in cells if row["task"] == "needles"], cost_model=no_model)
    own = [r for r in rows if r["kind"] == "slice" and r["method"] == "full_context"]
    assert [(r["questions"], r["exact_match"]) for r in own] == [(2, 1.0), (2, 1.0), (2, 1.0), (2, 0.0)]


def test_slices_use_the_attributes_of_each_question(cells) -> None:
    """And cost what their case costs."""
    cells = [row for row in cells if row["task"] == "composition"]
    for row in cells:
        if row["kind"] == "question":
            row["attributes"] = {"times_asked_from": 260 if row["case"] in ("0/0", "1/0") else 332}
        elif row["kind"] == "case":
            row["attributes"] = {}
            row["stored_bytes"] = 10 if row["case"] in ("0/0", "1/0") else 30
    rows = summarize(cells, cost_model=no_model)
    own = [r for r in rows if r["kind"] == "slice" and r["method"] == "doc_to_lora"]
    found = [(r["attributes"]["times_asked_from"], r["questions"], r["exact_match"], r["stored_bytes"]) for r in own]
    assert found == [(260, 2, 1.0, 10), (332, 6, pytest.approx(1 / 3), 30)]


def test_gradient_methods_have_a_curve_and_their_last_step(cells) -> None:
    own = by_method(summarize(encyclopedia(cells), cost_model=no_model))["text_lora"]
    assert [(p["step"], p["exact_match"], p["seconds"]) for p in own["curve"]] == [(0, 0.0, 0.0), (8, 0.25, 2.0)]
    assert own["exact_match"] == 0.25 and own["break_even"]["full_context"]["seconds"] == pytest.approx(1.999 / 0.04)


def test_summary_refuses_two_settings_of_one_name(cells) -> None:
    other = dict(next(row for row in cells if row["kind"] == "summary"))
    other["run"] = {"config": {**other["run"]["config"], "method": {"lr": 0.1}}}
    with pytest.raises(ValueError, match="method_name="):
        summarize([*cells, other], cost_model=no_model)


def test_summary_merges_commands_of_one_sweep(cells) -> None:
    rows = encyclopedia(cells)
    (command,) = commands(rows)
    methods = "no_context,full_context,prefix_cache,retrieval,doc_to_lora,wrong_document,text_lora"
    assert command == f"python -m benchmarks.run --multirun seed=0 task=encyclopedia method={methods}"
    for row in rows:
        if row["kind"] == "summary":
            row["overrides"].append("sweep=tiny")
    assert commands(rows) == ["python -m benchmarks.run sweep=tiny"]
    assert describe(rows, [])["commands_by_task"] == {"encyclopedia": ["python -m benchmarks.run sweep=tiny"]}


def test_summary_omits_settings_that_are_none(cells) -> None:
    assert ["text_lora", "lr=0.01"] in describe(cells, [])["choices"]
