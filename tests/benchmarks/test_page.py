"""benchmarks/page.py: a page that needs nothing but itself, for every reader."""

import re
from html.parser import HTMLParser

import pytest

from benchmarks.page import page

VOID = {"meta", "path", "rect", "polyline", "br"}


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

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append(tag)


@pytest.fixture
def text(report_rows) -> str:
    return page(report_rows)


def test_nothing_is_fetched_and_nothing_runs(text) -> None:
    assert not re.search(r'(?:src|href)="(?!#)', text)
    assert "<script" not in text and "@import" not in text and "http" not in re.sub(r'xmlns="[^"]*"', "", text)


def test_it_follows_the_reader_s_light_or_dark_and_width(text) -> None:
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert all(f"--{name}:" in text for name in re.findall(r"var\(--(\w+)\)", text))


def test_tags_are_closed_and_links_lead_somewhere(text) -> None:
    parser = Balance()
    parser.feed(text)
    assert not parser.wrong and not parser.open
    assert len(parser.ids) == len(set(parser.ids))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(parser.ids)


def test_every_table_scrolls_by_itself_and_has_a_caption(text) -> None:
    assert text.count("<table>") == text.count("<caption>") == text.count('class="scroll" tabindex="0" role="region"')


def test_every_picture_has_a_name_and_every_figure_its_command(text) -> None:
    assert all('role="img" aria-label="' in tag or "aria-hidden" in tag for tag in re.findall(r"<svg [^>]*>", text))
    sections = re.findall(r"<section id=.*?</section>", text, re.DOTALL)
    drawn = [section for section in sections if "panels" in section]
    assert len(drawn) == 12
    assert all("python -m benchmarks.run" in s and "<table>" in s for s in drawn)


def test_the_answer_is_the_first_thing_after_the_heading(text) -> None:
    start = text.index("</h1>")
    assert text[start:].startswith('</h1><div class="answer"><p><strong>An adapter wins</strong>')
    assert "It does not win" in text


def test_failed_cells_are_listed_and_text_is_escaped(text) -> None:
    assert "squad, no_context, seed 0: ValueError: &lt;no file&gt;" in text


def test_rows_without_what_made_them_are_refused(report_rows) -> None:
    with pytest.raises(ValueError, match="kind sweep"):
        page(report_rows[1:])
