"""Rows of the benchmark's cells → tables for README and one HTML page with plots: `python -m benchmarks.report`

    python -m benchmarks.report output=benchmarks/results/bench.jsonl page=benchmarks/results/bench.html
    python -m benchmarks.report rows=benchmarks/results/bench.jsonl       # the page again, from rows that are there
    python -m benchmarks.report rows=[bench.jsonl,niah.jsonl]             # one page of several reports

Every method stands beside its controls on the same questions: absolute, relative to full context, and as the share of
the gap from no context that it closes, with paired bootstrap intervals over documents and seeds.
"""

import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from benchmarks import plots
from benchmarks.plots import BREAK_EVEN, break_even_cells, gap_text, score_text
from benchmarks.summary import (
    ADAPTER,
    CEILING,
    FLOOR,
    WRONG,
    Row,
    Rows,
    at_equal_length,
    describe,
    name_of,
    order,
    summarize,
    task_name,
)
from benchmarks.svg import short

if TYPE_CHECKING:
    from benchmarks.cost import CostModel

log = logging.getLogger(__name__)

QUALITY = (
    "method",
    "exact match",
    "95 % interval",
    "relative to full context",
    "share of the gap closed",
    "token F1",
    "ROUGE-L precision / recall",
    "log-likelihood, nats",
)
COST = (
    "method",
    "prepare, ms",
    "first token, ms",
    "question, ms",
    "tokens/s",
    "kept, KiB",
    "peak, MiB",
    "MFLOP to prepare",
    "MFLOP per question",
)


def quality_cells(row: Row) -> list[str]:
    number = lambda key, digits=2: f"{row[key]:.{digits}f}" if row.get(key) is not None else "–"  # noqa: E731
    return [
        name_of(row["method"]),
        number("exact_match", 3),
        _range(row.get("interval"), 3),
        f"{number('relative')} ({_range(row['relative_interval'])})" if row.get("relative") is not None else "–",
        f"{number('gap_closed')} ({_range(row['gap_closed_interval'])})" if row.get("gap_closed") is not None else "–",
        number("token_f1"),
        f"{number('rouge_l_precision')} / {number('rouge_l_recall')}",
        number("log_likelihood", 1),
    ]


def cost_cells(row: Row) -> list[str]:
    scaled = lambda key, factor: short(row[key] * factor) if row.get(key) is not None else "–"  # noqa: E731
    peaks = [row[key] for key in ("prepare_peak_bytes", "answer_peak_bytes") if row.get(key) is not None]
    return [
        name_of(row["method"]),
        *(scaled(key, 1000) for key in ("prepare_s", "first_token_s", "question_s")),
        scaled("tokens_per_s", 1),
        scaled("stored_bytes", 1 / 1024),
        short(max(peaks) / 2**20) if peaks else "–",
        scaled("prepare_flops", 1e-6),
        scaled("answer_flops", 1e-6),
    ]


# Tables for README


# The sets that tell most; the second gives the costs.
OVERVIEW = (
    ("encyclopedia", "one entity"),
    ("encyclopedia", "four entities"),
    ("encyclopedia", "sixteen entities"),
    ("locality", "background, never protected"),
    ("conflict", "known entities"),
    ("updates", "old version dropped"),
)


def overview(rows: Rows) -> str:
    """Exact match of every method on the sets that tell most, then what each costs on one of them."""
    summaries = [row for row in rows if row["kind"] == "summary"]
    found = {(row["task"], row["set"], row["method"]): row for row in summaries}
    columns = [key for key in OVERVIEW if any(place[:2] == key for place in found)]
    columns = columns or list(dict.fromkeys(place[:2] for place in found))[:4]
    names = [name if task == "encyclopedia" else f"{task}: {name}" for task, name in columns]
    methods = sorted({row["method"] for row in summaries}, key=order)
    scores = [[name_of(m), *(score_text(found.get((*key, m))) for key in columns)] for m in methods]
    place = columns[min(1, len(columns) - 1)]
    costs = [_overview_costs(found[*place, m]) for m in methods if (*place, m) in found]
    tokens = found[*place, methods[0]]["document_tokens"]
    head = (
        f"{place[1]}, {short(tokens)} tokens",
        "share of the gap closed",
        "prepare, ms",
        "first token, ms",
        "answer, ms",
        "kept, KiB",
        "cheaper than full context after questions: clock / FLOPs",
    )
    return f"{_table(('exact match', *names), scores)}\n\n{_table(head, costs)}"


