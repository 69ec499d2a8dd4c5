"""benchmarks/measuring/rows.py: files of rows that are complete, and reports put together."""

import json
from pathlib import Path

import pytest

from benchmarks.measuring.rows import (
    describe_run,
    merged,
    read_measured,
    read_report_rows,
    read_rows,
    rounded,
    write_report_rows,
    write_rows,
)

ROOT = Path(__file__).parents[3]


def test_rows_say_what_made_them(tmp_path) -> None:
    write_rows(tmp_path / "new/rows.jsonl", [{"score": 1}], run=describe_run({"seed": 3}))
    (row,) = map(json.loads, (tmp_path / "new/rows.jsonl").read_text(encoding="utf-8").splitlines())
    assert row["score"] == 1 and row["run"]["config"] == {"seed": 3}
    assert {"commit", "hardware", "threads", "versions", "date"} <= set(row["run"])


def test_the_first_row_alone_may_say_what_made_them(tmp_path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"score": 1}, {"score": 2}], run={"commit": "abc"}, in_each=False)
    assert read_rows(tmp_path / "rows.jsonl") == [{"score": 1, "run": {"commit": "abc"}}, {"score": 2}]


def test_rows_that_fail_half_way_leave_the_file_as_it_was(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("before\n", encoding="utf-8")
    with pytest.raises(TypeError):
        write_rows(path, [{"score": 1}, {"score": object()}], run={})
    assert path.read_text(encoding="utf-8") == "before\n" and list(tmp_path.iterdir()) == [path]


def test_report_rows_come_back_as_they_were(report_rows, tmp_path) -> None:
    write_report_rows(tmp_path / "rows.jsonl", report_rows)
    found = [{k: v for k, v in row.items() if k != "run"} for row in read_report_rows(tmp_path / "rows.jsonl")]
    assert found == [{k: v for k, v in row.items() if k != "run"} for row in report_rows]


def test_rows_of_before_are_read_with_present_names(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    old = {"kind": "sweep", "method": "wrong_adapter", "commands": ["python -m benchmarks.run sweep=crowd"]}
    path.write_text(json.dumps(old) + "\n", encoding="utf-8")
    now = {"kind": "sweep", "method": "wrong_document", "commands": ["python -m benchmarks.run sweep=many_documents"]}
    assert read_report_rows(path) == read_rows(path) == read_measured(str(path))[0] == [now]
    for committed in (ROOT / "benchmarks/results").glob("*.jsonl"):
        for row in read_rows(committed):
            for command in row.get("commands", ()):
                name = command.partition("sweep=")[2].partition(" ")[0]
                assert not name or (ROOT / f"conf/benchmark/sweep/{name}.yaml").is_file(), command


def test_merged_reports_rename_a_task_that_both_have(report_rows) -> None:
    sweep, *rows = report_rows
    other = sweep | {"commands": ["python -m benchmarks.run sweep=interference"], "dates": ["2027-01-01"] * 2}
    other |= {"commands_by_task": {"locality": other["commands"]}}
    again = [{**row, "exact_match": 0.25} for row in rows if row.get("task") == "locality"]
    joined, *found = merged([("bench", report_rows), ("interference", [other, *again])])
    assert len(found) == len(rows) + len(again)
    assert {row["exact_match"] for row in found if row.get("task") == "interference"} == {0.25}
    assert joined["commands"] == [*sweep["commands"], *other["commands"]]
    assert joined["dates"] == ["2026-01-01", "2027-01-01"] and joined["cells"] == 2 * sweep["cells"]
    assert joined["commands_by_task"]["interference"] == other["commands"]
    assert merged([("bench", report_rows)]) == report_rows


def test_floats_are_rounded_to_six_digits_wherever_they_stand() -> None:
    assert rounded({"a": [1 / 3, (2e6 / 3,)], "b": 7, "c": None}) == {"a": [0.333333, [666667.0]], "b": 7, "c": None}
