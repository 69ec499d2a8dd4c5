"""The report's figures from its rows: what each shows, its panels, legend and tables.

    figures, missing = all_figures(rows)

A figure whose rows are absent is left out, and `missing` says which command measures them.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from benchmarks.measuring.break_even import at_equal_length, is_by_length
from benchmarks.measuring.cost import amortised
from benchmarks.measuring.rows import Row, Rows
from benchmarks.report.names import (
    ADAPTER,
    ALTERNATIVES,
    CEILING,
    CONFLICT,
    CONTROLS,
    FLOOR,
    GATED,
    INTERFERENCE,
    ROUTED,
    TEXTS,
    WRONG,
    name_of,
    order,
    short,
    task_name,
)
from benchmarks.report.plots import (
    LINES,
    MATCH,
    Axis,
    Legend,
    Panel,
    Point,
    Ratios,
    Series,
    Style,
    legend_order,
    style_of,
)
from benchmarks.report.tables import METHOD, Cell, Table, break_even_table, number, scaled, score_cells, score_table
from hypernet.adapters.break_even import Costs

QUESTIONS_PER_VERSION = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
SHOWN = (FLOOR, WRONG, CEILING, "retrieval", ADAPTER, GATED, ROUTED)  # where every method takes a line of its own
# Which methods share a panel, by its name: with more lines than these none could be followed.
GROUPS = {name: set(methods) for name, methods in TEXTS["groups"].items()}


class Figure(NamedTuple):
    """key: in `figures` of texts.yaml. tasks: whose rows it is made of. notes: what the rows add to its text."""

    key: str
    panels: Sequence[Panel | Ratios]
    legend: Legend
    tables: Sequence[Table]
    tasks: Sequence[str]
    notes: str = ""

    @property
    def title(self) -> str:
        return TEXTS["figures"][self.key]["title"]

    @property
    def paragraphs(self) -> list[str]:
        return [*TEXTS["figures"][self.key]["text"].splitlines(), *([self.notes] if self.notes else [])]


def all_figures(rows: Rows) -> tuple[list[Figure], list[tuple[str, str]]]:
    """(figures, what is missing): missing are (title, command)."""
    made = {key: FIGURES[key](rows) for key in TEXTS["figures"]}
    missing = [TEXTS["figures"][key] for key, figure in made.items() if not figure]
    commands = [(text["title"], f"python -m benchmarks.run sweep={text['sweep']}") for text in missing]
    return [figure for figure in made.values() if figure], commands


# Accuracy


def by_set(rows: Rows) -> Figure | None:
    """Every set of every task, with the controls."""
    chosen = [row for row in rows if row["kind"] == "summary" and row["method"] in SHOWN]
    if not _has_adapter(chosen):
        return None
    panels = [_groups(task_name(t), _of(chosen, task=t), lambda row: row["set"]) for t in _values(chosen, "task")]
    table = score_table("Exact match", chosen, {"task": lambda r: task_name(r["task"]), "set": lambda r: r["set"]})
    return Figure("sets", panels, _legend(_values(chosen, "method")), [table], _values(chosen, "task"))


def accuracy_by_length(rows: Rows) -> Figure | None:
    chosen = [row for row in rows if is_by_length(row)]
    return _accuracy("length", chosen, lambda r: r["document_tokens"], Axis("document tokens", log=True))


def needles(rows: Rows) -> Figure | None:
    own = [row for row in rows if row.get("task", "").startswith(("needles", "niah"))]
    chosen, by_depth = _slices(own, "num_chunks"), _of(_slices(own, "num_chunks", "depth"), method=ADAPTER)
    x = Axis("chunks", log=True, ticks=_attribute_values(chosen, "num_chunks"))
    chunks = lambda row: row["attributes"]["num_chunks"]  # noqa: E731
    figure = _accuracy("needles", chosen, chunks, x)
    if not figure or not by_depth:
        return figure
    depths = _attribute_values(by_depth, "depth")
    styles = {d: (f"needle at {d:.0%} of the text", LINES[i % len(LINES)]) for i, d in enumerate(depths)}
    panels = []
    for task in _values(by_depth, "task"):
        own = _of(by_depth, task=task)
        series = [
            Series(name, style, _points([r for r in own if r["attributes"]["depth"] == depth], chunks))
            for depth, (name, style) in styles.items()
        ]
        series += [_series(m, _points(_of(chosen, task=task, method=m), chunks)) for m in CONTROLS]
        panels.append(Panel(f"{task_name(task)}: Doc-to-LoRA by depth", series, x, MATCH))
    columns = {"chunks": lambda r: short(chunks(r)), "depth": lambda r: f"{r['attributes']['depth']:.0%}"}
    return figure._replace(
        panels=[*figure.panels, *panels],
        legend=[*figure.legend, *styles.values()],
        tables=[*figure.tables, score_table("Exact match by depth", by_depth, _with_task(by_depth, columns))],
    )


def composition(rows: Rows) -> Figure | None:
    chosen = _slices(rows, "num_documents")
    chosen = [row for row in chosen if row["task"].startswith(("composition", "many_documents"))]
    x = Axis("documents in one adapter", log=True, ticks=_attribute_values(chosen, "num_documents"))
    return _accuracy("composition", chosen, lambda row: row["attributes"]["num_documents"], x)


def memory_growth(rows: Rows) -> Figure | None:
    """How the tiers of a memory answer as it grows."""
    chosen = [row for row in rows if row["kind"] == "summary" and row["task"].startswith("memory_growth")]
    if not chosen:
        return None
    axis = Axis("memories of one user", log=True, ticks=_attribute_values(chosen, "num_memories"))
    methods = legend_order(_values(chosen, "method"))
    lines = [_points(_of(chosen, method=m), lambda row: row["attributes"]["num_memories"]) for m in methods]
    panel = Panel("", [_series(m, points) for m, points in zip(methods, lines, strict=True)], axis, MATCH)
    return Figure("memory_growth", [panel], _legend(methods), [], ["memory_growth"])


def interference(rows: Rows) -> Figure | None:
    """What adapters do to questions that their document says nothing about: every method that has one."""
    without = ("prefix_cache", "retrieval", "retrieval_dense")
    own = _of_first((row for row in rows if row["kind"] == "summary"), INTERFERENCE)
    own = [row for row in own if row["method"] not in without]
    if not _has_adapter(own):
        return None
    panels = [_groups(name, _of(own, set=name), lambda row: "") for name in _values(own, "set")]
    # What an adapter costs here is a matter of thousandths.
    table = score_table("Exact match", own, {"set": lambda row: row["set"]}, digits=3)
    return Figure("interference", panels, _legend(_values(own, "method")), [table], [own[0]["task"]])


def capacity(rows: Rows) -> Figure | None:
    """A panel for each task, a line for each rank: of checkpoints, of each one's wrong document, of gradient steps."""
    shown = (*CONTROLS, ADAPTER, "distillation_oracle")
    chosen = [row for row in _slices(rows, "facts") if row["task"].startswith("capacity")]
    chosen = [row for row in chosen if row["method"].partition("_rank")[0] in shown]
    methods = legend_order(_values(chosen, "method"))
    lines = [m for m in methods if m.startswith((ADAPTER, "distillation_oracle"))]
    if not any(m.startswith(ADAPTER) for m in lines):
        return None
    styles = {m: style_of(m) for m in methods} | {m: LINES[i % len(LINES)] for i, m in enumerate(lines)}
    styles |= {m: styles[m]._replace(dashes="--", filled=False) for m in lines if not m.startswith(ADAPTER)}
    panels, facts = [], lambda row: row["attributes"]["facts"]
    for task in _values(chosen, "task"):
        own = sorted(_of(chosen, task=task), key=facts)
        series = [Series(name_of(m), styles[m], _points(_of(own, method=m), facts)) for m in methods]
        x = Axis("facts in the document", log=True, ticks=_attribute_values(own, "facts"))
        panels.append(Panel(task_name(task), [one for one in series if one.points], x, MATCH))
    chosen.sort(key=lambda row: (row["task"], facts(row), order(row["method"])))
    columns = {"task": lambda row: task_name(row["task"]), "facts": lambda row: short(facts(row))}
    legend = [(name_of(m), styles[m]) for m in methods]
    return Figure("capacity", panels, legend, [score_table("Capacity", chosen, columns)], _values(chosen, "task"))


