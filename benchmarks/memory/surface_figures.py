"""Tables and plots of the rows of benchmarks.memory.break_even and benchmarks.memory.cadence.

markdown(rows, "break_even"), cheapest(rows), regrets(rows)
"""

from collections.abc import Callable, Mapping, Sequence

from benchmarks.measuring.cost import amortised
from benchmarks.measuring.rows import Row, Rows
from benchmarks.report.figures import Figure
from benchmarks.report.names import CEILING, name_of
from benchmarks.report.plots import LINES, Axis, Panel, Point, Series, legend_order, style_of
from benchmarks.report.tables import METHOD, Table, number, scaled
from hypernet.adapters.break_even import Costs

ASKED = (0.0, 0.5, 0.8)  # accuracy
SHOWN_FACTS = (1, 4, 16, 64)
QUESTIONS = tuple(10 ** (half / 2) for half in range(13))  # between updates, 1 to a million
PLACES = {"default": "default", "tuned": "tuned", "costs": "K and h"}


def markdown(rows: Rows, part: str) -> str:
    return TABLES[part](rows).markdown()


def break_even(rows: Rows) -> Table:
    """What each method costs at some lengths, and after how many questions it costs less than full context."""
    shown = [row for row in rows if row["kind"] == "surface" and row["facts"] in SHOWN_FACTS]
    cells = {
        "facts": lambda row: str(row["facts"]),
        **METHOD,
        "exact match": number("accuracy"),
        "prepare, ms": scaled("prepare_s", 1000),
        "question, ms": scaled("question_s", 1000),
        "n*, seconds": lambda row: _even(row, "break_even_s"),
        "n*, FLOPs": lambda row: _even(row, "break_even_flops"),
    }
    return Table.of("", shown, cells)


def _even(row: Row, key: str) -> str:
    if row["method"] == CEILING:
        return "–"
    return "never" if row[key] is None else scaled(key)(row)


def order(rows: Rows) -> Table:
    """How many pairs of methods have the predicted order."""
    low, high = (lambda row, end=end: f"{row['interval'][end]:.3f}" if row["interval"] else "–" for end in (0, 1))
    cells = {
        "measured in": lambda row: f"{'FLOPs' if row['currency'] == 'flops' else 'seconds'}, {row['tiers']}",
        "pairs": lambda row: str(row["pairs"]),
        "within 10 %": lambda row: str(row["near"]),
        "as predicted, of the others": number("agreement", 3),
        **{"low": low, "high": high},
        "of all pairs": number("of_all_pairs", 3),
    }
    return Table.of("", [row for row in rows if row["kind"] == "agreement"], cells)


def cheapest(rows: Rows) -> Figure | None:
    """A marker of the cheapest method, in seconds, by questions between updates and length, at each accuracy asked."""
    own = [row for row in rows if row["kind"] == "surface"]
    if not own:
        return None
    x, y = Axis("questions between updates", log=True), Axis("document tokens", log=True)
    panels, used = [], set()
    for asked in ASKED:
        points: dict[str, list[Point]] = {}
        for tokens in dict.fromkeys(row["tokens"] for row in own):
            here = [row for row in own if row["tokens"] == tokens]
            enough = [row for row in here if not asked or (row["accuracy"] or 0) >= asked]
            for questions in QUESTIONS if enough else ():
                best = min(
                    enough, key=lambda row, n=questions: amortised(Costs(row["prepare_s"], row["question_s"]), n)
                )
                points.setdefault(best["method"], []).append(Point(questions, tokens))
        series = [Series(name_of(m), style_of(m), points[m], joined=False) for m in legend_order(points)]
        panels.append(
            Panel(f"Exact match asked: {asked:g}" if asked else "Cheapest, no matter how right", series, x, y)
        )
        used.update(points)
    return Figure("break_even", panels, [(name_of(m), style_of(m)) for m in legend_order(used)], [], ["break_even"])


def cadence(rows: Rows) -> Table:
    """Mean regret by kind of stream, with K/h as it was measured, and half of the widest interval."""
    found = _by_policy([row for row in rows if row["kind"] == "regret" and row["ratio"] == 1])
    streams = list(dict.fromkeys(row["stream"] for row in rows if row["kind"] == "regret"))
    lines = []
    for (policy, parameters), own in found.items():
        regret = {row["stream"]: row for row in own}
        widest = max((row["interval"][1] - row["interval"][0]) / 2 for row in own)
        cells = [f"{regret[name]['regret']:.2f}" for name in streams]
        lines.append([policy, PLACES[parameters], *cells, f"{widest:.2f}"])
    return Table("", ["policy", "parameters", *streams, "half an interval, at most"], lines)


def cadence_ratios(rows: Rows) -> Table:
    """Mean regret over the kinds of streams by K/h, and runs where waiting costs nothing."""
    ratios = sorted({row["ratio"] for row in rows if row["kind"] == "regret"})
    free = {(row["policy"], row["parameters"]): row["sleeps"] for row in rows if row["kind"] == "free"}
    lines = []
    for key, own in _by_policy([row for row in rows if row["kind"] == "regret"]).items():
        means = [[row["regret"] for row in own if row["ratio"] == ratio] for ratio in ratios]
        runs = f"{free[key]:.0f}" if key in free else "–"
        lines.append([key[0], PLACES[key[1]], *(f"{sum(of) / len(of):.2f}" for of in means), runs])
    return Table("", ["policy", "parameters", *(f"K × {ratio:g}" for ratio in ratios), "runs where h = 0"], lines)


def regrets(rows: Rows) -> Figure | None:
    """A group for each policy, in it a dot for each kind of stream, with K/h as it was measured."""
    own = [row for row in rows if row["kind"] == "regret" and row["ratio"] == 1]
    if not own:
        return None
    names = [f"{policy}, {PLACES[parameters]}" for policy, parameters in _by_policy(own)]
    streams = list(dict.fromkeys(row["stream"] for row in own))
    series = []
    for style, stream in zip(LINES, streams, strict=False):
        of = [row for row in own if row["stream"] == stream]
        points = [Point(place, row["regret"], row["interval"]) for place, row in enumerate(of)]
        series.append(Series(stream, style, points))
    ends = [end for row in own for end in row["interval"]]
    axis = Axis("regret, with 95 % intervals", log=True, limits=(max(min(ends), 1e-3), max(ends)))
    return Figure(
        "cadence", [Panel("", series, Axis(""), axis, names)], list(zip(streams, LINES, strict=False)), [], []
    )


def _by_policy(rows: Rows) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["policy"], row["parameters"]), []).append(row)
    return found


TABLES: Mapping[str, Callable[[Sequence[Row]], Table]] = {
    **{"break_even": break_even, "order": order, "cadence": cadence, "cadence_ratios": cadence_ratios}
}
