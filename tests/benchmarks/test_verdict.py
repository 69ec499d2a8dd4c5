"""benchmarks/verdict.py: wins, what is level and losses follow from the rows."""

from benchmarks.verdict import answerable, compared, details, set_by_set, verdict


def changed(rows: list[dict], method: str, **values) -> list[dict]:
    return [{**row, **values} if row.get("method") == method and row["kind"] == "summary" else row for row in rows]


def test_the_paragraph_has_what_the_rows_say(report_rows) -> None:
    said = dict(verdict(report_rows))
    assert list(said) == ["An adapter wins", "It is level", "It does not win"]
    assert "by the clock against full context, after 5 questions per document" in said["An adapter wins"]
    assert "against prefix cache, after 50 questions" in said["An adapter wins"]
    assert "in quality with full context on 11 of 11 sets" in said["It is level"]
    assert "on questions that its document does not answer" in said["It is level"] + said["It does not win"]


def test_a_loss_is_named_with_its_worst_set(report_rows) -> None:
    rows = [dict(row) for row in report_rows]
    for row in rows:
        if row["kind"] == "summary" and row["method"] == "doc_to_lora" and row["set"] == "8 chunks":
            row["against"] = row["against"] | {"full_context": {"difference": -0.25, "interval": [-0.5, -0.1]}}
    said = dict(verdict(rows))
    assert (
        "against full context on 1 of 11 sets (worst: needles, 8 chunks, 0.50 against 0.75)" in said["It does not win"]
    )
    assert "in quality with full context on 10 of 11 sets" in said["It is level"]


def test_an_alternative_that_is_never_beaten_is_a_loss(report_rows) -> None:
    even = {"prefix_cache": {"seconds": None}, "full_context": {"seconds": 3.0}}
    said = dict(verdict(changed(report_rows, "doc_to_lora", break_even=even)))
    assert "by the clock against prefix cache, at any number of questions" in said["It does not win"]
    assert "by the clock against prefix cache" not in said["An adapter wins"]


def test_a_length_at_which_it_never_pays_is_named(report_rows) -> None:
    rows = [dict(row) for row in report_rows]
    for row in rows:
        if row["kind"] == "summary" and row["method"] == "doc_to_lora" and row["task"] == "encyclopedia":
            row["break_even"] = {"full_context": {"seconds": None if row["set"] == "one entity" else 4.0}}
    said = dict(verdict(rows))
    assert "at 1 of 2 lengths, from 130 tokens, after 4 questions" in said["An adapter wins"]
    assert "by the clock against full context below 130 tokens" in said["It does not win"]


def test_bytes_are_compared_with_each_alternative(report_rows) -> None:
    said = dict(verdict(changed(report_rows, "prefix_cache", stored_bytes=4096)))
    assert "in bytes kept (0.977 KiB of 130 tokens) against prefix cache (4 KiB)" in said["An adapter wins"]
    assert "in bytes kept" in said["It does not win"] and "retrieval (0.977 KiB)" in said["It does not win"]


def test_sets_without_an_answer_in_the_document_do_not_count(report_rows) -> None:
    own = answerable(report_rows)
    assert not {row["task"] for row in own} & {"locality", "encyclopedia_empty_document"}
    assert sum(map(len, compared(own, "full_context"))) == len(own)


def test_what_was_not_measured_is_not_said(report_rows) -> None:
    rows = [row for row in report_rows if row.get("task") == "composition"]
    said = " ".join(text for _, text in verdict(rows))
    assert "in quality" in said and "by the clock" not in said and "bytes kept" not in said
    assert verdict([]) == [] and details([]) == []


def test_every_set_stands_in_the_table_with_its_differences(report_rows) -> None:
    head, lines = set_by_set(report_rows)
    assert len(lines) == len(answerable(report_rows)) and all(len(line) == len(head) for line in lines)
    assert lines[0][:2] == ["encyclopedia, one entity", "0.50"] and lines[0][2].startswith("-0.25 (")
