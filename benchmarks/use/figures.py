"""Tables and plots of the rows of benchmarks.use: memrl and evolver.

markdown(rows, "memrl"), headline({"memrl": rows, "evolver": rows}), learning(rows), returns(rows)
"""

from collections.abc import Callable, Iterable, Mapping
from statistics import fmean

from benchmarks.forgetting.intervals import nested_interval
from benchmarks.measuring.rows import Row, Rows
from benchmarks.report.figures import Figure
from benchmarks.report.plots import LINES, Axis, Panel, Point, Series
from benchmarks.report.tables import Cell, Table, number

SUCCESS = Axis("success", limits=(-0.04, 1.04), ticks=(0, 0.25, 0.5, 0.75, 1))
# Benchmark → what is measured, the arm that is meant, the best arm that has not learned this.
HEADLINE = {
    "memrl": ("MemRL: success", "utility", "similarity"),
    "evolver": ("EvolveR: return on unseen maps", "own principles", "another world's principles"),
}
SHOWN = ("utility", "all credited", "shuffled utilities", "similarity", "no memory", "the rules themselves")
_BLOCK = 200  # episodes of a point
_LAST = 500


def markdown(rows: Rows, part: str) -> str:
    return TABLES[part](rows).markdown()


def memrl(rows: Rows) -> Table:
    """Success of each arm over all episodes, with an interval over seeds and episodes, and over the last ones."""
    lines = []
    for arm, own in grouped(rows, "arm", "arm").items():
        last = fmean(int(one) for row in own for one in row["outcomes"][-_LAST:])
        lines.append({"name": arm, **_success(own), "last": last})
    cells = {**_of("ranked by"), "last 500 episodes": number("last")}
    return Table.of("", lines, cells)


def memrl_evicted(rows: Rows) -> Table:
    """Success afterwards, by what was kept."""
    lines = []
    for kept, own in grouped(rows, "evicted", "kept").items():
        right = fmean(row["right"] for row in own)
        lines.append({"name": kept, "memories": own[0]["memories"], "right": right, **_success(own)})
    head = {"kept": lambda row: row["name"], "memories": number("memories", 0), "of them right": number("right", 0)}
    return Table.of("", lines, {**head, **_SUCCESS})


def learning(rows: Rows) -> Figure | None:
    """Success by episode, the mean of blocks; of the seeds together."""
    found = grouped(rows, "arm", "arm")
    if not found:
        return None
    legend = [(arm, style) for arm, style in zip(SHOWN, LINES, strict=False) if arm in found]
    series = []
    for arm, style in legend:
        outcomes = [row["outcomes"] for row in found[arm]]
        starts = range(0, len(outcomes[0]), _BLOCK)
        points = []
        for start in starts:
            block = [int(one) for text in outcomes for one in text[start : start + _BLOCK]]
            points.append(Point(start + _BLOCK / 2, fmean(block)))
        series.append(Series(arm, style, points))
    return Figure("memrl", [Panel("", series, Axis("episode"), SUCCESS)], legend, [], [])


def evolver(rows: Rows) -> Table:
    """Return on unseen maps by arm, with an interval over worlds and maps."""
    lines = [{"name": arm, **_returns(own)} for arm, own in grouped(rows, "arm", "arm").items()]
    return Table.of("", lines, {"acts by": lambda row: row["name"], "return": number("success"), **_ENDS})


def evolver_learned(rows: Rows) -> Table:
    """What each world's agent made of its runs."""
    cells = {
        "world": number("seed", 0),
        **{"first pass": number("train_1"), "second pass": number("train_2"), "rules": number("rules", 0)},
        **{"principles": number("principles_2", 0), "of them right": number("right_2")},
        "training steps": number("steps", 0),
    }
    return Table.of("", [row for row in rows if row["kind"] == "learned"], cells)


def returns(rows: Rows) -> Figure | None:
    """A dot for each arm with its interval."""
    found = grouped(rows, "arm", "arm")
    if not found:
        return None
    points = []
    for place, own in enumerate(found.values()):
        line = _returns(own)
        points.append(Point(place, line["success"], [line["low"], line["high"]]))
    names = [name.replace("another world's", "another's").replace(", no text", "") for name in found]
    series = [Series("return on unseen maps", LINES[0], points, joined=False)]
    axis = SUCCESS._replace(label="return, with 95 % intervals")
    return Figure("evolver", [Panel("", series, Axis(""), axis, names)], [("return", LINES[0])], [], [])


def headline(rows: Mapping[str, Rows]) -> Table:
    """A line for each system: its figure, and that of the best that has not learned this."""
    lines = []
    for name, (what, meant, control) in HEADLINE.items():
        found = grouped(rows[name], "arm", "arm")
        score = _success if name == "memrl" else _returns
        lines.append(
            {"what": what, "control": control, "other": score(found[control])["success"], **score(found[meant])}
        )
    cells = {
        **{"figure": lambda row: row["what"], "learned": number("success"), **_ENDS},
        **{"control": lambda row: row["control"], "its figure": number("other")},
    }
    return Table.of("", lines, cells)


def grouped(rows: Iterable[Row], kind: str, key: str) -> dict[str, list[Row]]:
    """Rows of this kind by the value of this key, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] == kind:
            found.setdefault(row[key], []).append(row)
    return found


def _success(rows: Rows) -> Row:
    """Mean, and interval over seeds and episodes, of outcomes in digits."""
    scores = [float(one) for row in rows for one in row["outcomes"]]
    seeds = [row["seed"] for row in rows for _ in row["outcomes"]]
    low, high = nested_interval([scores], lambda mean: mean, seeds=seeds) or (None, None)
    return {"success": fmean(scores), "low": low, "high": high}


def _returns(rows: Rows) -> Row:
    """Mean, and interval over seeds and maps, of `items`."""
    scores = [value for row in rows for value in row["items"]]
    seeds = [row["seed"] for row in rows for _ in row["items"]]
    low, high = nested_interval([scores], lambda mean: mean, seeds=seeds) or (None, None)
    return {"success": fmean(scores), "low": low, "high": high}


_ENDS: dict[str, Cell] = {name: number(name) for name in ("low", "high")}
_SUCCESS: dict[str, Cell] = {"success": number("success"), **_ENDS}


def _of(name: str) -> dict[str, Cell]:
    return {name: lambda row: str(row["name"]), **_SUCCESS}


TABLES: Mapping[str, Callable[[Rows], Table]] = {
    **{"memrl": memrl, "memrl_evicted": memrl_evicted, "evolver": evolver, "evolver_learned": evolver_learned}
}
