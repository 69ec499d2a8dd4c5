"""benchmarks/report/page.py: a page that needs nothing but itself, for every reader, and says what its rows say."""

import re
from html.parser import HTMLParser

import pytest

from benchmarks.report.page import page, unconfirmed

VOID = {"meta", "br"}


class Balance(HTMLParser):
    """Collects tags that are not closed in their order, and all ids."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append(tag)


def marked(text: str, place: str = "composition|1 document|doc_to_lora|exact_match") -> str:
    return f'<p>It answers <data value="{place}">{text}</data>.</p>'


@pytest.fixture(scope="module")
def text(report_rows) -> str:
    return page(report_rows)


@pytest.fixture(scope="module")
def few(report_rows) -> list[dict]:
    """Rows of one task, whose page is drawn in a second."""
    return [row for row in report_rows if row.get("task") in (None, "composition") and row["kind"] != "surface"]


def test_page_fetches_and_runs_nothing(text) -> None:
    assert not re.search(r'(?:src|href)="(?!#)', text)
    assert "<script" not in text and "@import" not in text and "http" not in re.sub(r'xmlns="[^"]*"', "", text)


def test_page_follows_colour_scheme_and_width(text) -> None:
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert all(f"--{name}:" in text for name in re.findall(r"var\(--(\w+)\)", text))


def test_page_closes_tags_and_resolves_links(text) -> None:
    parser = Balance()
    parser.feed(text)
    assert not parser.wrong and not parser.open
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(parser.ids)


def test_every_id_is_there_once(text) -> None:
    parser = Balance()
    parser.feed(text)
    assert len(parser.ids) == len(set(parser.ids))


def test_page_tables_scroll_and_have_captions(text) -> None:
    assert text.count("<table>") == text.count("<caption>") == text.count('class="scroll" tabindex="0" role="region"')


def test_no_table_is_wider_than_seven_columns(text) -> None:
    heads = re.findall(r"<thead>.*?</thead>", text, re.DOTALL)
    assert heads and max(head.count("<th ") for head in heads) <= 7


def test_every_figure_has_its_pictures_table_and_command(text) -> None:
    assert all('role="img" aria-label="' in tag or "aria-hidden" in tag for tag in re.findall(r"<svg [^>]*>", text))
    sections = [s for s in re.findall(r"<section id=.*?</section>", text, re.DOTALL) if "panels" in s]
    assert len(sections) == 12
    assert all("python -m benchmarks.run" in s and "<table>" in s and "<svg" in s for s in sections)


def test_the_summary_is_the_first_thing_after_the_heading(few) -> None:
    made = page(few, summary=marked("0.50"))
    start = made.index("</h1>")
    assert re.match(r'</h1>\s*<div class="answer"><p>It answers <data', made[start:])


def test_a_summary_that_the_rows_do_not_confirm_is_refused(report_rows) -> None:
    with pytest.raises(ValueError, match="doc_to_lora.exact_match is 0.50, not 0.51. Write it anew, or set summary"):
        page(report_rows, summary=marked("0.51"))


@pytest.mark.parametrize(
    ("summary", "wrong"),
    [
        (marked("0.5"), []),
        (marked("5.0", "encyclopedia|one entity|doc_to_lora|break_even.full_context.seconds"), []),
        (marked("1,000", "encyclopedia|one entity|doc_to_lora|stored_bytes"), []),
        (marked("never"), ["composition|1 document|doc_to_lora|exact_match is 0, not never"]),
        (marked("0.50", "no|such|row|exact_match"), ["no|such|row|exact_match is never, not 0.50"]),
        ("<p>It answers 0.5.</p>", ["0.5. is not marked"]),
        ("<p>Nothing to check.</p>", []),
    ],
)
def test_each_figure_of_a_summary_is_compared_with_its_row(report_rows, summary, wrong) -> None:
    assert list(unconfirmed(summary, report_rows)) == wrong


def test_page_lists_failed_cells_and_escapes_text(text) -> None:
    assert "squad, no_context, seed 0: ValueError: &lt;no file&gt;" in text


def test_what_is_not_measured_is_named_with_its_command(few) -> None:
    made = page(few)
    assert "Not measured yet" in made and "python -m benchmarks.run sweep=niah" in made


def test_page_refuses_rows_without_a_sweep_row(report_rows) -> None:
    with pytest.raises(ValueError, match="kind sweep"):
        page(report_rows[1:])
