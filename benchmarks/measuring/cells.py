"""A sweep's cells on disk: one file per task, method and seed, there completely or not at all.

path = cell_path(folder, task="encyclopedia", method="doc_to_lora", seed=0, identity=identity)
write_cell(path, rows)
rows = read_cells(folder)
"""

import hashlib
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from hypernet.io.files import replaced
from hypernet.io.paths import output_folder

# Raised when prompts, cases or scores change, so that cells measured before are not taken for the new ones.
VERSION = 1
SWEEP_FILE = "sweep.json"


def identity_of(config: dict[str, Any], checkpoint: str) -> str:
    """Hash of all that a cell's answers depend on: its settings and the checkpoint's own description."""
    description = Path(checkpoint) / "config.yaml"
    content = description.read_text(encoding="utf-8", errors="replace") if description.is_file() else checkpoint
    text = json.dumps({"version": VERSION, "config": config, "checkpoint": content}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def cell_path(folder: str | Path, *, task: str, method: str, seed: int, identity: str) -> Path:
    return Path(folder) / "cells" / f"{task}-{method}-{seed}-{identity}.jsonl"


def error_path(path: Path) -> Path:
    """Where a cell that failed says why; `path` is not there then, so it is tried again."""
    return path.with_suffix(".error.json")


def write_cell(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    error_path(path).unlink(missing_ok=True)


def write_error(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(error_path(path)) as temporary:
        temporary.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")


def read_cells(folder: str | Path) -> list[dict[str, Any]]:
    """Rows of all finished cells, cell after cell.

    Raises:
        ValueError: there is none.
    """
    files = sorted((Path(folder) / "cells").glob("*.jsonl"))
    if not files:
        raise ValueError(f"No finished cells in {folder}/cells; run python -m benchmarks.run first.")
    return [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]


def read_errors(folder: str | Path) -> list[dict[str, Any]]:
    """One row for each cell that failed and has not succeeded since."""
    files = sorted((Path(folder) / "cells").glob("*.error.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


class Sweep(NamedTuple):
    """How far a sweep is: cells it has altogether, when it began. On disk, as its cells may run in other processes."""

    num_cells: int
    started: float

    @classmethod
    def of(cls, folder: str | Path) -> "Sweep | None":
        path = Path(folder) / SWEEP_FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def progress(self, number: int, now: float) -> str:
        """Cell number, of how many, and how long the rest takes at the pace so far."""
        done = number + 1
        left = (now - self.started) / done * (self.num_cells - done)
        return f"cell {done} of {self.num_cells}, {_duration(now - self.started)} so far, {_duration(left)} to go"


class SweepProgress(Callback):
    """Hydra callback: writes down how many cells a multirun has, and says at its end which ones failed."""

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        # Not resolved: a value such as ${hydra:runtime.choices.method} has a meaning in a cell alone.
        params = OmegaConf.to_container(config.hydra.sweeper, resolve=False).get("params") or {}
        given = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        overrides = [*(f"{key}={value}" for key, value in params.items()), *given]
        # A later value of a key counts: the command line comes after the configuration.
        parsed = {o.key_or_group: o for o in OverridesParser.create().parse_overrides(overrides)}
        sweeps = [o for o in parsed.values() if o.is_sweep_override()]
        num_cells = math.prod(len(list(o.sweep_string_iterator())) for o in sweeps)
        try:
            folder = Path(output_folder(config.output_dir))
        except ValueError as error:  # Hydra makes a warning of it, and goes on
            raise SystemExit(f"benchmarks.run: {error}") from error
        folder.mkdir(parents=True, exist_ok=True)
        with replaced(folder / SWEEP_FILE) as temporary:
            temporary.write_text(json.dumps(Sweep(num_cells, time.time())._asdict()), encoding="utf-8")

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        (Path(config.output_dir) / SWEEP_FILE).unlink(missing_ok=True)
        if errors := read_errors(config.output_dir):
            cells = ", ".join(f"{e['task']}/{e['method']}/{e['seed']}" for e in errors)
            raise SystemExit(f"benchmarks.run: {len(errors)} cells failed: {cells}. The same command tries them again.")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
