"""benchmarks/report.py: tables in Markdown, and rows that a page can be made of again."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.cells import cell_path, write_cell

ROOT = Path(__file__).parents[2]


def run(monkeypatch, *arguments: str) -> int | str | None:
    """python -m benchmarks.report; gives what it exits with."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["benchmarks.report", *arguments])
    monkeypatch.delitem(
        sys.modules, "benchmarks.report", raising=False
    )  # runpy warns of a module that is there already
    try:
        runpy.run_module("benchmarks.report", run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return None


def test_markdown_has_every_method_of_every_set(report_rows) -> None:
    text = report.markdown(report_rows)
    sets = {(r["task"], r["set"]) for r in report_rows if r["kind"] == "summary"}
    assert text.count("| Doc-to-LoRA | ") == 2 * len(sets)
    assert "| one entity | 60 | 5 |" in text


def test_the_overview_has_scores_with_intervals_then_costs(report_rows) -> None:
    scores, costs = (part.splitlines() for part in report.overview(report_rows).split("\n\n"))
    assert scores[0] == "| exact match | one entity |"
    assert scores[6].startswith("| Doc-to-LoRA | 0.50 (0.00 to 1.00) |")
    assert costs[0].startswith("| one entity, 60 tokens | share of the gap closed | prepare, ms | first token, ms |")
    assert costs[6].startswith("| Doc-to-LoRA | 0.67 | 200 | 6 | 10 | 0.977 | 4.98 / ")
    assert {line.count("|") for line in scores} == {3} and {line.count("|") for line in costs} == {8}


@pytest.mark.parametrize(("name", "first"), [("niah", "chunks"), ("composition", "documents in one adapter")])
def test_small_tables_hold_the_adapter_beside_its_controls(report_rows, name, first) -> None:
    lines = getattr(report, name)(report_rows).splitlines()
    methods = "no context | wrong document | full context | retrieval | Doc-to-LoRA"
    assert lines[0] == f"| {first} | {methods} | share of the gap closed |"
    assert len(lines) == 4 and all("0.50 (0.00 to 1.00)" in line and line.endswith(" 0.67 |") for line in lines[2:])


def test_needles_by_training_seed_have_a_column_for_each_and_the_range_of_the_controls(report_rows) -> None:
    rows = [
        {**row, "method": f"{row['method']}_seed{seed}", "exact_match": row["exact_match"] * (1 - seed / 20)}
        for seed in (10, 2)
        for row in report_rows
        if row.get("task") == "needles"
    ]
    lines = report.niah_seeds(rows).splitlines()
    own = "Doc-to-LoRA, training seed 2 | Doc-to-LoRA, training seed 10"
    assert lines[0] == f"| chunks | {own} | no context | full context | wrong document |"
    score = {row["method"].removesuffix("_seed2"): row["exact_match"] / 0.9 for row in rows}
    assert len(lines) == 4 and lines[2].split(" | ")[1:] == [
        "0.45 (0.00 to 1.00)",
        "0.25 (0.00 to 1.00)",
        "0.00",
        f"{score['full_context'] * 0.5:.2f} to {score['full_context'] * 0.9:.2f}",
        "0.00 |",
    ]


def test_capacity_has_a_column_for_each_rank(report_rows) -> None:
    more = [
        {**row, "method": "doc_to_lora_rank16", "attributes": {**row["attributes"], "rank": 16}}
        for row in report_rows
        if row.get("task") == "capacity" and row["method"] == "doc_to_lora"
    ]
    lines = report.capacity([*report_rows, *more]).splitlines()
    ranks = "Doc-to-LoRA, rank 8 per chunk | Doc-to-LoRA, rank 16 per chunk"
    assert lines[0] == f"| facts about | facts in the document | no context | full context | wrong document | {ranks} |"
    assert [line.split(" | ")[:2] for line in lines[2:]] == [["| Four facts about each entity", n] for n in "24"]


def test_interference_has_a_line_for_each_method_with_an_adapter(report_rows) -> None:
    lines = report.interference(report_rows).splitlines()
    assert lines[0] == "| exact match | background |"
    assert lines[2].startswith("| no context | 1.000") and not [line for line in lines if "retrieval" in line]


def test_conflict_has_a_line_for_each_band_with_the_controls(report_rows) -> None:
    lines = report.conflict(report_rows).splitlines()
    methods = "no context | full context | retrieval | Doc-to-LoRA | wrong document"
    assert lines[0].startswith(f"| facts | times asked in training | times, mean | questions | {methods} |")
    assert len(lines) == 5 and {line.count("|") for line in lines} == {12}


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("niah", "needles"),
        ("niah_seeds", "needles"),
        ("composition",) * 2,
        ("capacity",) * 2,
        ("interference", "locality"),
        ("conflict", "conflict_by_times_asked"),
    ],
)
def test_a_small_table_without_rows_says_which_command_measures_them(report_rows, name, task) -> None:
    rows = [row for row in report_rows if row.get("task") != task]
    with pytest.raises(ValueError, match=f"run python -m benchmarks.run sweep={name}"):
        getattr(report, name)(rows)


