"""python -m benchmarks.report: rows and a page of cells, and the same page of rows that are there."""

import json
import runpy
import sys
from pathlib import Path

from benchmarks.measuring.cells import cell_path, write_cell

ROOT = Path(__file__).parents[3]


def run(monkeypatch, *arguments: str) -> int | str | None:
    """python -m benchmarks.report; gives what it exits with."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["benchmarks.report", *arguments])
    # runpy warns of a module that is there already
    monkeypatch.delitem(sys.modules, "benchmarks.report.__main__", raising=False)
    try:
        runpy.run_module("benchmarks.report", run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return None


def test_page_from_written_rows_equals_page_from_cells(cells, monkeypatch, tmp_path, capsys) -> None:
    for row in cells:
        row["run"] = row.get("run")
    methods = ("no_context", "full_context", "doc_to_lora")
    cells = [row for row in cells if row["task"] == "encyclopedia" and row["method"] in methods]
    for task, method in dict.fromkeys((row["task"], row["method"]) for row in cells):
        own = [row for row in cells if (row["task"], row["method"]) == (task, method)]
        for row in own:
            if row["run"]:
                row["run"]["config"]["checkpoint"] = str(tmp_path / "gone")  # no FLOPs, and no model to load
        write_cell(cell_path(tmp_path, task=task, method=method, seed=0, identity="x"), own)
    pages = [tmp_path / "first.html", tmp_path / "second.html"]
    rows = tmp_path / "rows.jsonl"
    assert not run(monkeypatch, f"input_dir={tmp_path}", f"output={rows}", f"page={pages[0]}")
    first = capsys.readouterr().out
    assert not run(monkeypatch, f"rows={rows}", f"page={pages[1]}")
    assert pages[0].read_text(encoding="utf-8") == pages[1].read_text(encoding="utf-8")
    assert "| Doc-to-LoRA | 0.500 | 0.000 to 1.000 |" in first and "| one entity | 60 | full context | 5 |" in first
    written = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    assert written[0]["kind"] == "sweep"
    assert all({"commits", "hardware", "dates"} == set(row["run"]) for row in written)


def test_report_refuses_rows_it_did_not_write(monkeypatch, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    assert "Cannot read rows" in run(monkeypatch, f"rows={path}", "page=null")
    path.write_text('{"kind": "summary"}\n', encoding="utf-8")
    message = run(monkeypatch, f"rows={path}", "page=null")
    assert "does not begin with a row of kind sweep" in message and "\n" not in message
    assert "No finished cells" in run(monkeypatch, f"input_dir={tmp_path}", "page=null", "output=null")


def test_a_summary_that_is_not_there_is_one_line(monkeypatch, tmp_path, report_rows) -> None:
    from benchmarks.measuring.rows import write_report_rows

    write_report_rows(tmp_path / "rows.jsonl", report_rows)
    message = run(monkeypatch, f"rows={tmp_path}/rows.jsonl", f"summary={tmp_path}/none.html", "page=null")
    assert message.startswith("benchmarks.report: ") and "none.html" in message and "\n" not in message
