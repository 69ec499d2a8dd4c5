"""Rows of the benchmark's cells → rows of its tables and plots: every method and its controls on the same questions.

    rows = summarize(read_cells("outputs/benchmark"), cost_model=lambda checkpoint: None)

A row's `kind` says what it is: `summary`, one per task, set and method; `slice`, one per task, value of an attribute
and method; `surface`, what a document of some length costs; `sweep`, what made them all. Scores are absolute, relative
to full context, and the share of the gap from no context that is closed, with paired bootstrap intervals over documents
and seeds.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from benchmarks.measuring.break_even import (
    add_answer_tokens,
    add_break_even,
    is_by_length,
    median,
    retrieved_tokens,
    sized,
    surface,
)
from benchmarks.measuring.cost import CostModel
from benchmarks.measuring.metrics import paired_interval
from benchmarks.measuring.rows import Row, Rows
from benchmarks.report.names import ADAPTER, CEILING, FLOOR, order, task_order

SCORES = ("exact_match", "token_f1", "rouge_l_precision", "rouge_l_recall", "rouge_l_f1", "log_likelihood")
# Of questions that had another answer before; cells measured earlier have the first alone.
AGAINST = ("old_answer", "contains_answer", "contains_old_answer", "contains_neither")
COSTS = ("prepare_s", "first_token_s", "question_s", "tokens_per_s", "stored_bytes")
PROFILED = ("prepare_flops", "answer_flops", "prepare_peak_bytes", "answer_peak_bytes")
# Attributes that are shown together, one on the axis and one as lines or panels; others are shown alone.
PAIRS = (("num_chunks", "depth"), ("real_world", "times_asked_from"))
MAX_VALUES = 12  # an attribute with more of them is a measurement of each case, not a setting


def summarize(rows: Rows, *, cost_model: Callable[[str], CostModel | None]) -> list[Row]:
    """Rows of all tables and plots, in their order.

    Args:
        rows: of cells, as `benchmarks.measuring.cells.read_cells` gives them.
        cost_model: FLOPs of a checkpoint's model; None leaves out what follows from them, the surface among it.

    Raises:
        ValueError: two settings of one task or method go by the same name.
    """
    _check_names(rows)
    result: list[Row] = []
    questions = [row for row in rows if row["kind"] == "question"]
    cases = [row for row in rows if row["kind"] == "case"]
    for task in sorted({row["task"] for row in questions}, key=task_order):
        asked, cost = ([row for row in part if row["task"] == task] for part in (questions, cases))
        for name in dict.fromkeys(row["set"] for row in asked):
            mine = [[row for row in part if row["set"] == name] for part in (asked, cost)]
            result += _group({"kind": "summary", "task": task, "set": name}, *mine)
        for keys in _slices(asked):
            for values in sorted({_at(row, keys) for row in asked if None not in _at(row, keys)}):
                chosen = [row for row in asked if _at(row, keys) == values]
                label = ", ".join(f"{key}={value:g}" for key, value in zip(keys, values, strict=True))
                base = {"kind": "slice", "task": task, "set": label, "by": list(keys)}
                result += _group(base, chosen, _cases_of(chosen, cost))
    for group in _groups(result):
        add_answer_tokens(group)
    checkpoints: dict[str, set[str]] = {}
    for row in rows:
        if row["kind"] == "summary":
            checkpoints.setdefault(row["task"], set()).add(row["run"]["config"]["checkpoint"])
    # Where a task's methods have several checkpoints, their FLOPs cannot be compared.
    alone = {task: next(iter(found)) for task, found in checkpoints.items() if len(found) == 1}
    models = {checkpoint: cost_model(checkpoint) for checkpoint in sorted(set(alone.values()))}
    model_of = lambda task: models[alone[task]] if task in alone else None  # noqa: E731
    retrieved = retrieved_tokens(rows)
    for group in _groups(result):
        add_break_even(group, sized(model_of(group[0]["task"]), group, retrieved), cases)
    by_length = [row for row in result if is_by_length(row)]
    model = sized(model_of("encyclopedia"), by_length, retrieved) if by_length else None
    return result + (surface(by_length, model) if model else [])


# One set, every method


def _group(base: Row, questions: Rows, cases: Rows) -> list[Row]:
    methods = sorted(dict.fromkeys(row["method"] for row in questions), key=order)
    last = {
        m: max((r["step"] for r in questions if r["method"] == m and r["step"] is not None), default=None)
        for m in methods
    }
    final = {m: {_key(r): r for r in questions if r["method"] == m and r["step"] == last[m]} for m in methods}
    result = []
    for method in methods:
        keys = list(final[method])
        chosen = [final[method][key] for key in keys]
        costs = [row for row in cases if row["method"] == method]
        row: Row = {
            **base,
            "method": method,
            "attributes": _attributes(chosen),
            "questions": len(chosen),
            "cases": len({(r["seed"], r["case"]) for r in chosen}),
            "seeds": len({r["seed"] for r in chosen}),
            "fits": _mean(r["fits"] for r in chosen),
            "prompt_tokens": median(r.get("prompt_tokens") for r in chosen),
        }
        row |= {score: _mean(r[score] for r in chosen) for score in SCORES}
        row["interval"] = _interval([chosen], lambda a: a)
        row |= {name: _mean(r[name] for r in chosen) for name in AGAINST if all(name in r for r in chosen)}
        row |= _compared(keys, final, method) | _costs(costs)
        if method == ADAPTER and base["kind"] == "summary":
            row["against"] = {other: _difference(keys, final, other) for other in methods if other != method}
        if last[method] is not None and base["kind"] == "summary":
            row["curve"] = _curve([r for r in questions if r["method"] == method], costs)
        result.append(row)
    return result


def _compared(keys: Sequence, final: dict[str, dict], method: str) -> Row:
    """With full context and no context on the questions that all of them answered."""
    result: Row = {}
    column = lambda name: [final[name][key] for key in keys]  # noqa: E731
    mean = lambda name: _mean(row["exact_match"] for row in column(name))  # noqa: E731
    has = {name: name in final and all(key in final[name] for key in keys) for name in (FLOOR, CEILING)}
    if has[CEILING] and mean(CEILING) > 0:
        result["relative"] = mean(method) / mean(CEILING)
        result["relative_interval"] = _interval([column(method), column(CEILING)], lambda a, b: a / b)
    if has[FLOOR]:
        result["over_floor"] = mean(method) - mean(FLOOR)
        result["over_floor_interval"] = _interval([column(method), column(FLOOR)], lambda a, b: a - b)
    if all(has.values()) and mean(CEILING) > mean(FLOOR):
        result["gap_closed"] = (mean(method) - mean(FLOOR)) / (mean(CEILING) - mean(FLOOR))
        # Where a resample leaves no gap, the share is undefined.
        result["gap_closed_interval"] = _interval(
            [column(method), column(FLOOR), column(CEILING)], lambda a, f, c: (a - f) / _positive(c - f)
        )
    return result


def _difference(keys: Sequence, final: dict[str, dict], other: str) -> Row:
    """The adapter's exact match minus the other's, on the questions that both answered."""
    shared = [key for key in keys if key in final[other]]
    own, theirs = ([final[name][key] for key in shared] for name in (ADAPTER, other))
    difference = _mean(r["exact_match"] for r in own) - _mean(r["exact_match"] for r in theirs)
    return {"difference": difference, "interval": _interval([own, theirs], lambda a, b: a - b) if shared else None}


def _costs(cases: Rows) -> Row:
    return {
        "document_tokens": _mean(c["document_tokens"] for c in cases),
        "documents": _mean(c.get("documents", 1) for c in cases),
        "num_timed": sum(c.get("question_s") is not None for c in cases),
        **{key: median(c.get(key) for c in cases) for key in (*COSTS, *PROFILED)},
    }


def _curve(questions: Rows, cases: Rows) -> list[Row]:
    points = []
    for step in sorted({row["step"] for row in questions}):
        chosen = [row for row in questions if row["step"] == step]
        points.append(
            {
                "step": step,
                "exact_match": _mean(row["exact_match"] for row in chosen),
                "interval": _interval([chosen], lambda a: a),
                "seconds": median(case["step_s"].get(str(step)) for case in cases),
            }
        )
    return points


# Attributes of cases


def _slices(questions: Rows) -> list[tuple[str, ...]]:
    """Attributes, and pairs of them, by whose values a task's questions are put together."""
    values: dict[str, set[float]] = {}
    for row in questions:
        for key, value in (row.get("attributes") or {}).items():
            values.setdefault(key, set()).add(value)
    useful = {key for key, found in values.items() if 2 <= len(found) <= MAX_VALUES}
    return [(key,) for key in values if key in useful] + [pair for pair in PAIRS if useful.issuperset(pair)]