def conflict(rows: Rows) -> Figure | None:
    """A panel for each kind of fact, and in it the adapter and its controls for each band of times asked."""
    own = _of_first(_slices(rows, "real_world", "times_asked_from"), CONFLICT)
    own = [row for row in own if row["method"] in SHOWN]
    if not _has_adapter(own):
        return None
    own.sort(key=lambda r: (r["attributes"]["real_world"], r["attributes"]["times_asked_from"], order(r["method"])))
    band, facts = bands(own), lambda row: ("Invented entities", "The real world")[int(row["attributes"]["real_world"])]
    names = dict.fromkeys(map(facts, own))
    panels = [_groups(name, [row for row in own if facts(row) == name], band) for name in names]
    columns = {"facts": facts, "times asked in training": band}
    more = {
        "times, mean": lambda row: f"{row['attributes']['times_asked']:.0f}",
        "questions": lambda row: str(row["questions"]),
        "still what was learned": number("old_answer"),
        "log-likelihood, nats": number("log_likelihood", 1),
    }
    by_adapter = Table.of(name_of(ADAPTER), _of(own, method=ADAPTER), columns | more)
    tables = [score_table("Exact match", own, columns), by_adapter]
    return Figure("conflict", panels, _legend(_values(own, "method")), tables, [own[0]["task"]])


