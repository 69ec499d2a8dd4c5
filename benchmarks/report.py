"""Rows of the benchmark's cells → tables for README and one HTML page with plots: `python -m benchmarks.report`

Every method stands beside its controls on the same questions: absolute, relative to full context, and as the share of
the gap from no context that it closes, with paired bootstrap intervals over documents and seeds.
"""

import html
import json
import logging
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

log = logging.getLogger(__name__)
FLOOR, CEILING = "no_context", "full_context"
ADAPTER = "doc_to_lora"
METHODS = (
    *(FLOOR, CEILING, "prefix_cache", "retrieval", "retrieval_dense"),
    *(ADAPTER, "doc_to_lora_in_prompt", "wrong_document", "random_adapter"),
    *("text_lora", "distillation_oracle", "distillation_generated", "warm_start_oracle", "warm_start_generated"),
)
SCORES = ("exact_match", "token_f1", "rouge_l_precision", "rouge_l_recall", "rouge_l_f1", "log_likelihood")
ALTERNATIVES = ("full_context", "prefix_cache", "retrieval")  # what an adapter's break-even is counted against

Rows = Sequence[dict[str, Any]]


# From cells to table rows


def summarize(rows: Rows) -> list[dict[str, Any]]:
    """One row per task, set and method, in the tables' order: scores with intervals, costs, break-even, curve.

    Raises:
        ValueError: two settings of one task or method go by the same name.
    """
    _check_names(rows)
    result = []
    questions = [row for row in rows if row["kind"] == "question"]
    cases = [row for row in rows if row["kind"] == "case"]
    for task in dict.fromkeys(row["task"] for row in questions):
        for name in dict.fromkeys(row["set"] for row in questions if row["task"] == task):
            mine = [row for row in questions if (row["task"], row["set"]) == (task, name)]
            costs = [row for row in cases if (row["task"], row["set"]) == (task, name)]
            result += _set_rows(task, name, mine, costs)
    return result


def _set_rows(task: str, name: str, questions: Rows, cases: Rows) -> list[dict[str, Any]]:
    methods = sorted(dict.fromkeys(row["method"] for row in questions), key=_order)
    last = {
        m: max((r["step"] for r in questions if r["method"] == m and r["step"] is not None), default=None)
        for m in methods
    }
    final = {m: {_key(r): r for r in questions if r["method"] == m and r["step"] == last[m]} for m in methods}
    cost = {m: _costs([row for row in cases if row["method"] == m]) for m in methods}
    result = []
    for method in methods:
        keys = list(final[method])
        chosen = [final[method][key] for key in keys]
        row: dict[str, Any] = {
            "kind": "summary",
            "task": task,
            "set": name,
            "method": method,
            "questions": len(chosen),
            "cases": len({(r["seed"], r["case"]) for r in chosen}),
            "seeds": len({r["seed"] for r in chosen}),
            "fits": _mean(r["fits"] for r in chosen),
        }
        row |= {score: _mean(r[score] for r in chosen) for score in SCORES}
        row["interval"] = _interval([chosen], lambda a: a)
        if all("old_answer" in r for r in chosen):
            row["old_answer"] = _mean(r["old_answer"] for r in chosen)
        row |= _compared(keys, final, method) | cost[method]
        if last[method] is not None:
            row["curve"] = _curve(
                [r for r in questions if r["method"] == method], [c for c in cases if c["method"] == method]
            )
        result.append(row)
    own = cost.get(ADAPTER)
    if own:
        for row in result:
            if row["method"] == ADAPTER:
                row["break_even"] = {m: _break_even(own, cost[m]) for m in ALTERNATIVES if m in cost}
    return result


def _compared(keys: Sequence, final: dict[str, dict], method: str) -> dict[str, Any]:
    """Beside full context and no context on the questions that all of them answered."""
    result: dict[str, Any] = {}
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


def _costs(cases: Rows) -> dict[str, Any]:
    median = lambda key: statistics.median(v) if (v := [c[key] for c in cases if c.get(key) is not None]) else None  # noqa: E731
    return {
        "document_tokens": _mean(c["document_tokens"] for c in cases),
        "facts_in_documents": _mean(c["questions"] for c in cases),
        **{key: median(key) for key in ("prepare_s", "first_token_s", "question_s", "tokens_per_s", "stored_bytes")},
        **{key: median(key) for key in ("prepare_flops", "answer_flops", "prepare_peak_bytes", "answer_peak_bytes")},
    }


