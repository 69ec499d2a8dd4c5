"""Tables of the rows of benchmarks.memory.nights: means over the seeds.

markdown(rows, "nights")
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from benchmarks.measuring.rows import Row, Rows
from benchmarks.report.figures import Figure
from benchmarks.report.plots import LINES, MATCH, OTHER, Axis, Panel, Point, Series
from benchmarks.report.tables import Table

Of = Callable[[Sequence[Row]], str]  # a cell of the rows of one line

SHARE = MATCH._replace(label="exact match")
REACHED = 0.8  # of the answers with the fact in the prompt
NAMES = {
    **{"Supervised": "SFT", "TeacherKL": "KL", "OnPolicy": "on-policy", "Deep": "deep"},
    **{"NoRehearsal": "none", "SelfSynthesised": "self-synthesised", "Replay": "replay of other known facts"},
    **{"OtherSubjects": "other subjects", "PromotionGate": "the gate", "AlwaysYes": "always yes"},
    **{"alice": "who was told", "bob": "another user", "TeacherKL, wrong memory": "KL, another memory in the prompt"},
}


def markdown(rows: Sequence[Row], part: str) -> str:
    """One part's table."""
    return TABLES[part]([row for row in rows if row["kind"] == part.removesuffix("_gate")]).markdown()


def nights(rows: Sequence[Row]) -> Table:
    """Of tonight's facts and of all so far, with the lowest and highest seed."""
    cells = {
        **{"tonight's": _mean("after"), "all so far": _mean("all_so_far"), "lowest": _lowest("all_so_far")},
        **{"highest": _highest("all_so_far"), "in the prompt": _mean("oracle"), "background": _mean("background")},
    }
    return _grouped(rows, _night, cells)


def nights_figure(rows: Rows) -> Figure | None:
    """What is answered of all facts so far and of the background, by night; bars reach from lowest to highest seed."""
    told = [row for row in rows if row["kind"] == "nights"]
    if not told:
        return None
    arms = {
        "anew each night": [row for row in told if row["anew"] and not row["shuffled"]],
        "on top of the last night": [row for row in told if not row["anew"]],
        "told another's facts": [row for row in told if row["shuffled"]],
    }
    legend = [*zip(arms, LINES, strict=False), ("with the fact in the prompt", OTHER)]
    panels = []
    for title, key in (("All facts so far, empty prompt", "all_so_far"), ("Background", "background")):
        series = [Series(name, style, _by_night(arms[name], key)) for name, style in legend if name in arms]
        if key == "all_so_far":
            series.append(Series(legend[-1][0], OTHER, _by_night(arms["anew each night"], "oracle")))
        ticks = sorted({row["night"] for row in told})
        panels.append(Panel(title, series, Axis("night", ticks=ticks), SHARE))
    return Figure("nights", panels, legend, [], [])


def _by_night(rows: Sequence[Row], key: str) -> list[Point]:
    found = []
    for night in sorted({row["night"] for row in rows}):
        own = [row for row in rows if row["night"] == night]
        found.append(Point(night, _value(own, key), (_value(own, key, min), _value(own, key, max))))
    return found


def nights_gate(rows: Sequence[Row]) -> Table:
    cells = {
        **{"answered before": _mean("before"), "recall": _mean("gate_recall"), "KL, nats": _mean("gate_locality")},
        **{"passed": _mean("promoted"), "handed over": _mean("handed_over"), "processor s": _mean("processor_s")},
    }
    return _grouped(rows, _night, cells)


def _night(row: Row) -> str:
    if row["shuffled"]:
        return f"{row['night']}, told another's facts"
    return f"{row['night']}, anew" if row["anew"] else f"{row['night']}, on top"


def poison(rows: Sequence[Row]) -> Table:
    cells = {
        **{"made live": _mean("promoted"), "live hash unchanged": _mean("hash_unchanged")},
        **{"known before": _mean("known_before"), "known after": _mean("known_after")},
        **{"next night passes": _mean("later_promoted"), "its facts": _mean("later_facts")},
    }
    return _grouped(rows, lambda row: NAMES[row["gate"]], cells)


