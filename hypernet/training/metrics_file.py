"""MetricsFile: what a run logs, in one CSV that holds one history whatever was killed, resumed or replaced.

    Trainer(logger=MetricsFile("outputs/tiny"))      # conf/logger/csv.yaml: outputs/tiny/logs/metrics.csv

Lightning's CSVLogger begins another folder at each start, so the steps after a checkpoint stand in two of them.
"""

import csv
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from hypernet.io.files import replaced
from hypernet.io.paths import name_below


class MetricsFile(Logger):
    """One row for each time that something is logged, written at once; `step` counts optimizer steps from 0.

    Args:
        save_dir: the run's folder.
        name: of the folder in it that holds metrics.csv.

    Raises:
        ValueError: `name` leads out of `save_dir`.
    """

    def __init__(self, save_dir: str, name: str = "logs") -> None:
        super().__init__()
        self._name = name_below(name)
        self.path = Path(save_dir) / name / "metrics.csv"
        self._columns: set[str] = set()  # of the file, once this run has written it

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> str:
        return ""  # there is one history

    @rank_zero_only
    def begin(self, step: int) -> None:
        """Keeps the rows of the steps before this one, if there are any; the run goes on from it."""
        if self.path.exists():
            self._write([row for row in _rows(self.path) if int(row["step"]) < step])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {**metrics, "step": step or 0}
        if not row.keys() <= self._columns:
            self._write([*_rows(self.path), row])
            return
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, sorted(self._columns)).writerow(row)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """They are in the run's .hydra/config.yaml."""

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """Another file takes its place: with other columns, or fewer rows."""
        self._columns = {"step"}.union(*rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(self.path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, sorted(self._columns))
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, without the last one where a kill has cut it off."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    return [{name: value for name, value in row.items() if value} for row in rows if (row["step"] or "").isdigit()]
