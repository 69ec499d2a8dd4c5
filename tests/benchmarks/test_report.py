"""benchmarks/report.py and plots.py: figures that follow from made rows, a page that needs nothing but itself."""

import json
import re

import pytest

from benchmarks.report import commands, describe, markdown, overview, page, summarize

SCORES = {
    "no_context": [0, 0, 0, 0],
    "full_context": [1, 1, 1, 0],
    "doc_to_lora": [1, 0, 1, 0],
    "text_lora": [0, 0, 1, 0],
}
COSTS = {
    "no_context": (0.0, 0.01),
    "full_context": (0.0, 0.05),
    "doc_to_lora": (0.2, 0.01),
    "text_lora": (2.0, 0.01),
}


def made_rows() -> list[dict]:
    rows = []
    for method, scores in SCORES.items():
        cell = {"task": "encyclopedia", "method": method, "seed": 0, "identity": "x"}
        for place, (name, tokens) in enumerate((("one entity", 60), ("two entities", 130))):
            for number, score in enumerate(scores):
                for step in (0, 8) if method == "text_lora" else (None,):
                    value = float(score if step != 0 else 0)
                    row = {"kind": "question", "set": name, "case": f"{place}/{number}", "number": 0, "step": step}
                    row |= {"exact_match": value, "token_f1": value, "fits": True, "log_likelihood": -1.0 - number}
                    row |= dict.fromkeys(("rouge_l_precision", "rouge_l_recall", "rouge_l_f1"), value)
                    rows.append(cell | row)
                prepare, question = COSTS[method]
                rows.append(
                    cell
                    | {"kind": "case", "set": name, "case": f"{place}/{number}", "documents": 1, "questions": 1}
                    | {"document_tokens": tokens, "stored_bytes": 1000, "prepare_s": prepare, "question_s": question}
                    | {
                        "first_token_s": question / 2,
                        "tokens_per_s": 100.0,
                        "prepare_flops": 10**6,
                        "answer_flops": 10**6,
                    }
                    | {"prepare_peak_bytes": 10**6, "answer_peak_bytes": 10**5}
                    | {"step_s": {0: 0.0, 8: prepare} if method == "text_lora" else {}}
                )
        config = {"task": {}, "method": {"lr": 0.01}, "checkpoint": "assets/tiny", "max_new_tokens": 32}
        run = {
            "commit": "abc",
            "hardware": "2 CPU cores",
            "threads": 2,
            "versions": {"torch": "2"},
            "date": "2026-01-01",
        }
        overrides = ["seed=0", "task=encyclopedia", f"method={method}"]
        rows.append(cell | {"kind": "summary", "wall_s": 1.0, "run": run | {"config": config}, "overrides": overrides})
    return json.loads(json.dumps(rows))


def by_method(rows: list[dict], name: str = "one entity") -> dict[str, dict]:
    return {row["method"]: row for row in rows if row["set"] == name}


def test_scores_stand_beside_full_context_and_the_floor() -> None:
    rows = summarize(made_rows())
    own = by_method(rows)["doc_to_lora"]
    assert (own["exact_match"], own["questions"], own["cases"], own["seeds"]) == (0.5, 4, 4, 1)
    assert own["relative"] == own["gap_closed"] == pytest.approx(2 / 3)
    assert own["gap_closed_interval"] is None or own["gap_closed_interval"][0] <= 2 / 3 <= own["gap_closed_interval"][1]
    assert own["over_floor"] == 0.5
    assert by_method(rows)["no_context"]["gap_closed"] == 0
    assert [row["method"] for row in rows][:4] == ["no_context", "full_context", "doc_to_lora", "text_lora"]


def test_break_even_follows_from_the_costs() -> None:
    even = by_method(summarize(made_rows()))["doc_to_lora"]["break_even"]
    assert even["full_context"]["seconds"] == pytest.approx(0.2 / 0.04)
    assert even["full_context"]["flops"] is None  # as dear each, and no cheaper before: never


