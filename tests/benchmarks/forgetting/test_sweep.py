"""A sweep's cells: named by all that they depend on, measured once, tried again after an error."""

import pytest

from benchmarks.forgetting.sweep import Cell, part, parts_of, run_cells
from benchmarks.measuring.cells import error_path

CALLS: list[str] = []
SETTINGS = {"checkpoint": "assets/tiny", "lr": 0.1}


def measured(cell):
    CALLS.append(cell.method)
    if cell.method == "bad":
        raise ValueError("It diverged. Give a lower lr.")
    return [{"kind": "learned", "value": cell.seed / 3}]


@pytest.fixture
def cells():
    CALLS.clear()
    return [Cell("frontier", name, seed, SETTINGS) for seed in (0, 1) for name in ("a", "b")]


def test_finished_cells_are_not_measured_again(cells, tmp_path):
    rows = list(run_cells(cells, measured, folder=tmp_path, workers=1))
    assert [(row["method"], row["seed"], row["value"]) for row in rows][2:] == [("a", 1, 0.333333), ("b", 1, 0.333333)]
    cells[1].path(tmp_path).unlink()
    assert list(run_cells(cells, measured, folder=tmp_path, workers=1)) == rows
    assert CALLS == ["a", "b", "a", "b", "b"]


def test_two_processes_give_the_rows_of_one(cells, tmp_path):
    rows = list(run_cells(cells, measured, folder=tmp_path / "one", workers=1))
    assert list(run_cells(cells, measured, folder=tmp_path / "two", workers=2)) == rows


def test_failed_cell_does_not_end_the_others_and_is_tried_again(cells, tmp_path):
    bad = [Cell("frontier", "bad", 0, SETTINGS), *cells]
    for _ in range(2):
        found = []
        with pytest.raises(ValueError, match="1 cells failed: bad/0; the first: ValueError: It diverged"):
            for row in run_cells(bad, measured, folder=tmp_path, workers=1):
                found.append(row["method"])
        assert found == ["a", "b", "a", "b"] and error_path(bad[0].path(tmp_path)).is_file()
    assert CALLS.count("bad") == 2 and CALLS.count("a") == 2


def test_every_setting_names_another_cell(tmp_path):
    cell = Cell("frontier", "a", 0, SETTINGS)
    others = [cell._replace(settings={**SETTINGS, "lr": 0.2}), cell._replace(seed=1), cell._replace(task="tasks")]
    assert len({one.path(tmp_path) for one in (cell, *others)}) == 4


def test_parts_are_the_files_and_unknown_ones_are_named():
    assert {"everything", "lora_8", "rows_random", "rows_tfidf"} <= set(parts_of("moves"))
    assert part("moves", "lora_8")["rank"] == 8
    with pytest.raises(ValueError, match="There is no rehearsal 'nothing': choose of none, .* or add nothing.yaml"):
        part("rehearsal", "nothing")