def _break_even(own: dict[str, Any], other: dict[str, Any]) -> dict[str, float | None]:
    """Questions, in seconds and in FLOPs; None: never, or not measured."""
    from benchmarks.cost import Costs, break_even

    result = {}
    for what, prepare, question in (("seconds", "prepare_s", "question_s"), ("flops", "prepare_flops", "answer_flops")):
        values = [costs[key] for costs in (own, other) for key in (prepare, question)]
        if None in values:
            result[what] = None
            continue
        number = break_even(Costs(*values[:2]), Costs(*values[2:]))
        result[what] = number if number < float("inf") else None
    return result


def _curve(questions: Rows, cases: Rows) -> list[dict[str, Any]]:
    points = []
    for step in sorted({row["step"] for row in questions}):
        chosen = [row for row in questions if row["step"] == step]
        seconds = [case["step_s"][str(step)] for case in cases if str(step) in case["step_s"]]
        points.append(
            {
                "step": step,
                "exact_match": _mean(row["exact_match"] for row in chosen),
                "interval": _interval([chosen], lambda a: a),
                "seconds": statistics.median(seconds) if seconds else None,
            }
        )
    return points


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
    from hypernet.metrics import paired_interval

    groups = [(row["seed"], row["case"]) for row in columns[0]]
    return paired_interval([[row["exact_match"] for row in column] for column in columns], statistic, groups=groups)


def _positive(values: Any) -> Any:
    import numpy as np

    return np.where(values > 0, values, np.nan)


def _key(row: dict) -> tuple:
    return row["seed"], row["case"], row["number"]


def _order(method: str) -> tuple[int, str]:
    return (METHODS.index(method) if method in METHODS else len(METHODS)), method


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


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


# Markdown


QUALITY = ("method", "exact match", "95 % interval", "of full context", "gap closed", "F1", "ROUGE-L P / R", "log p")
COST = (
    "method",
    "prepare, ms",
    "first token, ms",
    "question, ms",
    "tokens/s",
    "kept, KiB",
    "peak MiB",
    "MFLOP prepare",
    "MFLOP question",
)


def quality_cells(row: dict[str, Any]) -> list[str]:
    number = lambda key, digits=2: f"{row[key]:.{digits}f}" if row.get(key) is not None else "–"  # noqa: E731
    return [
        _name(row["method"]),
        number("exact_match", 3),
        _range(row.get("interval"), 3),
        f"{number('relative')} ({_range(row['relative_interval'])})" if row.get("relative") is not None else "–",
        f"{number('gap_closed')} ({_range(row['gap_closed_interval'])})" if row.get("gap_closed") is not None else "–",
        number("token_f1"),
        f"{number('rouge_l_precision')} / {number('rouge_l_recall')}",
        number("log_likelihood", 1),
    ]


def cost_cells(row: dict[str, Any]) -> list[str]:
    scaled = lambda key, factor: _short(row[key] * factor) if row.get(key) is not None else "–"  # noqa: E731
    peaks = [row[key] for key in ("prepare_peak_bytes", "answer_peak_bytes") if row.get(key) is not None]
    return [
        _name(row["method"]),
        *(scaled(key, 1000) for key in ("prepare_s", "first_token_s", "question_s")),
        scaled("tokens_per_s", 1),
        scaled("stored_bytes", 1 / 1024),
        _short(max(peaks) / 2**20) if peaks else "–",
        scaled("prepare_flops", 1e-6),
        scaled("answer_flops", 1e-6),
    ]


def break_even_cells(row: dict[str, Any]) -> list[str]:
    cells = [row["set"], _short(row["document_tokens"])]
    for method in ALTERNATIVES:
        for what in ("seconds", "flops"):
            value = row["break_even"].get(method, {}).get(what)
            cells.append("never" if value is None else _short(value))
    return cells


BREAK_EVEN = ("set", "tokens", *(f"{m.replace('_', ' ')}, {w}" for m in ALTERNATIVES for w in ("seconds", "FLOPs")))


# What README shows: the sets that tell most.
OVERVIEW = (
    ("encyclopedia", "one entity"),
    ("encyclopedia", "four entities"),
    ("encyclopedia", "sixteen entities"),
    ("encyclopedia", "three documents"),
    ("locality", "background, never protected"),
    ("conflict", "known entities"),
    ("updates", "old version dropped"),
)