def _overview_costs(row: Row) -> list[str]:
    even = (row.get("break_even") or {}).get(CEILING)
    milliseconds = [row["prepare_s"], row["first_token_s"], at_equal_length(row)]
    return [
        name_of(row["method"]),
        gap_text(row),
        *("–" if value is None else short(1000 * value) for value in milliseconds),
        short(row["stored_bytes"] / 1024),
        " / ".join(_after(even, what) for what in ("seconds", "flops")) if even else "",
    ]


def _after(even: Row, what: str) -> str:
    if what not in even:
        return "–"
    return "never" if even[what] is None else short(even[what])


def by_attribute(rows: Rows, *, task: str, key: str, label: str, sweep: str) -> str:
    """Exact match of the adapter and its controls by the values of an attribute.

    Raises:
        ValueError: no such rows.
    """
    chosen = [row for row in rows if row["kind"] == "slice" and row["task"].startswith(task) and row["by"] == [key]]
    if not chosen:
        raise ValueError(f"No rows of a task {task} by {key}; run python -m benchmarks.run sweep={sweep}.")
    tasks = list(dict.fromkeys(row["task"] for row in chosen))
    shown = [m for m in plots.SHOWN if any(row["method"] == m for row in chosen)]
    found = {(row["task"], row["attributes"][key], row["method"]): row for row in chosen}
    lines = []
    for name, value in sorted({place[:2] for place in found}, key=lambda place: (tasks.index(place[0]), place[1])):
        own = found.get((name, value, ADAPTER))
        first = f"{task_name(name)}, {short(value)}" if len(tasks) > 1 else short(value)
        lines.append([first, *(score_text(found.get((name, value, m))) for m in shown), gap_text(own) if own else "–"])
    return _table((label, *map(name_of, shown), "share of the gap closed"), lines)


def niah(rows: Rows) -> str:
    return by_attribute(rows, task="needles", key="num_chunks", label="chunks", sweep="niah")


def niah_seeds(rows: Rows) -> str:
    """Chunks down, training seeds across; of the controls the lowest and the highest of them.

    Raises:
        ValueError: no such rows.
    """
    chosen = [row for row in rows if row["kind"] == "slice" and row["by"] == ["num_chunks"]]
    found = {(row["attributes"]["num_chunks"], row["method"]): row for row in chosen}
    own = sorted({method for _, method in found if method.startswith(f"{ADAPTER}_seed")}, key=order)
    if not own:
        raise ValueError("No rows by training seed; run python -m benchmarks.run sweep=niah_seeds.")
    controls, lines = (FLOOR, CEILING, WRONG), []
    for value in sorted({value for value, _ in found}):
        line = [short(value), *(score_text(found.get((value, method))) for method in own)]
        for control in controls:
            scores = [found[key]["exact_match"] for key in found if key[0] == value and key[1].startswith(control)]
            line.append(" to ".join(dict.fromkeys(f"{f(scores):.2f}" for f in (min, max))) if scores else "–")
        lines.append(line)
    return _table(("chunks", *map(name_of, own), *map(name_of, controls)), lines)


def composition(rows: Rows) -> str:
    label = "documents in one adapter"
    return by_attribute(rows, task="composition", key="num_documents", label=label, sweep="composition")


def interference(rows: Rows) -> str:
    """Methods down, sets across.

    Raises:
        ValueError: no such rows.
    """
    figure = plots.interference(rows)
    if figure is None:
        raise ValueError("No rows of a task locality; run python -m benchmarks.run sweep=interference.")
    _, (_, *methods), lines = figure.tables[0]
    body = [[method, *(line[1 + i] for line in lines)] for i, method in enumerate(methods)]
    return _table(("exact match", *(line[0] for line in lines)), body)


def capacity(rows: Rows) -> str:
    """Facts in the document down, controls and ranks across.

    Raises:
        ValueError: no such rows.
    """
    figure = plots.capacity(rows)
    if figure is None:
        raise ValueError("No rows by facts; run python -m benchmarks.run sweep=capacity.")
    _, _, lines = figure.tables[0]
    methods = dict.fromkeys(line[2] for line in lines)
    found = {(task, facts, method): score for task, facts, method, score, _ in lines}
    places = dict.fromkeys((task, facts) for task, facts, *_ in lines)
    body = [[*place, *(found.get((*place, method), "–") for method in methods)] for place in places]
    return _table(("facts about", "facts in the document", *methods), body)


