"""benchmarks/report/figures.py: every figure has its controls, tables and tasks; what is missing is named."""

import pytest

from benchmarks.report.figures import FIGURES, all_figures, break_even, capacity, composition, conflict, needles
from benchmarks.report.names import TEXTS
from benchmarks.report.plots import Panel, inline, style_of

CONTROLS = {"no context", "full context", "wrong document"}
QUALITY = ("sets", "length", "needles", "composition", "interference", "capacity", "conflict", "pareto", "curves")


@pytest.fixture(scope="module")
def figures(report_rows) -> dict:
    return {figure.key: figure for figure in all_figures(report_rows)[0]}


def names(panel: Panel) -> list[str]:
    return [one.name for one in panel.series]


def ranked(rows: list[dict], method: str, *ranks: int) -> list[dict]:
    return [
        {**row, "method": f"{method}_rank{rank}", "attributes": {**row["attributes"], "rank": rank}}
        for rank in ranks
        for row in rows
        if row["method"] == method
    ]


def test_every_figure_with_rows_is_drawn(report_rows, figures) -> None:
    assert list(figures) == list(TEXTS["figures"]) and set(figures) == set(FIGURES)
    assert all_figures(report_rows)[1] == []


@pytest.mark.parametrize("key", QUALITY)
def test_every_quality_panel_has_its_controls(figures, key) -> None:
    assert CONTROLS <= {name for name, _ in figures[key].legend}
    assert figures[key].panels and all(set(names(panel)) >= CONTROLS for panel in figures[key].panels)


@pytest.mark.parametrize("key", TEXTS["figures"])
def test_every_figure_has_tables_of_at_most_seven_columns(figures, key) -> None:
    figure = figures[key]
    assert figure.tables and figure.tasks and all(figure.paragraphs)
    for table in figure.tables:
        assert table.lines and len(table.head) <= 7 and {len(line) for line in table.lines} == {len(table.head)}


@pytest.mark.parametrize("key", QUALITY)
def test_every_figure_of_quality_has_intervals_in_its_table(figures, key) -> None:
    table = figures[key].tables[0]
    assert "95 % interval" in table.head
    assert any(" to " in line[list(table.head).index("95 % interval")] for line in table.lines)


@pytest.mark.parametrize("key", TEXTS["figures"])
def test_every_panel_can_be_drawn(figures, key) -> None:
    assert all(inline(panel, key).startswith("<svg ") for panel in figures[key].panels)


def test_figure_without_rows_names_its_command(report_rows) -> None:
    rows = [row for row in report_rows if row.get("task") not in ("needles", "capacity")]
    drawn, missing = all_figures(rows)
    assert {"needles", "capacity"}.isdisjoint(figure.key for figure in drawn)
    sweeps = [command.removeprefix("python -m benchmarks.run sweep=") for _, command in missing]
    assert sweeps == ["niah", "capacity"]
    assert all_figures([])[0] == [] and len(all_figures([])[1]) == len(FIGURES)


def test_a_prefix_cache_equal_to_full_context_is_not_drawn(figures, report_rows) -> None:
    assert figures["length"].notes == "The prefix cache answers as full context does."
    assert not any("prefix cache" in names(panel) for panel in figures["length"].panels)
    other = [
        {**r, "exact_match": 0.9} if r.get("method") == "prefix_cache" and r["kind"] == "summary" else r
        for r in report_rows
    ]
    figure = next(figure for figure in all_figures(other)[0] if figure.key == "length")
    assert not figure.notes and "prefix cache" in names(figure.panels[0])


def test_needles_figure_has_a_depth_panel(report_rows) -> None:
    pairs = [
        {**row, "by": ["num_chunks", "depth"], "attributes": {**row["attributes"], "depth": depth}}
        for row in report_rows
        for depth in (0.0, 1.0)
        if row["kind"] == "slice" and row["task"] == "needles"
    ]
    figure = needles([*report_rows, *pairs])
    assert len(figure.panels) == len(needles(report_rows).panels) + 1
    assert set(names(figure.panels[-1])) == CONTROLS | {"needle at 0% of the text", "needle at 100% of the text"}
    assert {line[1] for line in figure.tables[1].lines} == {"0%", "100%"}


