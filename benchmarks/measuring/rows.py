"""JSONL rows that explain themselves: what was measured, by which code, on what machine, with which settings.

write_rows("benchmarks/results/tiny_figures.jsonl", rows, run=describe_run(config))
rows = merged([("bench", read_report_rows("benchmarks/results/bench.jsonl"))])    # of reports
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Rows = Sequence[Row]
# Sweeps and methods that rows of before call otherwise; the rows stay as they were measured.
_CALLED_NOW = {"sweep=crowd": "sweep=many_documents", '"wrong_adapter"': '"wrong_document"'}
PACKAGES = ("torch", "transformers", "peft", "lightning", "triton")


def describe_run(config: dict[str, Any]) -> dict[str, Any]:
    """Commit, hardware, versions, date and settings of this run."""
    import torch

    return {
        "commit": _commit(),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config,
    }


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]], *, run: dict[str, Any], in_each: bool = True) -> None:
    """Replaces the file by these rows; complete or not at all.

    Args:
        run: the run's description, in each row, or in the first alone: of thousands it is most of the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for number, row in enumerate(rows):
                described = {**row, "run": run} if in_each or not number else row
                file.write(json.dumps(described, ensure_ascii=False) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def show_and_write(
    rows: Iterable[Row], output: str | None, *, config: dict[str, Any], quiet: Sequence[str] = ()
) -> None:
    """Prints each row as soon as it is measured, rounded; then writes all of them, unless output is None.

    Args:
        quiet: keys that are written alone.
    """
    measured = []
    for row in rows:
        measured.append(rounded(row))
        print("  ".join(f"{name}={value}" for name, value in measured[-1].items() if name not in quiet), flush=True)
    if output:
        write_rows(output, measured, run=describe_run(config))


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a file, with the present names of sweeps and methods."""
    text = Path(path).read_text(encoding="utf-8-sig")
    for old, new in _CALLED_NOW.items():
        text = text.replace(old, new)
    return [json.loads(line) for line in text.splitlines()]


def read_measured(path: str | None) -> tuple[list[Row], Path]:
    """Rows that `write_rows` wrote, and the plot's path next to them.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    try:
        file = Path(path or "")
        return read_rows(file), file.with_suffix(".svg")
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot read rows from output={path} ({error}). Name the file that has them.") from error


def write_report_rows(path: str | Path, rows: Rows) -> None:
    """The sweep's row in full, then the others with what they need to explain themselves."""
    write_rows(path, rows, run={key: rows[0][key] for key in ("commits", "hardware", "dates")})


def read_report_rows(path: str | Path) -> list[Row]:
    """Rows that `write_report_rows` wrote.

    Raises:
        ValueError: there is no such file, or no report wrote it.
    """
    try:
        rows = read_rows(path)
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


def _commit() -> str:
    """Commit of the working tree, with + if files differ from it; unknown outside git."""
    root = Path(__file__).parent
    try:
        commit, changed = (
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} CPU cores, {names[0] if names else platform.machine()}"
