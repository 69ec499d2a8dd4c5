"""The table and the plot of the rows of `python -m benchmarks.refining`."""

from statistics import fmean

from benchmarks.measuring.metrics import bootstrap_interval
from benchmarks.measuring.rows import Rows
from benchmarks.report.figures import Figure
from benchmarks.report.own_documents import CONTAINS, SETS
from benchmarks.report.plots import Axis, Panel, Point, Series, Style, style_of
from benchmarks.report.tables import Table

NAMES = {
    "no_context": "no context",
    "closed_form": "closed form, untrained hypernetwork",
    "adapter": "generated adapter",
    "refined": "generated adapter, refined",
    "from_zero": "LoRA of rank 8 from zero",
    "cartridge": "cartridge of the same bytes",
    "least_squares": "least squares",
    "kept_prefix": "kept prefix",
    "in_prompt": "document in the prompt",
}
_STYLES = {
    "no_context": style_of("no_context"),
    "closed_form": Style("olive", "h", ":", False),
    "adapter": style_of("doc_to_lora"),
    "refined": Style("orange", "s", "-", False),
    "from_zero": Style("blue", "D"),
    "cartridge": Style("purple", "v"),
    "least_squares": Style("teal", "^"),
    "kept_prefix": style_of("prefix_cache"),
}
_LEAST_SECONDS = 0.1  # where what takes no time stands on an axis of logarithms


def markdown(rows: Rows) -> str:
    """Methods and their budgets down: seconds, bytes, steps, and the share of answers that hold the truth."""
    rows = list(rows)
    lines = []
    for method, budget in _places(rows):
        own = [row for row in rows if (row["method"], row["budget"]) == (method, budget)]
        shares = []
        for name in SETS:
            of_set = [row["contains"] for row in own if row["set"] == name]
            shares.append(f"{fmean(of_set):.3f}" if of_set else "–")
        seconds, size = _of_documents(own, "seconds"), _of_documents(own, "bytes")
        lines.append(
            [NAMES[method], f"{seconds:.1f}", f"{size / 2**20:.2f}", f"{_of_documents(own, 'steps'):.0f}", *shares]
        )
    head = ["method", "processor seconds", "MiB kept", "steps", *SETS.values()]
    return Table("", head, lines).markdown()


def plot(rows: Rows) -> Figure | None:
    """Answers that hold the truth over the processor's seconds since the document was known, a panel for each set."""
    rows = list(rows)
    panels = []
    for name, title in SETS.items():
        series = []
        for method, style in _STYLES.items():
            points = []
            for _, budget in (place for place in _places(rows) if place[0] == method):
                own = [r for r in rows if (r["set"], r["method"], r["budget"]) == (name, method, budget)]
                if own:
                    groups = [(row["seed"], row["document"]) for row in own]
                    # One document says nothing about others.
                    several = len(set(groups)) > 1
                    ends = bootstrap_interval([row["contains"] for row in own], groups=groups) if several else None
                    seconds = max(_LEAST_SECONDS, _of_documents(own, "seconds"))
                    points.append(Point(seconds, fmean(row["contains"] for row in own), ends))
            series.append(Series(NAMES[method], style, points))
        x = Axis("processor seconds since the document is known", log=True)
        panels.append(Panel(title[0].upper() + title[1:], series, x, CONTAINS))
    return Figure("refining", panels, [(NAMES[method], style) for method, style in _STYLES.items()], [], [])


def _places(rows: Rows) -> list[tuple[str, float]]:
    """Methods with their budgets, in the table's order."""
    found = {(row["method"], row["budget"]) for row in rows}
    return sorted(found, key=lambda place: (list(NAMES).index(place[0]), place[1]))


def _of_documents(rows: Rows, key: str) -> float:
    """The mean over documents, each of which has a row for each question."""
    return fmean({(row["set"], row["seed"], row["document"]): row[key] for row in rows}.values())
