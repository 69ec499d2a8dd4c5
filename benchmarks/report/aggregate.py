"""Rows of the benchmark's cells → rows of its tables and plots, every method beside its controls on the same questions.

    rows = summarize(read_cells("outputs/benchmark"), cost_model=lambda checkpoint: None)

A row's `kind` says what it is: `summary`, one per task, set and method; `slice`, one per task, value of an attribute
and method; `surface`, what a document of some length costs; `sweep`, what made them all. Scores are absolute, relative
to full context, and the share of the gap from no context that is closed, with paired bootstrap intervals over documents
and seeds.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np

from benchmarks.cost import MODELLED, CostModel, Costs, Measured, SecondsModel, break_even, break_evens

FLOOR, CEILING = "no_context", "full_context"
ADAPTER = "doc_to_lora"
GATED, ROUTED = "doc_to_lora_gated", "doc_to_lora_routed"
WRONG = "wrong_document"
ALTERNATIVES = ("full_context", "prefix_cache", "retrieval")  # what an adapter's break-even is counted against
GRADIENT = ("text_lora", "distillation_oracle", "distillation_generated", "warm_start_oracle", "warm_start_generated")
# In the order of the tables: name → (name on the page, what it does).
METHODS = {
    FLOOR: ("no context", "The question alone: the floor."),
    CEILING: ("full context", "All documents in the prompt, read again for every question."),
    "prefix_cache": ("prefix cache", "Full context whose keys and values are kept: the same answers."),
    "retrieval": ("retrieval", "The chunks that BM25 ranks first, in the prompt."),
    "retrieval_dense": ("dense retrieval", "The chunks whose embeddings are nearest, in the prompt."),
    ADAPTER: ("Doc-to-LoRA", "The documents' adapter from one forward pass; the question alone in the prompt."),
    "doc_to_lora_in_prompt": ("Doc-to-LoRA and full context", "The adapter, and the documents in the prompt as well."),
    GATED: (
        "Doc-to-LoRA, gated",
        "The documents' adapter, each chunk as loud as its rows of A answer, token by token and module by module.",
    ),
    ROUTED: (
        "Doc-to-LoRA, routed",
        "The documents' adapter, of which each question has the two chunks in force whose rows of A answer it loudest.",
    ),
    "outer_product": ("outer products", "The same from sums of outer products over the tokens, no Perceiver."),
    WRONG: ("wrong document", "Control: the adapter of another case's documents."),
    "random_adapter": ("random adapter", "Control: a random adapter of the same norm in every layer."),
    "text_lora": ("LoRA on the text", "Gradient steps on the documents' next tokens."),
    "distillation_oracle": (
        "distillation, same questions",
        "Gradient steps towards full context's answers to the very questions of the test: an upper bound.",
    ),
    "distillation_generated": (
        "distillation, other questions",
        "Gradient steps towards full context's answers to other questions on the documents.",
    ),
    "warm_start_oracle": ("warm start, same questions", "The same from Doc-to-LoRA's adapter: an upper bound."),
    "warm_start_generated": ("warm start, other questions", "The same from Doc-to-LoRA's adapter."),
}
NUMBERED = {"_rank": "rank", "_seed": "training seed"}  # how a method's name ends → what it is on the page
# In the order of the page; others come after these, by name. What a name of its own says is that it is a control.
TASKS = {
    "encyclopedia": "encyclopedia",
    "needles": "needles",
    "composition": "composition",
    "interference": "interference",
    "capacity": "capacity",
    "conflict": "conflict",
    "conflict_by_times_asked": "conflict by times asked",
    "updates": "updates",
    "locality": "locality",
    "encyclopedia_shuffled_facts": "control: shuffled facts",
    "encyclopedia_empty_document": "control: empty document",
}
CONTROL_TASKS = tuple(task for task, name in TASKS.items() if name.startswith("control"))
SCORES = ("exact_match", "token_f1", "rouge_l_precision", "rouge_l_recall", "rouge_l_f1", "log_likelihood")
COSTS = ("prepare_s", "first_token_s", "question_s", "tokens_per_s", "stored_bytes")
PROFILED = ("prepare_flops", "answer_flops", "prepare_peak_bytes", "answer_peak_bytes")
# Attributes that are shown together, one on the axis and one as lines or panels; others are shown alone.
PAIRS = (("num_chunks", "depth"), ("real_world", "times_asked_from"))
MAX_VALUES = 12  # an attribute with more of them is a measurement of each case, not a setting
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)

Row = dict[str, Any]
Rows = Sequence[Row]


def name_of(method: str) -> str:
    """On the page; `doc_to_lora_rank16` is one checkpoint of several, `doc_to_lora_seed1` one training of several."""
    base, what, number = _numbered(method)
    if what:
        return f"{METHODS[base][0]}, {what} {number}"
    return METHODS[base][0] if base in METHODS else base.replace("_", " ")


def task_name(task: str) -> str:
    return TASKS.get(task, task.replace("_", " "))


def task_order(task: str) -> tuple[float, str]:
    """Key that sorts tasks as the page does: those that are not known stand before the controls."""
    place = list(TASKS).index(task) if task in TASKS else len(TASKS) - len(CONTROL_TASKS) - 0.5
    return (place, task)


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


def summarize(rows: Rows, *, cost_model: Callable[[str], CostModel | None]) -> list[Row]:
    """Rows of all tables and plots, in their order.

    Args:
        rows: of cells, as `benchmarks.cells.read_cells` gives them.
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
        _add_answer_tokens(group)
    checkpoints: dict[str, set[str]] = {}
    for row in rows:
        if row["kind"] == "summary":
            checkpoints.setdefault(row["task"], set()).add(row["run"]["config"]["checkpoint"])
    # Where a task's methods have several checkpoints, their FLOPs cannot be compared.
    alone = {task: next(iter(found)) for task, found in checkpoints.items() if len(found) == 1}
    models = {checkpoint: cost_model(checkpoint) for checkpoint in sorted(set(alone.values()))}
    model_of = lambda task: models[alone[task]] if task in alone else None  # noqa: E731
    retrieved = _retrieved_tokens(rows)
    for group in _groups(result):
        _add_break_even(group, _sized(model_of(group[0]["task"]), group, retrieved), cases)
    by_length = [row for row in result if is_by_length(row)]
    model = _sized(model_of("encyclopedia"), by_length, retrieved) if by_length else None
    return result + (_surface(by_length, model) if model else [])


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
            "prompt_tokens": _median(r.get("prompt_tokens") for r in chosen),
        }
        row |= {score: _mean(r[score] for r in chosen) for score in SCORES}
        row["interval"] = _interval([chosen], lambda a: a)
        if all("old_answer" in r for r in chosen):
            row["old_answer"] = _mean(r["old_answer"] for r in chosen)
        row |= _compared(keys, final, method) | _costs(costs)
        if method == ADAPTER and base["kind"] == "summary":
            row["against"] = {other: _difference(keys, final, other) for other in methods if other != method}
        if last[method] is not None and base["kind"] == "summary":
            row["curve"] = _curve([r for r in questions if r["method"] == method], costs)
        result.append(row)
    return result