def _cases_of(questions: Rows, cases: Rows) -> list[Row]:
    """The cases that the questions were asked about; a question may have attributes that its case does not have."""
    asked = {(row["method"], row["seed"], row["set"], row["case"]) for row in questions}
    return [row for row in cases if (row["method"], row["seed"], row["set"], row["case"]) in asked]


def _at(row: Row, keys: Sequence[str]) -> tuple[float | None, ...]:
    attributes = row.get("attributes") or {}
    return tuple(attributes.get(key) for key in keys)


def _attributes(questions: Rows) -> dict[str, float]:
    """Their means over the questions."""
    keys = dict.fromkeys(key for row in questions for key in row.get("attributes") or {})
    return {key: _mean(row["attributes"][key] for row in questions if key in row["attributes"]) for key in keys}


# What made them


def describe(rows: Rows, errors: Rows) -> Row:
    """The `sweep` row: commands, commits, hardware, versions, dates, settings, what failed."""
    summaries = [row for row in rows if row["kind"] == "summary"]
    runs = [row["run"] for row in summaries]
    settings = {
        row["method"]: {k: v for k, v in row["run"]["config"]["method"].items() if k not in ("_target_", "_partial_")}
        for row in summaries
    }
    tasks = dict.fromkeys(row["task"] for row in summaries)
    return {
        "kind": "sweep",
        "commands": commands(rows),
        "commands_by_task": {task: commands([row for row in summaries if row["task"] == task]) for task in tasks},
        "commits": sorted({run["commit"] for run in runs}),
        "hardware": sorted({f"{run['hardware']}, {_threads(run['threads'])}" for run in runs}),
        "versions": runs[0]["versions"] if runs else {},
        "dates": [min(run["date"] for run in runs), max(run["date"] for run in runs)],
        "checkpoints": sorted({run["config"]["checkpoint"] for run in runs}),
        "cells": len(summaries),
        "wall_s": sum(row["wall_s"] for row in summaries),
        "failed": [f"{e['task']}, {e['method']}, seed {e['seed']}: {e['error']}" for e in errors],
        "choices": [
            [name, ", ".join(f"{k}={v}" for k, v in settings[name].items() if v is not None)]
            for name in sorted(settings, key=order)
            if settings[name]
        ],
    }