def test_gradient_methods_have_a_curve_and_their_last_step_in_the_table() -> None:
    own = by_method(summarize(made_rows()))["text_lora"]
    assert [(p["step"], p["exact_match"], p["seconds"]) for p in own["curve"]] == [(0, 0.0, 0.0), (8, 0.25, 2.0)]
    assert own["exact_match"] == 0.25


def test_two_settings_of_one_name_are_refused() -> None:
    rows = made_rows()
    other = next(row for row in made_rows() if row["kind"] == "summary")
    other["run"]["config"]["method"]["lr"] = 0.1
    with pytest.raises(ValueError, match="method_name="):
        summarize([*rows, other])


def test_markdown_has_every_method_of_every_set() -> None:
    text = markdown(summarize(made_rows()))
    assert text.count("| doc to lora | 0.500 |") == 2
    assert "| one entity | 60 | 5 | never |" in text


def test_the_overview_has_a_line_per_method_with_its_interval() -> None:
    rows = [row for row in summarize(made_rows())]
    lines = overview(rows).splitlines()
    assert lines[0].startswith("| method | one entity | prepare, ms | question, ms |")
    assert lines[4].startswith("| doc to lora | 0.50 (0.00 to 1.00) | 200 | 10 |")


def test_commands_of_one_sweep_become_one() -> None:
    (command,) = commands(made_rows())
    methods = "no_context,full_context,doc_to_lora,text_lora"
    assert command == f"python -m benchmarks.run --multirun seed=0 task=encyclopedia method={methods}"
    rows = made_rows()
    for row in rows:
        if row["kind"] == "summary":
            row["overrides"].append("sweep=tiny")
    assert commands(rows) == ["python -m benchmarks.run sweep=tiny"]


def test_the_page_needs_nothing_but_itself_and_follows_the_reader_s_settings() -> None:
    rows = made_rows()
    error = {"task": "squad", "method": "no_context", "seed": 0, "error": "ValueError: <no file>"}
    text = page(summarize(rows), [("Plot", "What it shows.", "<svg width='1'></svg>")], run=describe(rows, [error]))
    assert not re.search(r'(?:src|href)="(?!#)', text) and "<script" not in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert text.count("<caption>") == text.count("<table>") == 5
    assert text.count("tabindex=0 role=region aria-label=") == 6
    assert '<svg role="img" aria-label="Plot. What it shows."' in text
    assert "squad, no_context, seed 0: ValueError: &lt;no file&gt;" in text
    assert "python -m benchmarks.run --multirun" in text


def test_plots_take_the_page_s_colour_and_ids_of_their_own() -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra [bench]")
    from benchmarks.plots import accuracy_by_length, capacity, cost_by_length, curves, memory_by_length, pareto

    rows = summarize(made_rows())
    drawn = [plot(rows) for plot in (accuracy_by_length, cost_by_length, memory_by_length, capacity, pareto, curves)]
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in drawn]
    assert all(svg.startswith("<svg") and "currentColor" in svg and "doc to lora" in svg for svg in drawn)
    assert not set.intersection(*ids)
    used = [set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg)) for svg in drawn]
    assert all(references <= own for references, own in zip(used, ids, strict=True))
    assert capacity([]) == "" and accuracy_by_length(rows) == drawn[0]


def test_the_break_even_surface_is_drawn_from_the_shipped_model_s_shapes() -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra [bench]")
    from pathlib import Path

    from benchmarks.plots import break_even_surface, cost_model

    checkpoint = str(Path(__file__).parents[2] / "assets/tiny")
    model = cost_model(checkpoint)
    own, full = model.costs("doc_to_lora", 400), model.costs("full_context", 400)
    assert own.prepare > 0 == full.prepare and own.question < full.question
    assert "against full context" in break_even_surface(checkpoint)
    with pytest.raises(ValueError, match="no_context"):
        model.costs("no_context", 400)