def overview(rows: Rows) -> str:
    """One line per method: exact match with intervals on the sets that tell most, and what the first of them costs."""
    columns = [key for key in OVERVIEW if any((row["task"], row["set"]) == key for row in rows)]
    found = {(row["task"], row["set"], row["method"]): row for row in rows}
    names = [name if task == "encyclopedia" else f"{task}: {name}" for task, name in columns]
    lines = []
    for method in sorted({row["method"] for row in rows}, key=_order):
        cells = [found.get((*key, method)) for key in columns]
        first = next((row for row in cells if row), None)
        scores = [f"{row['exact_match']:.2f} ({_range(row['interval'])})" if row else "–" for row in cells]
        costs = [cost_cells(first)[i] for i in (1, 3, 5)] if first else ["–"] * 3
        lines.append([_name(method), *scores, *costs])
    table = _table(("method", *names, "prepare, ms", "question, ms", "kept, KiB"), lines)
    even = [row for row in rows if row.get("break_even") and row["task"] == "encyclopedia"]
    return f"{table}\n\n{_table(BREAK_EVEN, map(break_even_cells, even))}" if even else table


def markdown(rows: Rows) -> str:
    """All tables: quality and cost by task and set, then break-even."""
    parts = []
    for title, chosen in _by_set(rows):
        parts += [f"**{title}**", _table(QUALITY, map(quality_cells, chosen)), _table(COST, map(cost_cells, chosen))]
    even = [row for row in rows if row.get("break_even")]
    if even:
        parts += ["**Questions from which on the adapter is cheaper**", _table(BREAK_EVEN, map(break_even_cells, even))]
    return "\n\n".join(parts)


def _by_set(rows: Rows) -> list[tuple[str, list[dict[str, Any]]]]:
    names = dict.fromkeys((row["task"], row["set"]) for row in rows)
    result = []
    for task, name in names:
        chosen = [row for row in rows if (row["task"], row["set"]) == (task, name)]
        first = chosen[0]
        counts = ", ".join(f"{first[what]} {what}" for what in ("questions", "cases", "seeds"))
        title = f"{_name(task)}, {name}: {counts}"
        fits = next((row["fits"] for row in chosen if row["method"] == CEILING), 1.0)
        if fits < 1:
            title += f"; {1 - fits:.0%} of the prompts with the documents did not fit and lost their middle"
        if any("old_answer" in row for row in chosen):
            old = ", ".join(f"{_name(r['method'])} {r['old_answer']:.2f}" for r in chosen if "old_answer" in r)
            title += f"; share of old answers: {old}"
        result.append((title, chosen))
    return result


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---', *['---:'] * (len(head) - 1)])} |"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in body)])


def _name(name: str) -> str:
    return name.replace("_", " ")


def _range(interval: Sequence[float] | None, digits: int = 2) -> str:
    return "–" if interval is None else f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# HTML


STYLE = """
:root { color-scheme: light dark; --text: #1a1c20; --page: #ffffff; --soft: #5c626c; --line: #d5d9df; --band: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8eb; --page: #15181c; --soft: #a2a9b3; --line: #3a4048; --band: #1f242a; }
}
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h2 { margin-top: 2.5rem; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
caption { text-align: left; white-space: normal; padding: .25rem 0; font-weight: 600; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
tbody tr:nth-child(even) > * { background: var(--band); }
thead th { vertical-align: bottom; }
figure { margin: 1.5rem 0; }
figure svg { width: 100%; height: auto; max-width: 56rem; min-width: 34rem; color: var(--text); }
figcaption, .note { color: var(--soft); font-size: .875rem; }
code { overflow-wrap: anywhere; white-space: normal; }
:focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }
"""


