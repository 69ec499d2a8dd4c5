"""benchmarks/plots.py: every figure has its controls, a table and its tasks; what is missing is named."""

import pytest

from benchmarks.plots import FIGURES, all_figures, break_even, capacity, conflict, even_found, needles
from benchmarks.summary import ADAPTER, is_by_length

CONTROLS = ("no context", "full context", "wrong document")


@pytest.fixture
def figures(report_rows) -> dict:
    return {figure.key: figure for figure in all_figures(report_rows)[0]}


def test_every_figure_is_drawn_where_its_rows_are_there(report_rows, figures) -> None:
    assert len(figures) == len(FIGURES) and all_figures(report_rows)[1] == []


@pytest.mark.parametrize(
    "key", ["sets", "length", "needles", "composition", "interference", "capacity", "conflict", "pareto", "curves"]
)
def test_every_panel_of_quality_has_its_controls(figures, key) -> None:
    names = [name for name, _ in figures[key].legend]
    assert set(CONTROLS) <= set(names)
    for panel in figures[key].panels:
        assert all(name in panel for name in CONTROLS)


def test_every_figure_has_a_table_a_text_and_tasks(figures) -> None:
    for figure in figures.values():
        assert figure.text and figure.tasks and figure.panels
        for caption, head, lines in figure.tables:
            assert caption and lines and all(len(line) == len(head) for line in lines)


def test_what_has_no_rows_is_named_with_its_command(report_rows) -> None:
    rows = [row for row in report_rows if row.get("task") not in ("needles", "capacity")]
    drawn, missing = all_figures(rows)
    assert {"needles", "capacity"}.isdisjoint(figure.key for figure in drawn)
    assert [command for _, command in missing] == [
        "python -m benchmarks.run sweep=niah",
        "python -m benchmarks.run sweep=capacity",
    ]
    assert all_figures([])[0] == [] and len(all_figures([])[1]) == len(FIGURES)


def test_a_prefix_cache_that_scores_as_full_context_is_not_drawn_over_it(figures, report_rows) -> None:
    assert "prefix cache answers as full context does" in figures["length"].text
    other = [
        {**r, "exact_match": 0.9} if r.get("method") == "prefix_cache" and r["kind"] == "summary" else r
        for r in report_rows
    ]
    text = next(f for f in all_figures(other)[0] if f.key == "length").text
    assert "answers as full context" not in text


def test_needles_have_a_panel_by_depth_where_depths_differ(report_rows) -> None:
    pairs = [
        {**row, "by": ["num_chunks", "depth"], "attributes": {**row["attributes"], "depth": depth}}
        for row in report_rows
        for depth in (0.0, 1.0)
        if row["kind"] == "slice" and row["task"] == "needles"
    ]
    figure = needles([*report_rows, *pairs])
    assert len(figure.panels) == len(needles(report_rows).panels) + 1
    assert all(name in figure.panels[-1] for name in (*CONTROLS, "needle at 0% of the text"))


def test_capacity_has_a_line_for_each_rank_and_a_panel_for_each_task(report_rows) -> None:
    own = [row for row in report_rows if row.get("task") == "capacity"]
    ranked = [
        {**row, "method": f"doc_to_lora_rank{rank}", "attributes": {**row["attributes"], "rank": rank}}
        for rank in (32, 4)
        for row in own
        if row["method"] == "doc_to_lora"
    ]
    controls = [row for row in own if row["method"] in ("no_context", "full_context")]
    entities = [{**row, "task": "capacity_entities"} for row in [*controls, *ranked]]
    figure = capacity([*controls, *ranked, *entities])
    names = ["no context", "full context", "Doc-to-LoRA, rank 4 per chunk", "Doc-to-LoRA, rank 32 per chunk"]
    assert [name for name, _ in figure.legend] == names
    assert len(figure.panels) == 2 and all(name in panel for panel in figure.panels for name in names)


