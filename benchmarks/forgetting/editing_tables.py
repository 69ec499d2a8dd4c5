"""Tables and the plot of the rows of benchmarks.forgetting.editing: means over seeds and facts.

markdown(rows, "learned")
"""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.measuring.rows import Row, Rows
from benchmarks.report.figures import Figure
from benchmarks.report.plots import LINES, MATCH, OTHER, Axis, Panel, Point, Series, Style
from benchmarks.report.tables import Table

NAMES = {
    **{"no_edit": "no edit", "in_prompt": "the new fact in the prompt"},
    **{"random_rank_one": "random, rank 1, as large as ROME's", "rome": "ROME"},
    **{"rome_bounded": "ROME, values bounded", "memit": "MEMIT, sixteen at once"},
    **{"memit_at_once": "MEMIT, all at once", "alphaedit": "AlphaEdit, sixteen at once"},
    **{"adapter": "generated adapters, joined", "adapter_routed": "generated adapters, routed"},
    **{"consolidation": "consolidation", "rehearsal": "consolidation with rehearsal"},
}
# One line each of the plot, which has as many styles.
DRAWN = ("rome", "rome_bounded", "memit", "adapter", "consolidation", "rehearsal")
METRIC_TITLES = {
    **{"reliability": "the edited question", "paraphrase": "other wordings", "neighbourhood": "other subjects"},
    **{"subject": "the same subject", "reverse": "reverse"},
}


def markdown(rows: Rows, part: str) -> str:
    return TABLES[part](_summaries(rows)).markdown()


def _summaries(rows: Rows) -> list[Row]:
    found = [row for row in rows if row["kind"] == "summary"]
    return sorted(found, key=lambda row: (list(NAMES).index(row["arm"]), row["n"]))


def _by_n(metric: str) -> Callable[[Sequence[Row]], Table]:
    """Arms down, edits in a row across."""

    def table(rows: Sequence[Row]) -> Table:
        sizes = sorted({row["n"] for row in rows})
        lines = []
        for arm in dict.fromkeys(row["arm"] for row in rows):
            own = {row["n"]: _mean(row, metric) for row in rows if row["arm"] == arm}
            lines.append([NAMES[arm], *(own.get(size, "–") for size in sizes)])
        return Table("", ["edits in a row", *map(str, sizes)], lines)

    return table


def end(rows: Sequence[Row]) -> Table:
    """All metrics after the most edits."""
    lines = [
        [NAMES[row["arm"]], *(_mean(row, metric) for metric in METRIC_TITLES), f"{row['processor_s']:.1f}"]
        for row in _last(rows)
    ]
    return Table("", ["", *METRIC_TITLES.values(), "processor s"], lines)


def against_adapter(rows: Sequence[Row]) -> Table:
    """Paired differences from the joined adapters after the most edits, with 95 % intervals."""
    lines = []
    for row in _last(rows):
        found = [row.get(metric, {}).get("minus_adapter") for metric in ("reliability", "neighbourhood")]
        if any(found):
            lines.append([NAMES[row["arm"]], *(cell for one in found for cell in _difference(one))])
    head = [f"{METRIC_TITLES[metric]}{suffix}" for metric in ("reliability", "neighbourhood") for suffix in _SUFFIXES]
    return Table("", ["minus the adapters", *head], lines)


_SUFFIXES = ("", ", low", ", high")


def _difference(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["–"] * 3
    return [f"{value:+.2f}" for value in (found["mean"], *(found["interval"] or ()))] + ["–"] * (
        0 if found["interval"] else 2
    )


def _last(rows: Sequence[Row]) -> list[Row]:
    most = max((row["n"] for row in rows), default=0)
    return [row for row in rows if row["n"] == most]


def _mean(row: Row, metric: str) -> str:
    return f"{row[metric]['mean']:.2f}" if metric in row else "–"


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    **{"learned": _by_n("reliability"), "paraphrased": _by_n("paraphrase"), "kept": _by_n("neighbourhood")},
    **{"end": end, "against_adapter": against_adapter},
}


def edits_figure(rows: Rows) -> Figure | None:
    """What is answered newly, and what other subjects keep, by the number of edits in a row."""
    found = _summaries(rows)
    if not found:
        return None
    styles: dict[str, Style] = dict(zip(DRAWN, LINES, strict=True)) | {"random_rank_one": OTHER}
    legend = [(NAMES[arm], style) for arm, style in styles.items()]
    sizes = sorted({row["n"] for row in found})
    panels = []
    for metric in ("reliability", "paraphrase", "neighbourhood"):
        series = []
        for arm, style in styles.items():
            own = [row for row in found if row["arm"] == arm and metric in row]
            points = [Point(row["n"], row[metric]["mean"], row[metric].get("interval")) for row in own]
            series.append(Series(NAMES[arm], style, points))
        axis = Axis("edits in a row", log=True, ticks=sizes)
        panels.append(Panel(METRIC_TITLES[metric].capitalize(), series, axis, MATCH))
    return Figure("edits", panels, legend, [], [])
