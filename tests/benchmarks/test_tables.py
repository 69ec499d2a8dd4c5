"""README and the model card state what the committed rows say."""

import pytest

from benchmarks import tables
from benchmarks.report import write_report_rows
from benchmarks.tables import FILES, ROOT, made_plots, with_tables


@pytest.mark.parametrize("name", FILES)
def test_every_table_is_what_its_committed_rows_give(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- figures:" in text
    assert with_tables(text) == text, f"{name} differs from benchmarks/results; run python -m benchmarks.tables"


def test_a_changed_figure_is_noticed() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    changed = text.replace("| one entity | adapter |", "| one entity | adapter, surely |")
    assert changed != text
    assert with_tables(changed) == text


def test_every_plot_is_what_its_committed_rows_give() -> None:
    for name, svg in made_plots().items():
        path = ROOT / name
        assert path.is_file(), f"{name} is not there; run python -m benchmarks.tables"
        assert path.read_text(encoding="utf-8") == svg, f"{name} differs from its rows; run python -m benchmarks.tables"


def test_a_block_may_name_one_table_of_a_file_that_gives_several(report_rows, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    write_report_rows(tmp_path / "benchmarks/results/bench.jsonl", report_rows)
    block = "<!-- figures: benchmarks/results/bench.jsonl{} -->\n\n<!-- /figures -->"
    assert "share of the gap closed | prepare, ms" in with_tables(block.format(""))
    assert "| documents in one adapter | no context |" in with_tables(block.format(" composition"))
    with pytest.raises(ValueError, match="asks for table 'nonsense'; there are tiny_figures"):
        with_tables(block.format(" nonsense"))


def test_plots_come_from_a_file_of_their_own_or_from_the_sweep_s(report_rows, tmp_path) -> None:
    assert made_plots(tmp_path) == {}
    write_report_rows(tmp_path / "benchmarks/results/bench.jsonl", report_rows)
    made = made_plots(tmp_path)
    assert set(made) == {
        f"benchmarks/results/{name}.svg" for name in ("niah", "composition", "interference", "capacity", "conflict")
    }
    assert made == made_plots(tmp_path) and all(svg.startswith("<svg xmlns=") for svg in made.values())
    without = [row for row in report_rows if row.get("task") != "needles"]
    write_report_rows(tmp_path / "benchmarks/results/bench.jsonl", without)
    assert "benchmarks/results/niah.svg" not in made_plots(tmp_path)
    write_report_rows(tmp_path / "benchmarks/results/niah.jsonl", report_rows)
    assert made_plots(tmp_path)["benchmarks/results/niah.svg"] == made["benchmarks/results/niah.svg"]
