"""benchmarks/report/tables.py: at most seven columns, one number a cell, and every set with every method."""

import re

import pytest

from benchmarks.report.names import ADAPTER
from benchmarks.report.tables import Table, break_even_table, differences, interval, number, score_table, set_tables


def changed(rows: list[dict], method: str, **values) -> list[dict]:
    return [{**row, **values} if row.get("method") == method and row["kind"] == "summary" else row for row in rows]


def adapters(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["kind"] == "summary" and row["method"] == ADAPTER]


def test_markdown_sets_numbers_to_the_right() -> None:
    table = Table("", ("set", "method", "score"), [["2 facts", "ours", "0.5"], ["4 facts", "theirs", "–"]])
    assert table.markdown().splitlines() == [
        "| set | method | score |",
        "| --- | --- | ---: |",
        "| 2 facts | ours | 0.5 |",
        "| 4 facts | theirs | – |",
    ]


def test_what_was_not_measured_is_a_dash() -> None:
    assert number("x")({}) == number("x")({"x": None}) == interval("x")({"x": None}) == interval("x")({}) == "–"
    assert number("x", 1)({"x": 0.25}) == "0.2" and interval("x")({"x": [0.1, 0.2]}) == "0.10 to 0.20"


def test_every_set_has_four_tables_with_every_method(report_rows) -> None:
    summaries = [row for row in report_rows if row["kind"] == "summary"]
    sets = dict.fromkeys((row["task"], row["set"]) for row in summaries)
    tables = set_tables(report_rows)
    assert len(tables) == 4 * len(sets)
    assert all([line[0] for line in table.lines].count("Doc-to-LoRA") == 1 for _, table in tables)


def test_set_tables_have_one_number_a_cell_but_for_intervals(report_rows) -> None:
    for _, table in set_tables(report_rows):
        assert len(table.head) <= 7
        for line in table.lines:
            for name, cell in zip(table.head[1:], line[1:], strict=True):
                assert "interval" in name or re.fullmatch(r"–|-?[\d,.]+(e-\d+)?", cell), (name, cell)


def test_a_caption_says_how_many_prompts_lost_their_middle(report_rows) -> None:
    captions = [table.caption for _, table in set_tables(changed(report_rows, "full_context", fits=0.75))]
    assert all("4 questions, 4 cases, 1 seeds; 25% of the prompts" in caption for caption in captions)


def test_score_table_has_interval_and_share_in_own_columns(report_rows) -> None:
    own = [row for row in adapters(report_rows) if row["set"] == "one entity" and row["task"] == "encyclopedia"]
    table = score_table("", own, {"set": lambda row: row["set"]})
    assert table.head == ["set", "method", "exact match", "95 % interval", "share of the gap closed"]
    assert table.lines == [["one entity", "Doc-to-LoRA", "0.50", "0.00 to 1.00", "0.67"]]


def test_break_even_has_a_line_for_each_alternative(report_rows) -> None:
    own = [row for row in adapters(report_rows) if row["set"] == "one entity" and row["task"] == "encyclopedia"]
    lines = break_even_table(own).lines
    assert [line[2] for line in lines] == ["full context", "prefix cache", "retrieval"]
    assert lines[0][:5] == ["one entity", "60", "full context", "5", "5 to 5"]


def test_an_alternative_that_is_never_beaten_says_never(report_rows) -> None:
    even = {"prefix_cache": {"seconds": None, "seconds_interval": [3.0, None]}}
    (line, *_) = break_even_table(adapters(changed(report_rows, ADAPTER, break_even=even))).lines
    assert line[2:] == ["prefix cache", "never", "3 to never", "–"]


def test_differences_leave_out_sets_that_documents_do_not_answer(report_rows) -> None:
    lines = differences(report_rows).lines
    assert len(lines) == 11 and not [line for line in lines if line[0].startswith(("locality", "control"))]
    assert lines[0][:2] == ["encyclopedia, one entity", "-0.25"] and lines[0][5] == "+0.50"
    assert lines[0][2].startswith("-") and " to " in lines[0][2]


@pytest.mark.parametrize("method", ["full_context", "no_context"])
def test_differences_need_both_ends_of_the_gap(report_rows, method) -> None:
    rows = [
        {**row, "against": {key: value for key, value in row["against"].items() if key != method}}
        if "against" in row
        else row
        for row in report_rows
    ]
    assert differences(rows).lines == []