def test_capacity_has_each_rank_s_wrong_document_in_one_style_and_in_the_table(report_rows) -> None:
    own = [row for row in report_rows if row.get("task") == "capacity"]
    ranked = [
        {**row, "method": f"{row['method']}_rank{rank}", "attributes": {**row["attributes"], "rank": rank}}
        for rank in (32, 4)
        for row in own
        if row["method"] in ("doc_to_lora", "wrong_document")
    ]
    figure = capacity([row for row in own if row["method"] in ("no_context", "full_context")] + ranked)
    names = [name for name, _ in figure.legend]
    assert names[:3] == ["no context", "full context", "wrong document, each rank"] and len(names) == 5
    (_, _, lines) = figure.tables[0]
    assert [line[2] for line in lines if line[1] == "2"] == [
        *("no context", "full context", "wrong document, rank 4 per chunk", "wrong document, rank 32 per chunk"),
        *("Doc-to-LoRA, rank 4 per chunk", "Doc-to-LoRA, rank 32 per chunk"),
    ]
    assert all(f"wrong document, rank {rank} per chunk" in figure.panels[0] for rank in (4, 32))


def test_capacity_has_a_line_for_each_rank_that_gradient_steps_wrote_at(report_rows) -> None:
    own = [row for row in report_rows if row.get("task") == "capacity"]
    generated = [row for row in own if row["method"] == "doc_to_lora"]
    written = [{**row, "method": f"distillation_oracle_rank{rank}"} for rank in (16, 4) for row in generated]
    figure = capacity([*generated, *written])
    names = [name for name, _ in figure.legend]
    assert names[1:] == ["distillation, same questions, rank 4", "distillation, same questions, rank 16"]
    assert len({style for _, style in figure.legend}) == 3
    assert all(name in figure.panels[0] for name in names)
    (_, _, lines) = figure.tables[0]
    assert [line[2] for line in lines if line[1] == "2"] == names


def test_conflict_has_a_panel_for_each_kind_of_fact_and_a_name_for_each_band(report_rows) -> None:
    figure = conflict(report_rows)
    invented, real = figure.panels
    assert "never asked, Doc-to-LoRA: 0.50" in invented and "asked 260 to 331 times, full context: 0.75" in invented
    assert "asked 332 times or more, Doc-to-LoRA: 0.50" in real and "never asked" not in real
    (_, head, lines) = figure.tables[0]
    assert head[:4] == ("facts", "times asked in training", "times, mean", "questions")
    assert [line[:4] for line in lines] == [
        ["Invented entities", "never asked", "0", "4"],
        ["Invented entities", "asked 260 to 331 times", "300", "4"],
        ["The real world", "asked 332 times or more", "340", "4"],
    ]
    assert "invented entities asked 260 to 331 times 0.50" in figure.finding


def test_conflict_says_what_is_left_of_what_was_learned(report_rows) -> None:
    rows = [
        {**row, "old_answer": 0.25} if row.get("by") and row["attributes"].get("times_asked_from") == 260 else row
        for row in report_rows
    ]
    (_, head, lines) = conflict(rows).tables[0]
    place = head.index("Doc-to-LoRA: what was learned")
    assert [line[place] for line in lines] == ["–", "0.25", "–"]


def test_conflict_takes_the_sweep_of_its_own_where_it_was_measured(report_rows) -> None:
    tiny = [
        {**row, "task": "conflict", "exact_match": 0.125}
        for row in report_rows
        if row.get("task") == "conflict_by_times_asked"
    ]
    (_, _, lines) = conflict([*tiny, *report_rows]).tables[0]
    assert len(lines) == 3 and lines == conflict(report_rows).tables[0][2]
    assert all("0.12" in line[4] for line in conflict(tiny).tables[0][2])
    assert conflict([row for row in report_rows if row.get("by") != ["real_world", "times_asked_from"]]) is None


def test_the_surface_has_both_units_and_says_how_seconds_were_fitted(report_rows) -> None:
    figure = break_even(report_rows)
    assert len(figure.panels) == 6 and len(figure.tables) == 7
    assert "Seconds are fitted to the measured rows" in figure.text and "PyTorch's counter" in figure.text
    without = [{**r, "seconds": None} if r["kind"] == "surface" else r for r in report_rows]
    assert len(break_even(without).panels) == 3


def test_the_finding_counts_sets_and_questions(report_rows) -> None:
    own = [row for row in report_rows if is_by_length(row) and row["method"] == ADAPTER]
    assert "against full context after 5 questions" in even_found(own)
    assert even_found([]) == ""