def test_two_sweeps_of_joined_documents_have_a_panel_each(report_rows) -> None:
    more = [{**row, "task": "many_documents"} for row in report_rows if row.get("task") == "composition"]
    figure = composition([*report_rows, *more])
    assert figure.tasks == ["composition", "many_documents"] and figure.tables[0].head[0] == "task"
    assert {panel.title.split(":")[0] for panel in figure.panels} == {"composition", "many documents"}


def test_capacity_has_a_line_per_rank_and_a_panel_per_task(report_rows) -> None:
    own = [row for row in report_rows if row.get("task") == "capacity"]
    rows = ranked(own, "doc_to_lora", 32, 4) + [r for r in own if r["method"] in ("no_context", "full_context")]
    figure = capacity([*rows, *({**row, "task": "capacity_entities"} for row in rows)])
    expected = ["no context", "full context", "Doc-to-LoRA, rank 4", "Doc-to-LoRA, rank 32"]
    assert [name for name, _ in figure.legend] == expected
    assert [names(panel) for panel in figure.panels] == [expected] * 2


def test_capacity_has_each_rank_s_wrong_document_in_one_style(report_rows) -> None:
    own = [row for row in report_rows if row.get("task") == "capacity"]
    figure = capacity(ranked(own, "doc_to_lora", 32, 4) + ranked(own, "wrong_document", 32, 4))
    wrong = [style for name, style in figure.legend if name.startswith("wrong document, rank")]
    assert wrong == [style_of("wrong_document")] * 2
    assert [line[2] for line in figure.tables[0].lines if line[1] == "2"] == [name for name, _ in figure.legend]


def test_capacity_draws_what_gradient_steps_wrote_dashed(report_rows) -> None:
    own = [row for row in report_rows if row.get("task") == "capacity" and row["method"] == "doc_to_lora"]
    written = [{**row, "method": f"distillation_oracle_rank{rank}"} for rank in (16, 4) for row in own]
    figure = capacity([*own, *written])
    styles = dict(figure.legend)
    assert list(styles)[1:] == ["distillation, same questions, rank 4", "distillation, same questions, rank 16"]
    assert len(set(styles.values())) == 3 and [style.dashes for style in styles.values()] == ["-", "--", "--"]


def test_conflict_has_a_panel_for_each_kind_of_fact(report_rows) -> None:
    invented, real = conflict(report_rows).panels
    assert invented.groups == ["never asked", "asked 260 to 331 times"] and real.groups == ["asked 332 times or more"]
    adapter = next(one for one in invented.series if one.name == "Doc-to-LoRA")
    assert [(point.x, point.y) for point in adapter.points] == [(0, 0.5), (1, 0.5)]


def test_conflict_figure_states_remaining_learned_answers(report_rows) -> None:
    rows = [
        {**row, "old_answer": 0.25} if row.get("by") and row["attributes"].get("times_asked_from") == 260 else row
        for row in report_rows
    ]
    _, table = conflict(rows).tables
    assert [line[:5] for line in table.lines] == [
        ["Invented entities", "never asked", "0", "4", "–"],
        ["Invented entities", "asked 260 to 331 times", "300", "4", "0.25"],
        ["The real world", "asked 332 times or more", "340", "4", "–"],
    ]


def test_conflict_takes_its_own_sweep_where_it_was_measured(report_rows) -> None:
    tiny = [
        {**row, "task": "conflict", "exact_match": 0.125}
        for row in report_rows
        if row.get("task") == "conflict_by_times_asked"
    ]
    assert conflict([*tiny, *report_rows]).tables == conflict(report_rows).tables
    assert {line[3] for line in conflict(tiny).tables[0].lines} == {"0.12"}
    assert conflict([row for row in report_rows if row.get("by") != ["real_world", "times_asked_from"]]) is None


def test_the_surface_has_both_units_and_says_how_it_was_fitted(report_rows) -> None:
    figure = break_even(report_rows)
    assert len(figure.panels) == 6 and len(figure.tables) == 3
    assert "PyTorch's counter" in figure.paragraphs[1] and "the fit of the seconds is off by 0.0%" in figure.notes
    without = [{**r, "seconds": None} if r["kind"] == "surface" else r for r in report_rows]
    assert len(break_even(without).panels) == 3
