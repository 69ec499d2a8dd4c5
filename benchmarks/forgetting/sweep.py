"""A sweep's cells, a method at a seed: each is a file of its own, and one that is there is not measured again.

run_cells(cells, measure_cell, folder="outputs/benchmarks/forgetting", workers=2)   # rows, in the cells' order
parts_of("moves"), part("moves", "lora_8")                                  # the methods of conf/consolidation/

Not `benchmarks.run`: its cells are a task's documents and questions answered by a method; here a cell is a training,
with a learning rate and what was known before. The files and what becomes of a cell that fails are the same.
"""

import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.measuring.cells import cell_path, error_path, identity_of, write_cell, write_error
from benchmarks.measuring.rows import Row, rounded

CONF = Path(__file__).parents[2] / "conf/consolidation"


class Cell(NamedTuple):
    """task: of which benchmark. method, seed: of the cell. settings: all else that its rows depend on, plain values."""

    task: str
    method: str
    seed: int
    settings: Mapping[str, Any]

    def path(self, folder: str | Path) -> Path:
        settings = {"method": self.method, "seed": self.seed, **self.settings}
        identity = identity_of(settings, self.settings["checkpoint"])
        return cell_path(folder, task=self.task, method=self.method, seed=self.seed, identity=identity)


def parts_of(group: str) -> list[str]:
    """Names of the YAML files of conf/consolidation/<group>."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def part(group: str, name: str) -> dict[str, Any]:
    """The settings of one of them.

    Raises:
        ValueError: there is no such file.
    """
    if name not in (there := parts_of(group)):
        raise ValueError(f"There is no {group} {name!r}: choose of {', '.join(there)}, or add {name}.yaml there.")
    return dict(yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8")))


def run_cells(
    cells: Sequence[Cell], measure: Callable[[Cell], list[Row]], *, folder: str | Path, workers: int
) -> Iterator[Row]:
    """Rows of all cells, those measured before among them. A cell that fails leaves a note and does not end the others.

    Args:
        measure: a function of a module, which other processes find by name.
        folder: of the cells' files.
        workers: processes; 1 measures here.

    Raises:
        ValueError: some failed, after all others are done.
    """
    failed = []
    with ExitStack() as undo:
        pool: Executor | None = None
        if workers > 1:
            pool = undo.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
        done: list[Future[None] | None] = []
        for cell in cells:
            one = partial(_measure, cell, measure, cell.path(folder))
            if cell.path(folder).is_file():
                done.append(None)
            elif pool is not None:
                done.append(pool.submit(one))
            else:
                one()
                done.append(None)
            if pool is None:
                yield from _rows(cell.path(folder))
        if pool is not None:
            for cell, future in zip(cells, done, strict=True):
                if future is not None:
                    future.result()
                yield from _rows(cell.path(folder))
        failed = [cell for cell in cells if not cell.path(folder).is_file()]
    if failed:
        first = json.loads(error_path(failed[0].path(folder)).read_text(encoding="utf-8"))["error"]
        names = ", ".join(f"{cell.method}/{cell.seed}" for cell in failed)
        raise ValueError(f"{len(failed)} cells failed: {names}; the first: {first} The same command tries them again.")


def _measure(cell: Cell, measure: Callable[[Cell], list[Row]], path: Path) -> None:
    names = {"task": cell.task, "method": cell.method, "seed": cell.seed}
    try:
        rows = measure(cell)
    except Exception as error:  # whatever it was, the other cells go on; the note says it and the cell is tried again
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        write_error(path, {**names, "error": reason, "traceback": traceback.format_exc()})
    else:
        write_cell(path, [rounded({**names, **row}) for row in rows])


def _rows(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
