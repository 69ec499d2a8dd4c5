"""Rows of a report: what they are called on the page, and the files that hold them.

rows = merged([("bench", read_report_rows("benchmarks/results/bench.jsonl"))])

The first row, of kind `sweep`, says what made the others; `benchmarks.report.aggregate` makes all of them from cells.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]
Rows = Sequence[Row]

FLOOR, CEILING = "no_context", "full_context"
ADAPTER = "doc_to_lora"
GATED, ROUTED = "doc_to_lora_gated", "doc_to_lora_routed"
WRONG = "wrong_document"
CONTROLS = (FLOOR, CEILING, WRONG)
ALTERNATIVES = ("full_context", "prefix_cache", "retrieval")  # what an adapter's break-even is counted against
GRADIENT = ("text_lora", "distillation_oracle", "distillation_generated", "warm_start_oracle", "warm_start_generated")
TEXTS = yaml.safe_load((Path(__file__).parent / "texts.yaml").read_text(encoding="utf-8"))
METHODS, TASKS = TEXTS["methods"], TEXTS["tasks"]
NUMBERED = {"_rank": "rank", "_seed": "training seed"}  # how a method's name ends → what it is on the page
# Tasks whose documents say nothing that is asked for, and whose documents contradict what was learned: the sweep's own
# first, for it has more cases than the tiny one.
INTERFERENCE = ("interference", "locality")
CONFLICT = ("conflict_by_times_asked", "conflict")
CONTROL_TASKS = tuple(task for task, name in TASKS.items() if name.startswith("control"))


def name_of(method: str) -> str:
    """On the page; `doc_to_lora_rank16` is one checkpoint of several, `doc_to_lora_seed1` one training of several."""
    base, what, number = _numbered(method)
    if what:
        return f"{METHODS[base]['name']}, {what} {number}"
    return METHODS[base]["name"] if base in METHODS else base.replace("_", " ")


def task_name(task: str) -> str:
    return TASKS.get(task, task.replace("_", " "))


def task_order(task: str) -> tuple[float, str]:
    """Key that sorts tasks as the page does: unknown ones stand before the controls."""
    place = list(TASKS).index(task) if task in TASKS else len(TASKS) - len(CONTROL_TASKS) - 0.5
    return place, task


def order(method: str) -> tuple[int, str]:
    """Key that sorts methods as the tables do; ranks by their size."""
    base, what, number = _numbered(method)
    place = list(METHODS).index(base) if base in METHODS else len(METHODS)
    return place, f"{base}{what}{number:9d}"


def _numbered(method: str) -> tuple[str, str, int]:
    """(a known method, "rank" or "seed", its number); the name itself, nothing and 0 if it is no such name."""
    for suffix, what in NUMBERED.items():
        base, _, number = method.rpartition(suffix)
        if base in METHODS and number.isdigit():
            return base, what, int(number)
    return method, "", 0


def short(value: float, *, digits: int = 3) -> str:
    """So many significant digits, or the whole number where that is longer, with commas between thousands."""
    if value == 0:
        return "0"
    whole = abs(value) >= 10 ** (digits - 1) - 0.5 * 10 ** (1 - digits)
    return f"{value:,.0f}" if whole else f"{value:.{digits}g}"


# Files


def write_report_rows(path: str | Path, rows: Rows) -> None:
    """The sweep's row in full, then the others with what they need to explain themselves."""
    from benchmarks.rows import write_rows

    write_rows(path, rows, run={key: rows[0][key] for key in ("commits", "hardware", "dates")})


def read_report_rows(path: str | Path) -> list[Row]:
    """Rows that `write_report_rows` wrote.

    Raises:
        ValueError: there is no such file, or no report wrote it.
    """
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"Cannot read rows from {path} ({error}); give a file that a report has written.") from error
    if not rows or rows[0].get("kind") != "sweep":
        raise ValueError(f"{path} does not begin with a row of kind sweep; give a file that a report has written.")
    return rows


def merged(files: Sequence[tuple[str, Rows]]) -> list[Row]:
    """Rows of several reports as of one. A task that an earlier file has already goes by its own file's name.

    Args:
        files: (name, rows) of each.
    """
    result: list[Row] = []
    sweep: Row = {}
    seen: set[str] = set()
    for name, (own, *rows) in files:
        clash = {row["task"] for row in rows if "task" in row and row["task"] in seen}
        renamed = [{**row, "task": name} if row.get("task") in clash else row for row in rows]
        by_task = {name if task in clash else task: found for task, found in own["commands_by_task"].items()}
        own = {**own, "commands_by_task": by_task}
        sweep = _joined(sweep, own) if sweep else own
        seen |= {row["task"] for row in renamed if "task" in row}
        result += renamed
    return [sweep, *result]


def _joined(one: Row, other: Row) -> Row:
    joined = {**other, **one}
    for key in ("commands", "commits", "hardware", "checkpoints", "failed", "choices"):
        joined[key] = [*one[key], *(item for item in other[key] if item not in one[key])]
    dates = [*one["dates"], *other["dates"]]
    joined |= {key: one[key] + other[key] for key in ("cells", "wall_s")} | {"dates": [min(dates), max(dates)]}
    return joined | {"commands_by_task": one["commands_by_task"] | other["commands_by_task"]}


def rounded(value: Any) -> Any:
    """The same with every float of six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value
