"""The report's figures from the rows of `benchmarks.summary`: what each shows, its panels, legend and table.

    figures, missing = all_figures(rows)

A figure whose rows are absent is left out, and `missing` says which command measures them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.summary import (
    ADAPTER,
    ALTERNATIVES,
    CEILING,
    FLOOR,
    GATED,
    GRADIENT,
    ROUTED,
    WRONG,
    Row,
    Rows,
    at_equal_length,
    is_by_length,
    name_of,
    order,
    task_name,
)
from benchmarks.svg import LINES, Axis, Point, Series, Style, chart, dots, heatmap, legend_order, short, style_of

QUESTIONS_PER_VERSION = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
CONTROLS = (FLOOR, CEILING, WRONG)
SHOWN = (FLOOR, WRONG, CEILING, "retrieval", ADAPTER, GATED, ROUTED)  # where every method takes a line of its own
# Which methods share a panel: with more lines than these none could be followed.
GROUPS = (
    (
        "One forward pass, and prompts",
        (ADAPTER, GATED, ROUTED, "doc_to_lora_in_prompt", "retrieval", "retrieval_dense", "random_adapter"),
    ),
    ("Gradient steps from nothing", ("text_lora", "distillation_oracle", "distillation_generated", ADAPTER)),
    ("Gradient steps from Doc-to-LoRA", ("warm_start_oracle", "warm_start_generated", ADAPTER)),
)
# Tasks whose documents say nothing that is asked for; the sweep's own first.
INTERFERENCE = ("interference", "locality")
# Of a document that contradicts what was learned; the sweep's own first.
CONFLICT = ("conflict_by_times_asked", "conflict")
CAPACITY = {"capacity": "Four facts about each entity", "capacity_entities": "Each fact about another entity"}
MATCH = Axis("exact match, with 95 % intervals", limits=(-0.04, 1.04), ticks=(0, 0.25, 0.5, 0.75, 1))


class Figure(NamedTuple):
    """title: a heading. text: what is shown, with units, a line per paragraph. finding: a sentence, or nothing.

    panels: drawings. legend: (name, style). tables: (caption, head, lines). tasks: whose rows it is made of.
    """

    key: str
    title: str
    text: str
    finding: str
    panels: list[str]
    legend: list[tuple[str, Style]]
    tables: list[tuple[str, Sequence[str], list[list[str]]]]
    tasks: list[str]


def all_figures(rows: Rows) -> tuple[list[Figure], list[tuple[str, str]]]:
    """(figures, what is missing): missing are (title, command)."""
    figures, missing = [], []
    for make, title, command in FIGURES:
        figure = make(rows)
        if figure:
            figures.append(figure)
        else:
            missing.append((title, f"python -m benchmarks.run {command}"))
    return figures, missing


# Accuracy


def by_set(rows: Rows) -> Figure | None:
    """Every set of every task, with the controls."""
    chosen = [row for row in rows if row["kind"] == "summary" and row["method"] in SHOWN]
    if not any(row["method"] == ADAPTER for row in chosen):
        return None
    panels, lines = [], []
    for task in dict.fromkeys(row["task"] for row in chosen):
        own = []
        for name in dict.fromkeys(row["set"] for row in chosen if row["task"] == task):
            found = {r["method"]: r for r in chosen if (r["task"], r["set"]) == (task, name)}
            own.append((name, [(m, found[m]["exact_match"], found[m]["interval"]) for m in SHOWN if m in found]))
            lines.append([task_name(task), name, *(score_text(found.get(m)) for m in SHOWN)])
        panels.append(dots(task_name(task), own, x=MATCH))
    return Figure(
        "sets",
        "Accuracy on every set",
        "Exact match of the adapter beside its controls: no context is the floor, another case's adapter must not be "
        "better than that, full context is what the adapter stands for. A set's name stands above its lines.",
        "",
        panels,
        [(name_of(m), style_of(m)) for m in legend_order(row["method"] for row in chosen)],
        [("Exact match (95 % interval)", ("task", "set", *map(name_of, SHOWN)), lines)],
        list(dict.fromkeys(row["task"] for row in chosen)),
    )


def accuracy_by_length(rows: Rows) -> Figure | None:
    chosen = [row for row in rows if is_by_length(row)]
    x = lambda row: row["document_tokens"]  # noqa: E731
    return _accuracy(
        "length",
        "Accuracy by document length",
        "Exact match by the mean length of one encyclopedia article, in tokens. Where the window is too short, full "
        "context loses the middle of the document.",
        chosen,
        x,
        Axis("document tokens", log=True),
    )


def needles(rows: Rows) -> Figure | None:
    chosen = [row for row in _slices(rows, "num_chunks") if row["task"].startswith(("needles", "niah"))]
    figure = _accuracy(
        "needles",
        "Needles in a haystack, by number of chunks",
        "Exact match on a number hidden in filler text of so many chunks, each read by itself into its own part of the "
        "adapter.",
        chosen,
        lambda row: row["attributes"]["num_chunks"],
        Axis("chunks", log=True, ticks=_values(chosen, "num_chunks")),
    )
    pairs = [
        row
        for row in _slices(rows, "num_chunks", "depth")
        if row["task"].startswith(("needles", "niah")) and row["method"] == ADAPTER
    ]
    return _with_depths(figure, pairs, chosen) if figure and pairs else figure


def _with_depths(figure: Figure, pairs: Rows, chosen: Rows) -> Figure:
    """One more panel for each task: the adapter at each depth, the controls at all depths together."""
    depths = sorted({row["attributes"]["depth"] for row in pairs})
    names = {depth: f"needle at {depth:.0%} of the text" for depth in depths}
    styles = {name: LINES[i % len(LINES)] for i, name in enumerate(names.values())}
    panels = []
    for task in dict.fromkeys(row["task"] for row in pairs):
        series = [
            Series(
                names[depth],
                [
                    Point(row["attributes"]["num_chunks"], row["exact_match"])
                    for row in pairs
                    if (row["task"], row["attributes"]["depth"]) == (task, depth)
                ],
            )
            for depth in depths
        ]
        controls = {m: [row for row in chosen if (row["task"], row["method"]) == (task, m)] for m in CONTROLS}
        for method, own in controls.items():
            series.append(Series(method, [Point(row["attributes"]["num_chunks"], row["exact_match"]) for row in own]))
        title = f"{task_name(task)}: Doc-to-LoRA by depth"
        panels.append(
            chart(
                title,
                series,
                x=Axis("chunks", log=True, ticks=_values(pairs, "num_chunks")),
                y=_plain_match(),
                styles=styles,
            )
        )
    return figure._replace(
        text=f"{figure.text} Where the adapter is shown by the needle's depth, its controls are over all depths.",
        panels=[*figure.panels, *panels],
        legend=[*figure.legend, *((name, styles[name]) for name in styles)],
    )


def composition(rows: Rows) -> Figure | None:
    chosen = [row for row in _slices(rows, "num_documents") if row["task"].startswith("composition")]
    return _accuracy(
        "composition",
        "Adapters joined: accuracy by number of documents",
        "Exact match on the same questions where each article's adapter is alone and where several are concatenated.",
        chosen,
        lambda row: row["attributes"]["num_documents"],
        Axis("documents in one adapter", log=True, ticks=_values(chosen, "num_documents")),
    )


def interference(rows: Rows) -> Figure | None:
    """What adapters do to questions that their document says nothing about: every method that has one."""
    without = ("prefix_cache", "retrieval", "retrieval_dense")
    own = [row for row in interference_rows(rows) if row["method"] not in without]
    if not any(row["method"] == ADAPTER for row in own):
        return None
    methods = legend_order(row["method"] for row in own)
    found = {(row["set"], row["method"]): row for row in own}
    sets = list(dict.fromkeys(row["set"] for row in own))
    panels, lines = [], []
    for name in sets:
        values = [(m, found[name, m]) for m in methods if (name, m) in found]
        panels.append(dots(name, [("", [(m, r["exact_match"], r["interval"]) for m, r in values])], x=MATCH))
        # What an adapter costs here is a matter of thousandths.
        lines.append([name, *(score_text(found.get((name, m)), digits=3) for m in methods)])
    scores = [
        f"{name} {found[name, ADAPTER]['exact_match']:.3f} instead of {found[name, FLOOR]['exact_match']:.3f}"
        for name in sets
        if {(name, ADAPTER), (name, FLOOR)} <= set(found)
    ]
    return Figure(
        "interference",
        "Interference: what an adapter does to other questions",
        "Exact match on questions that the adapter's document says nothing about: background knowledge, and another "
        "document in the prompt. No context, which is no adapter at all, is the most that can be hoped for. Full "
        "context puts the unrelated document into the prompt instead; the wrong document's adapter is one more that is "
        "unrelated, so it should do what the document's own does.",
        f"With Doc-to-LoRA: {'; '.join(scores)}." if scores else "",
        panels,
        [(name_of(m), style_of(m)) for m in methods],
        [("Exact match (95 % interval)", ("set", *map(name_of, methods)), lines)],
        [own[0]["task"]],
    )


def interference_rows(rows: Rows) -> list[Row]:
    """Of the sweep that is about interference where there is one, for it has more cases than the tiny one."""
    chosen = [row for row in rows if row["kind"] == "summary" and row["task"] in INTERFERENCE]
    first = min((row["task"] for row in chosen), key=INTERFERENCE.index, default="")
    return [row for row in chosen if row["task"] == first]


def capacity(rows: Rows) -> Figure | None:
    """A panel for each task, a line for each rank: checkpoints, with a wrong document of their own, and what gradient
    steps write at that rank.
    """
    chosen = [row for row in _slices(rows, "facts") if row["task"].startswith("capacity")]
    ranks = {row["method"]: row["attributes"].get("rank") for row in chosen if is_adapter(row["method"])}
    if not ranks:
        return None
    ranked = [row for row in chosen if row["method"].startswith(f"{WRONG}_rank")]
    wrong = {row["method"]: row["attributes"].get("rank") for row in ranked}
    names = {m: f"{name_of(ADAPTER)}, rank {rank:g} per chunk" if rank else name_of(m) for m, rank in ranks.items()}
    names |= {m: f"{name_of(WRONG)}, rank {rank:g} per chunk" if rank else name_of(m) for m, rank in wrong.items()}
    by_rank = lambda found: sorted(found, key=lambda m: (found[m] or 0, order(m)))  # noqa: E731
    styles = {names[m]: LINES[i % len(LINES)] for i, m in enumerate(by_rank(ranks))}
    prefix = "distillation_oracle_rank"
    written = {row["method"] for row in chosen if row["method"].startswith(prefix)}
    written = sorted(written, key=lambda m: int(m.removeprefix(prefix)))
    names |= {m: name_of(m) for m in written}
    styles |= {names[m]: (*LINES[(len(ranks) + i) % len(LINES)][:2], "6 3", False) for i, m in enumerate(written)}
    legend = list(styles.items())
    styles |= {names[m]: style_of(WRONG) for m in wrong}  # the same line for each rank: all of them lie at the bottom
    others = [m for m in CONTROLS if any(row["method"] == m for row in chosen)]
    methods = (*others, *by_rank(wrong), *by_rank(ranks), *written)
    panels, lines = [], []
    tasks = list(dict.fromkeys(row["task"] for row in chosen))
    for task in tasks:
        own = sorted((row for row in chosen if row["task"] == task), key=_facts)
        shown = [m for m in methods if any(row["method"] == m for row in own)]
        series = [Series(names.get(m, m), [_match(r, _facts) for r in own if r["method"] == m]) for m in shown]
        title = CAPACITY.get(task, task_name(task))
        x = Axis("facts in the document", log=True, ticks=sorted({_facts(row) for row in own}))
        panels.append(chart(title, series, x=x, y=MATCH, styles=styles))
        for row in sorted(own, key=lambda r: (_facts(r), methods.index(r["method"]) if r["method"] in methods else -1)):
            if row["method"] in shown:
                name = names.get(row["method"], name_of(row["method"]))
                lines.append([title, short(_facts(row)), name, score_text(row), gap_text(row)])
    head = ("task", "facts in the document", "method", "exact match (95 % interval)", "share of the gap closed")
    return Figure(
        "capacity",
        "Capacity: facts in one adapter",
        "Exact match where every fact of the document is asked for. A generated adapter has the rank once for each "
        "chunk, one written by gradient steps once in all.",
        "",
        panels,
        [
            *((name_of(m), style_of(m)) for m in others),
            *([(f"{name_of(WRONG)}, each rank", style_of(WRONG))] if wrong else []),
            *legend,
        ],
        [("Capacity", head, lines)],
        tasks,
    )


def conflict(rows: Rows) -> Figure | None:
    """A panel for each kind of fact, and in it the adapter beside its controls for each band of times asked."""
    chosen = [row for row in _slices(rows, "real_world", "times_asked_from") if row["task"] in CONFLICT]
    task = min((row["task"] for row in chosen), key=CONFLICT.index, default="")
    own = [row for row in chosen if row["task"] == task and row["method"] in SHOWN]
    if not any(row["method"] == ADAPTER for row in own):
        return None
    methods = legend_order(row["method"] for row in own)
    lowest = sorted({row["attributes"]["times_asked_from"] for row in own})
    panels, lines, found = [], [], []
    for real, title in ((0, "Invented entities"), (1, "The real world")):
        drawn = []
        for place, low in enumerate(lowest):
            band = {
                row["method"]: row
                for row in own
                if (row["attributes"]["real_world"], row["attributes"]["times_asked_from"]) == (real, low)
            }
            if not band:
                continue
            label = _band(low, lowest[place + 1] if place + 1 < len(lowest) else None)
            drawn.append((label, [(m, band[m]["exact_match"], band[m]["interval"]) for m in methods if m in band]))
            first = next(iter(band.values()))
            counts = [f"{first['attributes']['times_asked']:.0f}", str(first["questions"])]
            own_cells = [
                f"{band[ADAPTER][key]:.{digits}f}" if key in band.get(ADAPTER, {}) else "–"
                for key, digits in (("old_answer", 2), ("log_likelihood", 1))
            ]
            lines.append([title, label, *counts, *(score_text(band.get(m)) for m in methods), *own_cells])
            if ADAPTER in band:
                found.append(f"{title.lower()} {label} {band[ADAPTER]['exact_match']:.2f}")
        if drawn:
            panels.append(dots(title, drawn, x=MATCH))
    own_head = (f"{name_of(ADAPTER)}: what was learned", f"{name_of(ADAPTER)}: log-likelihood, nats")
    head = ("facts", "times asked in training", "times, mean", "questions", *map(name_of, methods), *own_head)
    return Figure(
        "conflict",
        "Conflict: the document against what was learned",
        "Exact match where the document says something else than the base model learned, by how often its training "
        "asked for the fact: exact counts, in bands of as many facts each. What was never asked about contradicts "
        "nothing. Training draws all its questions alike, so how often it asked for two facts differs by chance alone.",
        f"{name_of(ADAPTER)}: {'; '.join(found)}.",
        panels,
        [(name_of(m), style_of(m)) for m in methods],
        [("Exact match (95 % interval)", head, lines)],
        [task],
    )


def _band(low: float, following: float | None) -> str:
    if not low:
        return "never asked"
    return f"asked {low:g} to {following - 1:g} times" if following else f"asked {low:g} times or more"


def is_adapter(method: str) -> bool:
    """Whether it is Doc-to-LoRA, of the shipped checkpoint or of one of several ranks."""
    return method == ADAPTER or method.startswith(f"{ADAPTER}_rank")


def _facts(row: Row) -> float:
    return row["attributes"]["facts"]


def _accuracy(key: str, title: str, text: str, chosen: Rows, x: Callable[[Row], float], axis: Axis) -> Figure | None:
    """Panels by group of methods, each with the controls; a task that comes in variants has panels for each."""
    if not any(row["method"] == ADAPTER for row in chosen):
        return None
    panels, shown = [], set()
    tasks = list(dict.fromkeys(row["task"] for row in chosen))
    for task in tasks:
        own = [row for row in chosen if row["task"] == task]
        same = _same_answers(own)
        for name, group in _groups_of({row["method"] for row in own} - {same}):
            series = [
                Series(m, [_match(r, x) for r in sorted((r for r in own if r["method"] == m), key=x)]) for m in group
            ]
            shown.update(group)
            panels.append(chart(f"{task_name(task)}: {name}" if len(tasks) > 1 else name, series, x=axis, y=MATCH))
        if same:
            text += f" The {name_of(same)} answers as full context does."
    values = sorted({x(row) for row in chosen})
    columns = [short(value) for value in values]
    lines = []
    for task in tasks:
        for method in legend_order(row["method"] for row in chosen if row["task"] == task):
            found = {x(r): r for r in chosen if (r["task"], r["method"]) == (task, method)}
            name = f"{task_name(task)}, {name_of(method)}" if len(tasks) > 1 else name_of(method)
            lines.append([name, *(score_text(found.get(value)) for value in values)])
    return Figure(
        key,
        title,
        text,
        _trend([row for row in chosen if row["task"] == tasks[0]], x, axis.label),
        panels,
        [(name_of(m), style_of(m)) for m in legend_order(shown)],
        [(f"Exact match (95 % interval) by {axis.label}", ("method", *columns), lines)],
        tasks,
    )


def _groups_of(methods: set[str]) -> list[tuple[str, list[str]]]:
    """(panel's name, its methods), the controls in each; methods that are in no group are put into the first."""
    known = {m for _, group in GROUPS for m in group} | set(CONTROLS)
    result = []
    for place, (name, group) in enumerate(GROUPS):
        own = [m for m in group if m in methods]
        if place == 0:
            own += sorted(methods - known)
        if set(own) - {ADAPTER} or (place == 0 and own):
            result.append((name, sorted({*own, *(m for m in CONTROLS if m in methods)}, key=order)))
    return result


def _same_answers(rows: Rows) -> str | None:
    """prefix_cache, if it scores like full context throughout and so would hide behind it."""
    scores = {m: [(r["set"], r["exact_match"]) for r in rows if r["method"] == m] for m in (CEILING, "prefix_cache")}
    return (
        "prefix_cache" if scores["prefix_cache"] and sorted(scores[CEILING]) == sorted(scores["prefix_cache"]) else None
    )


def _trend(rows: Rows, x: Callable[[Row], float], label: str) -> str:
    parts = []
    for method in (ADAPTER, CEILING, "retrieval"):
        own = sorted((row for row in rows if row["method"] == method), key=x)
        if len(own) > 1:
            parts.append(f"{name_of(method)} {own[0]['exact_match']:.2f} and {own[-1]['exact_match']:.2f}")
            ends = f"At {short(x(own[0]), digits=2)} and at {short(x(own[-1]), digits=2)} {label}"
    return f"{ends}: {'; '.join(parts)}." if parts else ""


# Costs


def cost_by_length(rows: Rows) -> Figure | None:
    chosen = [row for row in rows if is_by_length(row)]
    columns = (
        ("Preparing a document", "milliseconds, once per document", lambda r: _times(r["prepare_s"], 1000)),
        ("Time to first token", "milliseconds, per question", lambda r: _times(r["first_token_s"], 1000)),
        ("A whole answer", "milliseconds, at equal answer length", lambda r: _times(at_equal_length(r), 1000)),
    )
    text = "Medians of questions that are asked one by one, by the document's length."
    return _costs("cost", "Cost by document length", text, chosen, columns)


def memory_by_length(rows: Rows) -> Figure | None:
    chosen = [row for row in rows if is_by_length(row)]
    columns = (
        ("Kept between questions", "KiB per document", lambda r: _times(r["stored_bytes"], 1 / 1024)),
        ("Peak while preparing", "MiB beyond the model's", lambda r: _times(r["prepare_peak_bytes"], 2**-20)),
        (
            "Peak while answering",
            "MiB beyond the model's and what is kept",
            lambda r: _times(r["answer_peak_bytes"], 2**-20),
        ),
    )
    text = (
        "What is kept of a document (adapter, keys and values, index or text), and the most held at a time in tensors. "
        "No context keeps nothing and is not drawn where a logarithmic axis has no 0."
    )
    return _costs("memory", "Memory by document length", text, chosen, columns)


def _costs(
    key: str, title: str, text: str, chosen: Rows, columns: Sequence[tuple[str, str, Callable]]
) -> Figure | None:
    # Adapters of one size cost the same: one stands for its controls, one gradient method for its like.
    shown = (
        FLOOR,
        CEILING,
        "prefix_cache",
        "retrieval",
        "retrieval_dense",
        ADAPTER,
        WRONG,
        "text_lora",
        "distillation_generated",
    )
    panels, used = [], set()
    for name, unit, value in columns:
        series = []
        for method in shown:
            own = sorted((r for r in chosen if r["method"] == method), key=lambda r: r["document_tokens"])
            points = [Point(r["document_tokens"], value(r)) for r in own if value(r)]
            if points:
                series.append(Series(method, points))
                used.add(method)
        if series:
            panels.append(chart(name, series, x=Axis("document tokens", log=True), y=Axis(unit, log=True)))
    if not panels:
        return None
    values = sorted({row["document_tokens"] for row in chosen})
    tables = [
        (
            f"{name}, {unit}, by document tokens",
            ("method", *map(short, values)),
            [
                [
                    name_of(m),
                    *(
                        _number(next((value(r) for r in chosen if (r["method"], r["document_tokens"]) == (m, v)), None))
                        for v in values
                    ),
                ]
                for m in legend_order(row["method"] for row in chosen)
            ],
        )
        for name, unit, value in columns
    ]
    left = {row["method"] for row in chosen} - used
    if left:
        text += f" In the table only: {', '.join(name_of(m) for m in legend_order(left))}."
    return Figure(
        key, title, text, "", panels, [(name_of(m), style_of(m)) for m in legend_order(used)], tables, ["encyclopedia"]
    )


def pareto(rows: Rows) -> Figure | None:
    chosen = [row for row in rows if is_by_length(row) and at_equal_length(row) is not None]
    if not any(row["method"] == ADAPTER for row in chosen):
        return None
    names = sorted({(row["document_tokens"], row["set"]) for row in chosen if row["method"] == ADAPTER})
    panels, lines, used = [], [], set()
    for number in (1, 32):
        for _, name in dict.fromkeys((names[0], names[len(names) // 2], names[-1])):
            own = [row for row in chosen if row["set"] == name]
            cost = lambda r, n=number: 1000 * (at_equal_length(r) + (r["prepare_s"] or 0) / n)  # noqa: E731
            series = [Series(r["method"], [_match(r, cost)], joined=False) for r in own]
            used.update(row["method"] for row in own)
            title = f"{name}, {number} question{'s' if number > 1 else ''} per document"
            panels.append(chart(title, series, x=Axis("milliseconds per question", log=True), y=MATCH))
            lines += [[name, str(number), name_of(r["method"]), short(cost(r)), score_text(r)] for r in own]
    return Figure(
        "pareto",
        "Quality against cost",
        "Exact match by the milliseconds of one question and its share of the preparation, where a document is asked "
        "1 or 32 questions. Better is up and left.",
        "",
        panels,
        [(name_of(m), style_of(m)) for m in legend_order(used)],
        [
            (
                "Quality and cost",
                ("set", "questions per document", "method", "ms per question", "exact match (95 % interval)"),
                lines,
            )
        ],
        ["encyclopedia"],
    )


def curves(rows: Rows) -> Figure | None:
    """Gradient methods over their steps, with the methods that take none as flat lines."""
    chosen = [row for row in rows if is_by_length(row) and row.get("curve")]
    if not chosen:
        return None
    names = sorted({(row["document_tokens"], row["set"]) for row in chosen})
    panels, lines, used = [], [], set()
    for _, name in dict.fromkeys((names[0], names[len(names) // 2], names[-1])):
        own = [row for row in chosen if row["set"] == name]
        steps = [point["step"] for point in own[0]["curve"]]
        flat = [
            row for row in rows if is_by_length(row) and row["set"] == name and row["method"] in (ADAPTER, *CONTROLS)
        ]
        series = [
            *(Series(r["method"], [Point(s, r["exact_match"]) for s in (steps[0], steps[-1])]) for r in flat),
            *(
                Series(
                    r["method"],
                    [Point(p["step"], p["exact_match"], *(p["interval"] or (None, None))) for p in r["curve"]],
                )
                for r in own
            ),
        ]
        used.update(s.key for s in series)
        panels.append(chart(name, series, x=Axis("gradient steps", ticks=steps), y=MATCH))
        for row in own:
            for p in row["curve"]:
                seconds = "–" if p["seconds"] is None else short(p["seconds"])
                lines.append([name, name_of(row["method"]), str(p["step"]), seconds, score_text(p)])
    return Figure(
        "curves",
        "Quality over gradient steps",
        "Exact match after so many steps on one document; methods without steps are flat lines. All other figures show "
        "the last step. Seconds are in the table.",
        _seconds_found(rows),
        panels,
        [(name_of(m), style_of(m)) for m in legend_order(used)],
        [
            (
                "Quality over gradient steps",
                ("set", "method", "steps", "seconds for one document", "exact match (95 % interval)"),
                lines,
            )
        ],
        ["encyclopedia"],
    )


def _seconds_found(rows: Rows) -> str:
    own = [r for r in rows if is_by_length(r) and r["method"] in (ADAPTER, *GRADIENT) and r["prepare_s"]]
    generated = [r for r in own if r["method"] == ADAPTER]
    trained = [r["prepare_s"] for r in own if r["method"] in GRADIENT]
    if not generated or not trained:
        return ""
    ours = [r["prepare_s"] for r in generated]
    return (
        f"Doc-to-LoRA takes {short(1000 * min(ours))} to {short(1000 * max(ours))} ms for a document, all steps of a "
        f"gradient method {short(1000 * min(trained))} to {short(1000 * max(trained))} ms."
    )


# Break-even


BREAK_EVEN = (
    "set",
    "document tokens",
    *(f"{name_of(m)}, {what}" for m in ALTERNATIVES for what in ("by the clock (95 %)", "in FLOPs")),
)


def break_even_cells(row: Row) -> list[str]:
    cells = [row["set"], short(row["document_tokens"])]
    for method in ALTERNATIVES:
        found = row["break_even"].get(method, {})
        cells += [_questions(found, "seconds"), _questions(found, "flops")]
    return cells


def _questions(found: Row, what: str) -> str:
    if what not in found:
        return "–"
    text = _or_never(found[what])
    interval = found.get(f"{what}_interval")
    if interval is None or interval == [found[what]] * 2:
        return text
    low, high = map(_or_never, interval)
    return f"{text} ({low} to {high})" if low != high else text


def _or_never(value: float | None) -> str:
    return "never" if value is None else short(value, digits=2)


def break_even(rows: Rows) -> Figure | None:
    """The adapter's cost over each alternative's, by document length and questions per version of the document."""
    surface = [row for row in rows if row["kind"] == "surface"]
    even = [row for row in rows if row["kind"] == "summary" and row["task"] == "encyclopedia" and row.get("break_even")]
    even = [row for row in even if row["method"] == ADAPTER]
    if not surface or not even:
        return None
    lengths = sorted({row["num_tokens"] for row in surface})
    costs = {(row["method"], row["num_tokens"]): row for row in surface}
    longest = surface[0]["longest_measured"]
    measured = sum(length <= longest for length in lengths)
    panels, tables = [], []
    for unit, what in (("seconds", "by the clock"), ("flops", "in FLOPs")):
        for other in ALTERNATIVES:
            pairs = [(costs.get((ADAPTER, n)), costs.get((other, n))) for n in lengths]
            if not all(a and b and a[unit] and b[unit] for a, b in pairs):
                continue
            ratios = [
                [_amortised(a[unit], number) / _amortised(b[unit], number) for a, b in pairs]
                for number in QUESTIONS_PER_VERSION
            ]
            panels.append(
                heatmap(
                    f"Against {name_of(other)}, {what}",
                    ratios,
                    columns=[f"{n:,}" for n in lengths],
                    rows=[f"{n:,g}" for n in QUESTIONS_PER_VERSION],
                    x_label="document tokens",
                    y_label="questions per version of the document",
                    mark_after=measured if unit == "seconds" and 0 < measured < len(lengths) else None,
                )
            )
            tables.append(
                (
                    f"The adapter's cost over that of {name_of(other)}, {what}, by document tokens",
                    ("questions per version", *(f"{n:,}" for n in lengths)),
                    [
                        [f"{n:,g}", *(short(ratio) for ratio in line)]
                        for n, line in zip(QUESTIONS_PER_VERSION, ratios, strict=True)
                    ],
                )
            )
    caption = "Questions about one version of a document from which on the adapter is cheaper, measured set by set"
    return Figure(
        "break-even",
        "Break-even: when does an adapter pay?",
        _how_counted(surface[0], longest),
        even_found(even),
        panels,
        [],
        [(caption, BREAK_EVEN, [break_even_cells(row) for row in even]), *tables],
        ["encyclopedia"],
    )


def _how_counted(row: Row, longest: float) -> str:
    read = (
        "A cell is the adapter's cost per question over the alternative's, with the preparation shared among the "
        "questions asked before the document changes (0.5: it changes twice per question). Blue, below 1: the adapter "
        "is cheaper. The thick line is the break-even."
    )
    counted = (
        f"Questions have {row['question_tokens']} tokens and answers {row['answer_tokens']}, whatever the method. "
        "FLOPs follow from the model's shapes as if its window had any length; the tests hold them to PyTorch's counter"
    )
    if row["counted_over_formula"]:
        low, high = row["counted_over_formula"]
        counted += (
            f", and these rows count {low:.2f} to {high:.2f} times as many for turning a document into an adapter"
        )
    counted += (
        ". Seconds are fitted to the measured rows: for each method a fixed time and a time per FLOP, of preparing, of "
        "the first token and of each further one"
    )
    if row["fit_error"] is not None:
        counted += f"; the fit is off by {row['fit_error']:.1%} (median)"
    return f"{read}\n{counted}. Beyond {short(longest)} tokens, right of the dashed line, they are extrapolated."


def even_found(even: Rows) -> str:
    parts = []
    for other in ALTERNATIVES:
        found = [row["break_even"].get(other, {}) for row in even]
        clock = [f["seconds"] for f in found if "seconds" in f]
        flops = [f["flops"] for f in found if "flops" in f]
        if clock:
            said = _span(clock)
            parts.append(f"against {name_of(other)} {said}" + (f" ({_span(flops)} in FLOPs)" if flops else ""))
    return f"By the clock, over the encyclopedia's sets: {'; '.join(parts)}." if parts else ""


def _span(values: Sequence[float | None]) -> str:
    """ "3 to 12 questions on 4 sets, never on 2" """
    finite = sorted(v for v in values if v is not None)
    if not finite:
        return "never"
    low, high = (short(value, digits=2) for value in (finite[0], finite[-1]))
    ends = low if low == high else f"{low} to {high}"
    never = len(values) - len(finite)
    return f"after {ends} questions" + (f" on {len(finite)} sets, never on {never}" if never else "")


def _amortised(costs: Sequence[float], number: float) -> float:
    prepare, question = costs
    return question + prepare / number


FIGURES: tuple[tuple[Callable[[Rows], Figure | None], str, str], ...] = (
    (by_set, "Accuracy on every set", "sweep=tiny"),
    (accuracy_by_length, "Accuracy by document length", "sweep=tiny"),
    (
        needles,
        "Needles in a haystack, by number of chunks",
        "sweep=niah",
    ),
    (
        composition,
        "Adapters joined: accuracy by number of documents",
        "sweep=composition",
    ),
    (
        interference,
        "Interference: what an adapter does to other questions",
        "sweep=interference",
    ),
    (
        capacity,
        "Capacity: facts in one adapter",
        "sweep=capacity",
    ),
    (
        conflict,
        "Conflict: the document against what was learned",
        "sweep=conflict",
    ),
    (cost_by_length, "Cost by document length", "sweep=tiny"),
    (memory_by_length, "Memory by document length", "sweep=tiny"),
    (pareto, "Quality against cost", "sweep=tiny"),
    (break_even, "Break-even: when does an adapter pay?", "sweep=tiny"),
    (curves, "Quality over gradient steps", "sweep=tiny"),
)


# Parts


def _slices(rows: Rows, *by: str) -> list[Row]:
    return [row for row in rows if row["kind"] == "slice" and row["by"] == list(by)]


def _values(rows: Rows, key: str) -> list[float]:
    return sorted({row["attributes"][key] for row in rows})


def _match(row: Row, x: Callable[[Row], float]) -> Point:
    return Point(x(row), row["exact_match"], *(row["interval"] or (None, None)))


def _plain_match() -> Axis:
    return MATCH._replace(label="exact match")


def score_text(row: Row | None, *, digits: int = 2) -> str:
    """Exact match with its interval, for a table."""
    if row is None:
        return "–"
    interval = f" ({row['interval'][0]:.{digits}f} to {row['interval'][1]:.{digits}f})" if row.get("interval") else ""
    return f"{row['exact_match']:.{digits}f}{interval}"


def gap_text(row: Row) -> str:
    return f"{row['gap_closed']:.2f}" if row.get("gap_closed") is not None else "–"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _number(value: float | None) -> str:
    return "–" if value is None else short(value)


def _plain(name: str) -> str:
    return name.replace("_", " ")
