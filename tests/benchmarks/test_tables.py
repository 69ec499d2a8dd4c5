"""The documentation states what the committed rows say."""

import re
from functools import cache

import pytest

from benchmarks import internalize_cost, kernel_speed, tables
from benchmarks.report.page import unconfirmed
from benchmarks.tables import FILES, ROOT, TABLES, all_rows, with_tables

BLOCK = "<!-- table: {} -->\n{}\n<!-- end -->"
made_plots = cache(tables.made_plots)


@pytest.fixture(autouse=True, scope="module")
def each_table_is_made_once():
    """Several tests look at the same ones, half a minute's worth."""
    with pytest.MonkeyPatch.context() as patch:
        for name, make in TABLES.items():
            patch.setitem(TABLES, name, cache(make))
        yield


@pytest.mark.parametrize("name", FILES)
def test_every_table_matches_its_committed_rows(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- table:" in text, f"{name} has no table; put <!-- table: NAME --> and <!-- end --> into it"
    assert with_tables(text) == text, f"{name} differs from benchmarks/results; run python -m benchmarks.tables"


def test_pages_show_every_table_and_plot_once() -> None:
    beginnings = {
        "results": "",
        "memory": "memory",
        "consolidation": "memory",
        "forgetting": "forgetting",
        "learning_from_use": "use",
        "learning_from_use_private": "use",
        "learning_from_use_persona": "use",
        "serving": "serving",
        "scale": "serving",
    }
    pages = [(ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in beginnings]
    shown = [re.findall(r"<!-- table: (\w+) -->", page) for page in pages]
    assert sorted(sum(shown, [])) == sorted(TABLES)
    for names, beginning in zip(shown, beginnings.values(), strict=True):
        assert all(name.startswith(beginning) for name in names)
    text = "".join(pages)
    assert all(
        f"({name if name.startswith('../') else name.removeprefix('docs/')})" in text or f"(../{name})" in text
        for name in made_plots()
    )


@pytest.mark.parametrize("name", [name for name in TABLES if name != "summary"])
def test_tables_have_at_most_seven_columns_and_a_number_a_cell(name: str) -> None:
    lines = [line for line in TABLES[name]().splitlines() if line.startswith("|")]
    assert lines and max(line.count("|") - 1 for line in lines) <= 7
    if name == "serving_projection":  # its cells are sentences that say how a figure comes about
        return
    for line in lines:
        for cell in line.strip("| ").split(" | ")[1:]:
            assert not re.fullmatch(r"[\d.,]+ .*[\d.,]+.*", cell) or cell.startswith("2-4"), cell


def test_readme_s_table_has_six_rows_with_all_controls() -> None:
    head, _, *lines = TABLES["readme"]().splitlines()
    assert len(lines) == 6 and "–" not in "".join(lines)
    assert all(name in head for name in ("no context", "wrong document", "document in the prompt"))


def test_changed_figure_is_detected() -> None:
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    changed = text.replace("| one entity | adapter |", "| one entity | adapter, surely |")
    assert changed != text
    assert with_tables(changed) == text


def test_a_table_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="<!-- table: nonsense --> names no table; there are readme, summary"):
        with_tables(BLOCK.format("nonsense", ""))


def test_text_outside_of_the_marks_stays() -> None:
    made = with_tables(f"before\n{BLOCK.format('real_text', 'old')}\nafter")
    assert made.startswith("before\n<!-- table: real_text -->\n\n| method |") and made.endswith("<!-- end -->\nafter")
    assert with_tables(made) == made


def test_every_plot_matches_its_committed_rows() -> None:
    for name, svg in made_plots().items():
        path = ROOT / name
        assert path.is_file(), f"{name} is not there; run python -m benchmarks.tables"
        assert path.read_text(encoding="utf-8") == svg, f"{name} differs from its rows; run python -m benchmarks.tables"


@pytest.mark.parametrize(
    ("name", "plot"), [("internalize_cost", internalize_cost.plot), ("kernel_speed", kernel_speed.roofline)]
)
def test_plots_of_speed_are_what_their_committed_rows_give(name, plot, tmp_path) -> None:
    plot(tables.read(name), tmp_path / "plot.svg")
    committed = ROOT / tables.RESULTS / f"{name}.svg"
    assert (tmp_path / "plot.svg").read_bytes() == committed.read_bytes(), f"run benchmarks.{name} plot_only=true"


def test_the_main_plot_shows_the_adapter_with_its_controls() -> None:
    svg = made_plots()["docs/results.svg"]
    legend = ("no context", "wrong document", "document in the prompt", "own adapter")
    assert all(f"{name}</text>" in svg for name in (*legend, *tables.MAIN))
    assert "an article about one entity, own adapter: 0.96 (0.95 to 0.97)" in svg


def test_each_figure_of_the_written_summary_is_what_the_rows_say() -> None:
    text = (ROOT / tables.SUMMARY).read_text(encoding="utf-8")
    assert text.count("<data ") > 10
    assert list(unconfirmed(text, all_rows())) == []


def test_the_summary_in_markdown_has_no_tags() -> None:
    assert TABLES["summary"]().startswith("**Where it is as good.**") and "<" not in TABLES["summary"]()