def test_reports_are_merged_and_a_task_of_both_goes_by_its_file_s_name(report_rows) -> None:
    sweep, *rows = report_rows
    other = sweep | {"commands": ["python -m benchmarks.run sweep=interference"], "dates": ["2027-01-01"] * 2}
    other |= {"commands_by_task": {"locality": other["commands"]}}
    again = [{**row, "exact_match": 0.25} for row in rows if row.get("task") == "locality"]
    joined, *found = report.merged([("bench", report_rows), ("interference", [other, *again])])
    assert len(found) == len(rows) + len(again)
    assert {row["exact_match"] for row in found if row.get("task") == "interference"} == {0.25}
    assert joined["commands"] == [*sweep["commands"], *other["commands"]]
    assert joined["dates"] == ["2026-01-01", "2027-01-01"] and joined["cells"] == 2 * sweep["cells"]
    assert joined["commands_by_task"]["interference"] == other["commands"]
    assert "0.25" in report.interference([joined, *found])  # the sweep of its own counts
    assert report.merged([("bench", report_rows)]) == report_rows


def test_the_page_of_written_rows_is_the_page_of_the_cells(cells, monkeypatch, tmp_path) -> None:
    for row in cells:
        row["run"] = row.get("run")
    cells = [row for row in cells if row["task"] in ("encyclopedia", "locality")]
    for task, method in dict.fromkeys((row["task"], row["method"]) for row in cells):
        own = [row for row in cells if (row["task"], row["method"]) == (task, method)]
        for row in own:
            if row["run"]:
                row["run"]["config"]["checkpoint"] = str(tmp_path / "gone")  # no FLOPs, and no model to load
        write_cell(cell_path(tmp_path, task=task, method=method, seed=0, identity="x"), own)
    pages = [tmp_path / "first.html", tmp_path / "second.html"]
    rows = tmp_path / "rows.jsonl"
    assert not run(monkeypatch, f"input_dir={tmp_path}", f"output={rows}", f"page={pages[0]}")
    assert not run(monkeypatch, f"rows={rows}", f"page={pages[1]}")
    assert pages[0].read_text(encoding="utf-8") == pages[1].read_text(encoding="utf-8")
    written = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    assert written[0]["kind"] == "sweep"
    assert all({"commits", "hardware", "dates"} == set(row["run"]) for row in written)


def test_rows_that_no_report_wrote_are_refused_in_one_line(monkeypatch, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    assert "Cannot read rows" in run(monkeypatch, f"rows={path}", "page=null")
    path.write_text('{"kind": "summary"}\n', encoding="utf-8")
    message = run(monkeypatch, f"rows={path}", "page=null")
    assert "does not begin with a row of kind sweep" in message and "\n" not in message
    assert "No finished cells" in run(monkeypatch, f"input_dir={tmp_path}", "page=null", "output=null")