def objectives(rows: Sequence[Row]) -> Table:
    cells = {"background": _mean("background"), "processor s": _mean("processor_s"), "TFLOP": _mean("tflops")}
    return _by_steps(rows, lambda row: f"{NAMES[row['objective']]}, from {row['start']}", cells)


def rehearsal(rows: Sequence[Row]) -> Table:
    cells = {
        **{"background": _mean("background"), "KL, nats": _mean("gate_locality")},
        **{"8-grams of what is measured": _mean("overlapping_8_grams")},
    }
    return _by_steps(rows, lambda row: NAMES[row["rehearsal"]], cells)


def _by_steps(rows: Sequence[Row], label: Callable[[Row], str], cells: Mapping[str, Of]) -> Table:
    """Closed book at each number of steps; the rest where it first reaches `REACHED` of the prompt's answers."""
    steps, lines = sorted({row["steps"] for row in rows}), []
    for value in dict.fromkeys(map(label, rows)):
        own = [row for row in rows if label(row) == value]
        by_steps = [[row for row in own if row["steps"] == number] for number in steps]
        closed = [_value(of, "closed_book") if of else None for of in by_steps]
        enough = [
            of
            for of, answered in zip(by_steps, closed, strict=True)
            if answered is not None and answered >= REACHED * _value(of, "open_book")
        ]
        last = [cell(enough[0]) if enough else "–" for cell in cells.values()]
        lines.append([value, *("–" if one is None else f"{one:.2f}" for one in closed), *last])
    return Table("", ["", *(f"{number} steps" for number in steps), *cells], lines)


def tiers(rows: Sequence[Row]) -> Table:
    cells = {name: _mean(name) for name in ("none", "token", "adapter", "weights", "oracle")}
    return _grouped(rows, lambda row: NAMES[row["user"]], cells)


def review(rows: Sequence[Row]) -> Table:
    what = {
        **{"written items": "items", "corrected": "edited", "made live without approval": "promoted_unapproved"},
        **{"made live with approval": "promoted", "closed book": "closed_book", "in the prompt": "open_book"},
        **{
            "rejected facts in what is trained on": "rejected_in_training",
            "rejected facts answered": "rejected_answered",
        },
        "background": "background",
    }
    lines = [[name, *(of(key)(rows) for of in (_mean, _lowest, _highest))] for name, key in what.items()]
    return Table("", ["what", "mean", "lowest", "highest"], lines)


def portability(rows: Sequence[Row]) -> Table:
    cells = {
        **{"before": _mean("before"), "closed book": _mean("closed_book"), "in the prompt": _mean("open_book")},
        **{"another user": _mean("another_user"), "KL, nats": _mean("gate_locality")},
        "processor s": _mean("processor_s"),
    }
    return _grouped(rows, lambda row: row["checkpoint"], cells)


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    **{"nights": nights, "nights_gate": nights_gate, "poison": poison, "objectives": objectives},
    **{"rehearsal": rehearsal, "tiers": tiers, "review": review, "portability": portability},
}


def _grouped(rows: Sequence[Row], label: Callable[[Row], str], cells: Mapping[str, Of]) -> Table:
    lines = []
    for value in dict.fromkeys(map(label, rows)):
        own = [row for row in rows if label(row) == value]
        lines.append([value, *(cell(own) for cell in cells.values())])
    return Table("", ["", *cells], lines)


def _value(rows: Sequence[Row], key: str, of: Callable[[list[float]], float] = fmean) -> float:
    return of([float(row[key]) for row in rows if row.get(key) is not None])


def _mean(key: str, of: Callable[[list[float]], float] = fmean) -> Of:
    return lambda rows: f"{_value(rows, key, of):.2f}" if any(row.get(key) is not None for row in rows) else "–"


def _lowest(key: str) -> Of:
    return _mean(key, min)


def _highest(key: str) -> Of:
    return _mean(key, max)