def bands(rows: Rows) -> Callable[[Row], str]:
    """Row → name of its band of times asked, "asked 260 to 315 times"."""
    lowest = _attribute_values(rows, "times_asked_from")

    def name(row: Row) -> str:
        low = row["attributes"]["times_asked_from"]
        following = next((value for value in lowest if value > low), None)
        if not low:
            return "never asked"
        return f"asked {low:g} to {following - 1:g} times" if following else f"asked {low:g} times or more"

    return name


def _accuracy(key: str, chosen: Rows, x: Callable[[Row], float], axis: Axis) -> Figure | None:
    """Panels by group of methods, each with the controls; a task that comes in variants has panels for each."""
    if not _has_adapter(chosen):
        return None
    panels, shown, tasks, notes = [], set(), _values(chosen, "task"), ""
    for task in tasks:
        own = sorted(_of(chosen, task=task), key=x)
        methods = set(_values(own, "method"))
        scores = {m: [(r["set"], r["exact_match"]) for r in _of(own, method=m)] for m in (CEILING, "prefix_cache")}
        if scores["prefix_cache"] and scores["prefix_cache"] == scores[CEILING]:  # it would hide behind full context
            methods.remove("prefix_cache")
            notes = f"The {name_of('prefix_cache')} answers as full context does."
        groups = _groups_of(methods)
        for name, group in groups:
            panel = name if len(tasks) == 1 else task_name(task) + (f": {name}" if len(groups) > 1 else "")
            panels.append(Panel(panel, [_series(m, _points(_of(own, method=m), x)) for m in group], axis, MATCH))
            shown.update(group)
    columns = _with_task(chosen, {axis.label: lambda row: short(x(row))})
    place = lambda row: (task_name(row["task"]), x(row), order(row["method"]))  # noqa: E731
    table = score_table(f"Exact match by {axis.label}", sorted(chosen, key=place), columns)
    return Figure(key, panels, _legend(shown), [table], tasks, notes)


def _groups_of(methods: set[str]) -> list[tuple[str, list[str]]]:
    """(panel's name, its methods), the controls in each; methods that are in no group are put into the first."""
    result, left = [], methods - set(CONTROLS) - set().union(*GROUPS.values())
    for name, group in GROUPS.items():
        own = methods & group | left
        if own - {ADAPTER} or (own and not result):
            result.append((name, sorted(own | methods & set(CONTROLS), key=order)))
        left = set()
    return result


# Costs


def cost_by_length(rows: Rows) -> Figure | None:
    columns = (
        ("Preparing a document", "milliseconds, once per document", "prepare_s", 1000),
        ("Time to first token", "milliseconds, per question", "first_token_s", 1000),
        ("A whole answer", "milliseconds, at equal answer length", "answer_s", 1000),
    )
    return _costs("cost", rows, columns)


def memory_by_length(rows: Rows) -> Figure | None:
    columns = (
        ("Kept between questions", "KiB per document", "stored_bytes", 2**-10),
        ("Peak while preparing", "MiB on top of the model", "prepare_peak_bytes", 2**-20),
        ("Peak while answering", "MiB on top of model and kept", "answer_peak_bytes", 2**-20),
    )
    return _costs("memory", rows, columns)