def _compared(keys: Sequence, final: dict[str, dict], method: str) -> Row:
    """Beside full context and no context on the questions that all of them answered."""
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
        **{key: _median(c.get(key) for c in cases) for key in (*COSTS, *PROFILED)},
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
                "seconds": _median(case["step_s"].get(str(step)) for case in cases),
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


# Break-even


def at_equal_length(row: Row) -> float | None:
    """Seconds of a question whose answer is as long as full context's, so that no method gains by answering less."""
    first, rate, tokens = (row.get(key) for key in ("first_token_s", "tokens_per_s", "answer_tokens"))
    return first + (tokens - 1) / rate if None not in (first, rate, tokens) else row.get("question_s")


def _add_answer_tokens(group: Rows) -> None:
    ceiling = next((row for row in group if row["method"] == CEILING), None)
    if ceiling and ceiling["tokens_per_s"]:
        tokens = 1 + ceiling["tokens_per_s"] * (ceiling["question_s"] - ceiling["first_token_s"])
        for row in group:
            row["answer_tokens"] = tokens


def _add_break_even(group: Rows, model: CostModel | None, cases: Rows) -> None:
    """Questions from which on a method is cheaper than each alternative; None: never. Absent: not measured."""
    found = {row["method"]: row for row in group}
    for row in group:
        if row["method"] not in (*ALTERNATIVES, ADAPTER, *GRADIENT):
            continue
        row["break_even"] = {}
        for other in ALTERNATIVES:
            if other == row["method"] or other not in found:
                continue
            result: Row = {}
            own, theirs = (_seconds(found[name]) for name in (row["method"], other))
            if own and theirs:
                result["seconds"] = _or_none(break_even(own, theirs))
                if group[0]["kind"] == "summary":
                    result["seconds_interval"] = _break_even_interval(row, found[other], cases)
            own, theirs = (_flops(found[name], model) for name in (row["method"], other))
            if own and theirs:
                result["flops"] = _or_none(break_even(own, theirs))
            if result:
                row["break_even"][other] = result


def _seconds(row: Row) -> Costs | None:
    values = row["prepare_s"], at_equal_length(row)
    return None if None in values else Costs(*values)


def _flops(row: Row, model: CostModel | None) -> Costs | None:
    if model is None:
        return None
    if row["method"] in MODELLED:
        return model.costs(row["method"], row["document_tokens"])
    if row["method"] in GRADIENT and row["prepare_flops"] is not None:
        return Costs(row["prepare_flops"], model.costs(ADAPTER, row["document_tokens"]).question)
    return None