def conflict(rows: Rows) -> str:
    """Bands of times asked down, methods across.

    Raises:
        ValueError: no such rows.
    """
    figure = plots.conflict(rows)
    if figure is None:
        raise ValueError("No rows by times_asked_from; run python -m benchmarks.run sweep=conflict.")
    _, head, lines = figure.tables[0]
    return _table(head, lines)


def markdown(rows: Rows) -> str:
    """All tables: quality and cost by task and set, then break-even."""
    parts = []
    for _, title, chosen in by_set(rows):
        parts += [f"**{title}**", _table(QUALITY, map(quality_cells, chosen)), _table(COST, map(cost_cells, chosen))]
    even = [row for row in rows if row["kind"] == "summary" and row["method"] == ADAPTER and row.get("break_even")]
    if even:
        parts += ["**Questions from which on the adapter is cheaper**", _table(BREAK_EVEN, map(break_even_cells, even))]
    return "\n\n".join(parts)


def by_set(rows: Rows) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(task, title of a set with its counts, its rows)"""
    summaries = [row for row in rows if row["kind"] == "summary"]
    names = dict.fromkeys((row["task"], row["set"]) for row in summaries)
    result = []
    for task, name in names:
        chosen = [row for row in summaries if (row["task"], row["set"]) == (task, name)]
        first = chosen[0]
        counts = ", ".join(f"{first[what]} {what}" for what in ("questions", "cases", "seeds"))
        title = f"{task_name(task)}, {name}: {counts}"
        fits = next((row["fits"] for row in chosen if row["method"] == CEILING), 1.0)
        if fits < 1:
            title += f"; {1 - fits:.0%} of the prompts with the documents did not fit and lost their middle"
        if any("old_answer" in row for row in chosen):
            shown = [row for row in chosen if "old_answer" in row and row["method"] in (FLOOR, CEILING, ADAPTER)]
            old = ", ".join(f"{name_of(r['method'])} {r['old_answer']:.2f}" for r in shown)
            title += f"; share of answers that were right before the document: {old}"
        result.append((task, title, chosen))
    return result


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---', *['---:'] * (len(head) - 1)])} |"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in body)])


def _range(interval: Sequence[float] | None, digits: int = 2) -> str:
    return "–" if interval is None else f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


# The command


def cost_model(checkpoint: str) -> "CostModel | None":
    """FLOPs of the checkpoint's model; None, with a warning, where it is not here any more."""
    from hypernet.base.base_model import silence_torchao_warnings

    silence_torchao_warnings()
    from benchmarks.cost import CostModel
    from hypernet.doc_to_lora import DocToLoRA

    if not Path(checkpoint).is_dir():
        log.warning("No checkpoint at %s: its rows get no FLOPs; put it there, or leave it so.", checkpoint)
        return None
    return CostModel.of(DocToLoRA.from_pretrained(checkpoint).eval().requires_grad_(False))


def write_report_rows(path: str | Path, rows: Rows) -> None:
    """The sweep's row in full, then the others with what they need to explain themselves; numbers of six digits."""
    from benchmarks.rows import write_rows

    sweep = rows[0]
    run = {key: sweep[key] for key in ("commits", "hardware", "dates")}
    write_rows(path, [_rounded(row) for row in rows], run=run)


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


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


@hydra.main(config_path="../conf/benchmark", config_name="report", version_base="1.3")
def main(cfg: DictConfig) -> None:
    from benchmarks.cells import read_cells, read_errors
    from benchmarks.page import page

    try:
        if cfg.rows:
            files = [cfg.rows] if isinstance(cfg.rows, str) else list(cfg.rows)
            rows = merged([(Path(path).stem, read_report_rows(path)) for path in files])
        else:
            cells = read_cells(cfg.input_dir)
            rows = [describe(cells, read_errors(cfg.input_dir)), *summarize(cells, cost_model=cost_model)]
            rows = _rounded(rows)
    except ValueError as error:
        sys.exit(f"benchmarks.report: {error}")
    if cfg.output and not cfg.rows:
        write_report_rows(cfg.output, rows)
    if cfg.page:
        path = Path(cfg.page)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(rows), encoding="utf-8")
        log.info("%s", path)
    print(f"{overview(rows)}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