def _costs(key: str, rows: Rows, columns: Sequence[tuple[str, str, str, float]]) -> Figure | None:
    """A panel for each of (title, unit, key in the rows, factor)."""
    chosen = [{**row, "answer_s": at_equal_length(row)} for row in rows if is_by_length(row)]
    chosen.sort(key=lambda row: (row["document_tokens"], order(row["method"])))
    panels, used, x = [], set(), Axis("document tokens", log=True)
    for title, unit, value, factor in columns:
        drawn = [row for row in chosen if row["method"] in TEXTS["costed"] and row[value]]
        methods = legend_order(_values(drawn, "method"))
        points = {m: [Point(r["document_tokens"], factor * r[value]) for r in _of(drawn, method=m)] for m in methods}
        panels += [Panel(title, [_series(m, points[m]) for m in methods], x, Axis(unit, log=True))] if drawn else []
        used.update(methods)
    if not panels:
        return None
    left = legend_order(m for m in _values(chosen, "method") if m not in used)
    notes = f"In the table only: {', '.join(map(name_of, left))}." if left else ""
    cells: dict[str, Cell] = {"document tokens": scaled("document_tokens"), **METHOD}
    cells |= {f"{title}, {unit}": scaled(value, factor) for title, unit, value, factor in columns}
    table = Table.of(TEXTS["figures"][key]["title"], chosen, cells)
    return Figure(key, panels, _legend(used), [table], ["encyclopedia"], notes)


def pareto(rows: Rows) -> Figure | None:
    chosen = [row for row in rows if is_by_length(row) and at_equal_length(row) is not None]
    if not _has_adapter(chosen):
        return None
    panels, lines = [], []
    for asked in (1, 32):
        for name in _three_lengths(_of(chosen, method=ADAPTER)):
            own = _of(chosen, set=name)
            cost = lambda r, n=asked: 1000 * (at_equal_length(r) + (r["prepare_s"] or 0) / n)  # noqa: E731
            series = [_series(r["method"], _points([r], cost), joined=False) for r in own]
            panel = f"{name}, {asked} question{'s' if asked > 1 else ''} per document"
            panels.append(Panel(panel, series, Axis("milliseconds per question", log=True), MATCH))
            lines += [[name, str(asked), name_of(r["method"]), short(cost(r)), *_score(r)] for r in own]
    head = ("set", "questions per document", "method", "ms per question", "exact match", "95 % interval")
    table = Table("Quality and cost", head, lines)
    return Figure("pareto", panels, _legend(_values(chosen, "method")), [table], ["encyclopedia"])


def curves(rows: Rows) -> Figure | None:
    """Gradient methods over their steps, with the methods that take none as flat lines."""
    chosen = [row for row in rows if is_by_length(row) and row.get("curve")]
    if not chosen:
        return None
    panels, lines, used = [], [], set()
    for name in _three_lengths(chosen):
        own = _of(chosen, set=name)
        steps = sorted({point["step"] for row in own for point in row["curve"]})
        flat = [r for r in _of(filter(is_by_length, rows), set=name) if r["method"] in (ADAPTER, *CONTROLS)]
        series = [_series(r["method"], [Point(s, r["exact_match"]) for s in (steps[0], steps[-1])]) for r in flat]
        series += [_series(r["method"], _points(r["curve"], lambda point: point["step"])) for r in own]
        used.update(row["method"] for row in (*flat, *own))
        panels.append(Panel(name, series, Axis("gradient steps", ticks=steps), MATCH))
        for row in own:
            for point in row["curve"]:
                seconds = scaled("seconds")(point)
                lines.append([name, name_of(row["method"]), str(point["step"]), seconds, *_score(point)])
    head = ("set", "method", "steps", "seconds for one document", "exact match", "95 % interval")
    return Figure(
        "curves", panels, _legend(used), [Table("Quality over gradient steps", head, lines)], ["encyclopedia"]
    )