def _break_even_interval(row: Row, other: Row, cases: Rows) -> list[float | None] | None:
    """Percentile bootstrap over the cases that were timed with both methods; None where there are fewer than three."""
    columns = []
    for name in (row["method"], other["method"]):
        columns.append(
            {
                (c["seed"], c["case"]): at_equal_length({**c, "answer_tokens": row.get("answer_tokens")})
                for c in cases
                if (c["task"], c["set"], c["method"]) == (row["task"], row["set"], name)
                and c.get("question_s") is not None
            }
        )
    prepared = [
        {(c["seed"], c["case"]): c["prepare_s"] for c in cases if (c["task"], c["set"], c["method"]) == place}
        for place in ((r["task"], r["set"], r["method"]) for r in (row, other))
    ]
    keys = [key for key in columns[0] if key in columns[1]]
    if len(keys) < 3:
        return None
    drawn = np.random.default_rng(0).integers(len(keys), size=(2000, len(keys)))
    medians = [
        np.median(np.array([part[key] for key in keys])[drawn], axis=1)
        for pair in zip(prepared, columns, strict=True)
        for part in pair
    ]
    values = break_evens(Costs(*medians[:2]), Costs(*medians[2:]))
    # Never is infinite, so no interpolation between values.
    low, high = (float(np.quantile(values, q, method="nearest")) for q in (0.025, 0.975))
    return [_or_none(low), _or_none(high)]


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


# Costs by length


def timed_rows(rows: Rows) -> list[Row]:
    """Rows whose seconds the surface is fitted to: single documents that the prompt holds whole."""
    ceilings = {row["set"]: row["fits"] for row in rows if is_by_length(row) and row["method"] == CEILING}
    return [
        row
        for row in rows
        if is_by_length(row)
        and row["method"] in MODELLED
        and (row["method"] not in (CEILING, "prefix_cache") or ceilings.get(row["set"], 0) == 1)
        and row["prepare_s"]
        and row["first_token_s"]
        and row["tokens_per_s"]
    ]


def is_by_length(row: Row) -> bool:
    """Whether it belongs to the encyclopedia's sets of one document, which are shown by the document's length."""
    return row["kind"] == "summary" and row["task"] == "encyclopedia" and row["documents"] == 1


def _sized(model: CostModel | None, rows: Rows, retrieved: int) -> CostModel | None:
    """For questions and answers as long as those of the rows."""
    if model is None:
        return None
    asked = _median(row["prompt_tokens"] for row in rows if row["method"] == FLOOR)
    answered = _median(row.get("answer_tokens") for row in rows if row["method"] == CEILING)
    return model._replace(
        question_tokens=round(asked or model.question_tokens),
        answer_tokens=max(1, round(answered or model.answer_tokens)),
        retrieved_tokens=retrieved,
    )


def _retrieved_tokens(rows: Rows) -> int:
    """At most so many does retrieval put into the prompt; 0 where it was not measured."""
    settings = [r["run"]["config"]["method"] for r in rows if r["kind"] == "summary" and r["method"] == "retrieval"]
    return max((s["num_chunks"] * s["max_chunk_tokens"] for s in settings), default=0)


def _surface(rows: Rows, model: CostModel) -> list[Row]:
    measured = [
        Measured(r["method"], r["document_tokens"], r["prepare_s"], r["first_token_s"], 1 / r["tokens_per_s"])
        for r in timed_rows(rows)
    ]
    seconds = SecondsModel.fitted(model, measured)
    errors = []
    for m in measured:
        question_s = m.first_token_s + (model.answer_tokens - 1) * m.further_token_s
        errors.append(abs(seconds.costs(m.method, m.num_tokens).question / question_s - 1))
    counted = [
        r["prepare_flops"] / model.phases(ADAPTER, r["document_tokens"]).prepare
        for r in rows
        if r["method"] == ADAPTER and r["prepare_flops"]
    ]
    common = {
        "kind": "surface",
        "question_tokens": model.question_tokens,
        "answer_tokens": model.answer_tokens,
        "retrieved_tokens": model.retrieved_tokens,
        "longest_measured": max((m.num_tokens for m in measured), default=0),
        "fit_error": statistics.median(errors) if errors else None,
        "counted_over_formula": [min(counted), max(counted)] if counted else None,
    }
    result = []
    for length, method in product(LENGTHS, MODELLED):
        if method == "retrieval" and not model.retrieved_tokens:
            continue
        row = {**common, "num_tokens": length, "method": method, "flops": list(model.costs(method, length))}
        row["seconds"] = list(seconds.costs(method, length)) if method in seconds.lines else None
        result.append(row)
    return result


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
    from benchmarks.metrics import paired_interval

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


def _median(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None
