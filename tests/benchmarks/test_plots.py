"""benchmarks/plots.py: every figure has its controls, a table and its tasks; what is missing is named."""

import pytest

from benchmarks.plots import FIGURES, all_figures, break_even, capacity, even_found, needles
from benchmarks.summary import ADAPTER, is_by_length

CONTROLS = ("no context", "full context", "wrong document")


@pytest.fixture
def figures(report_rows) -> dict:
    return {figure.key: figure for figure in all_figures(report_rows)[0]}


def test_every_figure_is_drawn_where_its_rows_are_there(report_rows, figures) -> None:
    assert len(figures) == len(FIGURES) and all_figures(report_rows)[1] == []


@pytest.mark.parametrize(
    "key", ["sets", "length", "needles", "composition", "interference", "capacity", "pareto", "curves"]
)
def test_every_panel_of_quality_has_its_controls(figures, key) -> None:
    names = [name for name, _ in figures[key].legend]
    assert set(CONTROLS) <= set(names)
    for panel in figures[key].panels:
        if "by depth" not in panel:
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
    assert len(needles([*report_rows, *pairs]).panels) == len(needles(report_rows).panels) + 1


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