def break_even(rows: Rows) -> Figure | None:
    """The adapter's cost over each alternative's, by document length and questions per version of the document."""
    surface = [row for row in rows if row["kind"] == "surface"]
    even = [r for r in rows if r["kind"] == "summary" and r["task"] == "encyclopedia" and r["method"] == ADAPTER]
    even = [row for row in even if row.get("break_even")]
    if not surface or not even:
        return None
    costs = {(row["method"], row["num_tokens"]): row for row in surface}
    lengths, longest = sorted({row["num_tokens"] for row in surface}), surface[0]["longest_measured"]
    measured = sum(length <= longest for length in lengths)
    panels, tables = [], [break_even_table(even)]
    for unit, what in (("seconds", "by the clock"), ("flops", "in FLOPs")):
        ratios = {}
        for other in ALTERNATIVES:
            pairs = [(costs.get((ADAPTER, n)), costs.get((other, n))) for n in lengths]
            if all(a and b and a[unit] and b[unit] for a, b in pairs):
                share = lambda row, asked, unit=unit: amortised(Costs(*row[unit]), asked)  # noqa: E731
                ratios[other] = [[share(a, n) / share(b, n) for a, b in pairs] for n in QUESTIONS_PER_VERSION]
        for other, table in ratios.items():
            axes = {"x": Axis("document tokens"), "y": Axis("questions per version of the document")}
            labels = {"columns": [f"{n:,}" for n in lengths], "rows": [f"{n:,g}" for n in QUESTIONS_PER_VERSION]}
            mark = measured if unit == "seconds" and 0 < measured < len(lengths) else None
            panels.append(Ratios(f"Against {name_of(other)}, {what}", table, **labels, **axes, mark_after=mark))
        lines = [
            [f"{length:,}", f"{asked:,g}", *(short(table[i][j]) for table in ratios.values())]
            for j, length in enumerate(lengths)
            for i, asked in enumerate(QUESTIONS_PER_VERSION)
        ]
        head = ("document tokens", "questions per version", *(f"over {name_of(m)}" for m in ratios))
        tables += [Table(f"The adapter's cost over the alternative's, {what}", head, lines)] if ratios else []
    return Figure("break-even", panels, [], tables, ["encyclopedia"], _how_counted(surface[0]))


def _how_counted(row: Row) -> str:
    counted, fit = row["counted_over_formula"], row["fit_error"]
    more = (
        f"; for internalizing, these rows count {counted[0]:.2f} to {counted[1]:.2f} times as many" if counted else ""
    )
    off = f"; the fit of the seconds is off by {fit:.1%} (median)" if fit is not None else ""
    asked = f"Questions have {row['question_tokens']} tokens and answers {row['answer_tokens']}, whatever the method"
    return f"{asked}{more}. Measured up to {short(row['longest_measured'])} tokens{off}."


# Keys as in texts.yaml, whose order counts.
FIGURES: dict[str, Callable[[Rows], Figure | None]] = {
    "sets": by_set,
    "length": accuracy_by_length,
    "needles": needles,
    "composition": composition,
    "interference": interference,
    "capacity": capacity,
    "conflict": conflict,
    "cost": cost_by_length,
    "memory": memory_by_length,
    "pareto": pareto,
    "break-even": break_even,
    "curves": curves,
}


# Parts


def _of(rows: Iterable[Row], **values: object) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def _of_first(rows: Iterable[Row], tasks: Sequence[str]) -> list[Row]:
    """Of the first of the tasks that there is."""
    rows = list(rows)
    first = next((task for task in tasks if any(row["task"] == task for row in rows)), None)
    return [row for row in rows if row["task"] == first]


def _slices(rows: Rows, *by: str) -> list[Row]:
    return [row for row in rows if row["kind"] == "slice" and row["by"] == list(by)]


def _values(rows: Rows, key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _attribute_values(rows: Rows, key: str) -> list[float]:
    return sorted({row["attributes"][key] for row in rows})


def _with_task(rows: Rows, columns: dict[str, Callable[[Row], str]]) -> dict[str, Callable[[Row], str]]:
    task = {"task": lambda row: task_name(row["task"])}
    return task | columns if len(_values(rows, "task")) > 1 else columns


def _has_adapter(rows: Rows) -> bool:
    return any(row["method"] == ADAPTER for row in rows)


def _three_lengths(rows: Rows) -> list[str]:
    """Names of the shortest set, the middle one and the longest."""
    names = [name for _, name in sorted({(row["document_tokens"], row["set"]) for row in rows})]
    return list(dict.fromkeys((names[0], names[len(names) // 2], names[-1])))


def _series(method: str, points: Sequence[Point], *, joined: bool = True) -> Series:
    return Series(name_of(method), style_of(method), points, joined)


def _points(rows: Iterable[Row], x: Callable[[Row], float]) -> list[Point]:
    return [Point(x(row), row["exact_match"], row["interval"]) for row in rows]


def _groups(title: str, rows: Rows, group: Callable[[Row], str]) -> Panel:
    names = list(dict.fromkeys(map(group, rows)))
    methods = legend_order(_values(rows, "method"))
    series = [_series(m, _points(_of(rows, method=m), lambda row: names.index(group(row)))) for m in methods]
    return Panel(title, series, Axis(""), MATCH, groups=names)


def _legend(methods: Iterable[str]) -> list[tuple[str, Style]]:
    return [(name_of(m), style_of(m)) for m in legend_order(methods)]


def _score(row: Row) -> list[str]:
    return [cell(row) for cell in score_cells().values()]
