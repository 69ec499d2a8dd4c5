"""JSONL rows that explain themselves: what was measured, by which code, on what machine, with which settings.

append_rows("benchmarks/results/tiny_figures.jsonl", rows, run=describe_run(config))
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]], *, run: dict[str, Any]) -> None:
    """Replaces the file by these rows, each with the run's description; complete or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({**row, "run": run}, ensure_ascii=False) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
