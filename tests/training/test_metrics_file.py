"""MetricsFile: one CSV with one history, over kills, resumed runs and new columns."""

import csv

import pytest

from hypernet.training.metrics_file import MetricsFile


@pytest.fixture
def metrics(tmp_path):
    return MetricsFile(str(tmp_path))


def rows(metrics) -> list[dict[str, str]]:
    with metrics.path.open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_logged_rows_are_there_at_once_whatever_their_columns(metrics, tmp_path):
    metrics.log_metrics({"train/loss": 0.5}, step=0)
    metrics.log_metrics({"val/loss": 2.0, "epoch": 0}, step=0)
    metrics.log_metrics({"train/loss": 0.25}, step=1)
    assert metrics.path == tmp_path / "logs/metrics.csv"
    expected = [{"train/loss": "0.5", "step": "0"}, {"val/loss": "2.0", "epoch": "0", "step": "0"}]
    assert rows(metrics) == [*expected, {"train/loss": "0.25", "step": "1"}]
    assert [path.name for path in metrics.path.parent.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("step", [0, 1, 3, 9])
def test_begun_run_keeps_the_rows_before_its_first_step(metrics, tmp_path, step):
    for number in range(4):
        metrics.log_metrics({"train/loss": number / 2}, step=number)
    with metrics.path.open("a") as file:
        file.write("7.5,")  # a kill cuts a row
    again = MetricsFile(str(tmp_path))
    again.begin(step)
    again.log_metrics({"train/loss": 9.0, "new": 1}, step=step)
    kept = [{"train/loss": str(number / 2), "step": str(number)} for number in range(min(step, 4))]
    assert rows(again) == [*kept, {"train/loss": "9.0", "new": "1", "step": str(step)}]


def test_run_that_ends_before_a_row_leaves_no_file(metrics):
    metrics.begin(0)
    assert not metrics.path.parent.exists()


def test_name_that_leaves_the_run_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="stays in its folder, but '../x' does not"):
        MetricsFile(str(tmp_path), name="../x")