def page(rows: Rows, figures: Sequence[tuple[str, str, str]], *, run: dict[str, Any]) -> str:
    """The whole page, with nothing outside it.

    Args:
        figures: (title, what it shows, SVG).
        run: commands, commits, hardware, versions, dates, failed cells.
    """
    made = " ".join(
        f"<code>{html.escape(command)}</code>" for command in [*run["commands"], "python -m benchmarks.report"]
    )
    body = [
        "<h1>When is an adapter better than the document in the prompt?</h1>",
        f"<p class=note>{made}<br>Commit {html.escape(', '.join(run['commits']))}; "
        f"{html.escape(', '.join(run['hardware']))}; "
        f"{run['cells']} cells in {run['wall_s'] / 60:.0f} minutes; "
        f"{html.escape(', '.join(f'{k} {v}' for k, v in run['versions'].items()))}; "
        f"{run['dates'][0]} to {run['dates'][1]}.</p>",
        "<p>Exact match unless it says otherwise; intervals are 95 % paired bootstrap intervals over documents and "
        "seeds. Controls: no context, another case's adapter, a random adapter of the same norm.</p>",
    ]
    if run["failed"]:
        items = "".join(f"<li>{html.escape(text)}</li>" for text in run["failed"])
        body.append(f"<h2>Cells that failed</h2><ul>{items}</ul>")
    for title, text, svg in figures:
        label = html.escape(f"{title}. {text}", quote=True)
        svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
        body.append(
            f"<figure><h2>{html.escape(title)}</h2>"
            f'<div class=scroll tabindex=0 role=region aria-label="{html.escape(title)}">{svg}</div>'
            f"<figcaption>{html.escape(text)} {made}</figcaption></figure>"
        )
    body.append("<h2>All figures</h2>")
    for title, chosen in _by_set(rows):
        body.append(_html_table(f"{title}: quality", QUALITY, map(quality_cells, chosen)))
        body.append(_html_table(f"{title}: cost", COST, map(cost_cells, chosen)))
    even = [row for row in rows if row.get("break_even")]
    if even:
        caption = "Questions from which on the adapter is cheaper than each alternative"
        body.append(_html_table(caption, BREAK_EVEN, map(break_even_cells, even)))
    if run["choices"]:
        items = "".join(
            f"<li>{html.escape(name)}: <code>{html.escape(text)}</code></li>" for name, text in run["choices"]
        )
        body.append(f"<h2>Settings of the methods</h2><ul>{items}</ul>")
    return (
        '<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, '
        f'initial-scale=1"><title>Benchmark</title><style>{STYLE}</style></head><body><main>{"".join(body)}</main></body></html>\n'
    )


def _html_table(caption: str, head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    cells = lambda tag, row: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)  # noqa: E731
    columns = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in head)
    lines = "".join(f"<tr><th scope=row>{html.escape(row[0])}</th>{cells('td', row[1:])}</tr>" for row in body)
    return (
        f'<div class=scroll tabindex=0 role=region aria-label="{html.escape(caption, quote=True)}"><table><caption>'
        f"{html.escape(caption)}</caption><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def describe(rows: Rows, errors: Rows) -> dict[str, Any]:
    """What made the rows: commands, commits, hardware, versions, dates, settings, what failed."""
    summaries = [row for row in rows if row["kind"] == "summary"]
    runs = [row["run"] for row in summaries]
    settings = {
        row["method"]: {k: v for k, v in row["run"]["config"]["method"].items() if k not in ("_target_", "_partial_")}
        for row in summaries
    }
    return {
        "commands": commands(rows),
        "commits": sorted({run["commit"] for run in runs}),
        "hardware": sorted({f"{run['hardware']}, {run['threads']} threads" for run in runs}),
        "versions": runs[0]["versions"] if runs else {},
        "dates": [min(run["date"] for run in runs), max(run["date"] for run in runs)],
        "cells": len(summaries),
        "wall_s": sum(row["wall_s"] for row in summaries),
        "failed": [f"{e['task']}, {e['method']}, seed {e['seed']}: {e['error']}" for e in errors],
        "choices": [
            (name, ", ".join(f"{k}={v}" for k, v in settings[name].items()))
            for name in sorted(settings, key=_order)
            if settings[name]
        ],
    }


@hydra.main(config_path="../conf/benchmark", config_name="report", version_base="1.3")
def main(cfg: DictConfig) -> None:
    from benchmarks.cells import read_cells, read_errors
    from benchmarks.rows import write_rows

    try:
        cells, errors = read_cells(cfg.input_dir), read_errors(cfg.input_dir)
        rows = summarize(cells)
    except ValueError as error:
        sys.exit(f"benchmarks.report: {error}")
    run = describe(cells, errors)
    figures: list[tuple[str, str, str]] = []
    if cfg.plots:
        from benchmarks.plots import all_figures

        figures = all_figures(rows, checkpoint=cfg.checkpoint)
    if cfg.output:
        write_rows(cfg.output, json.loads(json.dumps(rows)), run=run)
    if cfg.page:
        path = Path(cfg.page)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(rows, figures, run=run), encoding="utf-8")
        log.info("%s", path)
    print(f"{overview(rows)}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