def commands(rows: Rows) -> list[str]:
    """The commands that gave these rows, cells of one sweep taken together."""
    by_sweep: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row["kind"] == "summary" and "overrides" in row:
            given = dict(override.split("=", 1) for override in row["overrides"] if "=" in override)
            values = by_sweep.setdefault(given.get("sweep", ""), {})
            for key, value in given.items():
                values.setdefault(key, [])
                if value not in values[key]:
                    values[key].append(value)
    result = []
    for sweep, values in by_sweep.items():
        values.pop("output_dir", None)
        if sweep:
            result.append(f"python -m benchmarks.run sweep={sweep}")
        else:
            many = "--multirun " if any(len(v) > 1 for v in values.values()) else ""
            given = " ".join(f"{key}={','.join(value)}" for key, value in values.items())
            result.append(f"python -m benchmarks.run {many}{given}".rstrip())
    return result


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''} per process"


def _check_names(rows: Rows) -> None:
    """A table line must not mix settings: apart from the seed, all cells of a task and method have the same."""
    seen: dict[tuple[str, str], dict] = {}
    for row in rows:
        if row["kind"] != "summary":
            continue
        settings = {key: row["run"]["config"][key] for key in ("task", "method", "checkpoint", "max_new_tokens")}
        name = row["task"], row["method"]
        if seen.setdefault(name, settings) != settings:
            raise ValueError(
                f"Cells of task {name[0]} with method {name[1]} have different settings. Give one of them a name of "
                "its own (task_name=... or method_name=...), or another output_dir, and take the old cells away."
            )


def _interval(columns: Sequence[Rows], statistic: Callable) -> tuple[float, float] | None:
    groups = [(row["seed"], row["case"]) for row in columns[0]]
    return paired_interval([[row["exact_match"] for row in column] for column in columns], statistic, groups=groups)


def _groups(rows: Rows) -> list[list[Row]]:
    """Rows of one set, or one slice, together."""
    names = dict.fromkeys((row["kind"], row["task"], row["set"]) for row in rows)
    return [[row for row in rows if (row["kind"], row["task"], row["set"]) == name] for name in names]


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, np.nan)


def _key(row: Row) -> tuple:
    # Slices put sets together, and a case's name is its own only within its set.
    return row["seed"], row["set"], row["case"], row["number"]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")
