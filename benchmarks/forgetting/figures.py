"""Tables and plots of the rows of benchmarks.forgetting.frontier, spurious and tasks.

markdown(rows, "frontier"), curves(rows), recoveries(rows)

A method stands in the tables at one learning rate of the list: of those at which most seeds reach the target the one
that keeps most of the background; where none does, the one that comes nearest to it. Every other background question
chooses, those in between are what the tables say.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.forgetting.intervals import nested_interval
from benchmarks.measuring.rows import Row, Rows
from benchmarks.report.figures import Figure
from benchmarks.report.plots import LINES, OTHER, Axis, Panel, Point, Series
from benchmarks.report.tables import Cell, Table, interval, number

# A choice and the control that it is compared with: as many random ones.
RANDOM = {"rows_random": "rows_", "slots_random": "slots_", "slots_random_384": "slots_"}
SHARE = Axis("share kept, with 95 % intervals", limits=(-0.04, 1.04), ticks=(0, 0.25, 0.5, 0.75, 1))
# Lines of the plots; with more of them none could be followed.
SHOWN = ("everything", "lora_8", "rows_random", "rows_tfidf", "everything_replay", "lora_8_replay")


def markdown(rows: Rows, part: str) -> str:
    return TABLES[part](rows).markdown()


# New against retained


def chosen(rows: Rows) -> dict[str, Rows]:
    """Method → its rows, one a seed, at its learning rate; in the order of the rows.

    Only seeds at which every method tried all its learning rates choose, so that the search is the same for all.
    """
    by_rate = _by_rate(rows)
    tried = [{row["seed"] for row in own} for found in by_rate.values() for own in found.values()]
    searching = set[int]().union(*tried).intersection(*tried)
    taken = {}
    for name, found in by_rate.items():
        merits = {rate: _merit([row for row in own if row["seed"] in searching]) for rate, own in found.items()}
        taken[name] = found[max(merits, key=lambda rate: merits[rate])]
    return taken


def _merit(rows: Rows) -> tuple[float, ...]:
    """The largest is taken."""
    if not rows:
        return (-1.0,)
    reached = _reached(rows)
    near = 1.0 if reached else _mean(rows, "checked") or 0.0
    return reached, near, _score(rows, "background", half=0)


def _by_rate(rows: Rows) -> dict[str, dict[float | None, list[Row]]]:
    found: dict[str, dict[float | None, list[Row]]] = {}
    for row in rows:
        if row["kind"] in ("learned", "adapter"):
            found.setdefault(row["method"], {}).setdefault(row.get("lr"), []).append(row)
    return found


def frontier(rows: Rows) -> Table:
    """Relative drop of the background, 1 - after / before, with its interval over seeds and questions."""
    before = _before(rows)
    lines: list[Row] = []
    for name, own in chosen(rows).items():
        drop, bounds = relative_drop(own, before, "background", half=1)
        low, high = bounds or (None, None)
        reached = _reached(own) if any("reached" in row for row in own) else None  # nothing is trained for an adapter
        line = {"seeds": len(own), "new": _mean(own, "new"), "reached": reached}
        lines.append({"method": name, **line, "drop": drop, "low": low, "high": high})
    return Table.of("", lines, _NAME | _FRONTIER)


def kept(rows: Rows) -> Table:
    """The other measures of the same rows; before them the base model's."""
    base = {"method": "before", **{key: _mean(list(_before(rows).values()), key) for key in _KEPT_KEYS}}
    lines = [{"method": name, **{key: _mean(own, key) for key in _KEPT_KEYS}} for name, own in chosen(rows).items()]
    there = {key for key in _KEPT_KEYS if any(line[key] is not None for line in (base, *lines))}
    return Table.of("", [base, *lines], _NAME | {_KEPT[key][0]: _KEPT[key][1] for key in _KEPT if key in there})


def budget(rows: Rows) -> Table:
    """Seeds that reach the target at each learning rate, and the one that the tables take."""
    by_rate, taken = _by_rate(rows), chosen(rows)
    rates = sorted({rate for found in by_rate.values() for rate in found if rate is not None})
    lines = [
        [
            _say(name),
            *(f"{_reached(found[rate]):.2f}" if rate in found else "–" for rate in rates),
            f"{rate_of(taken[name]):g}",
        ]
        for name, found in by_rate.items()
        if None not in found
    ]
    return Table("", ["method", *(f"{rate:g}" for rate in rates), "taken"], lines)


def rates(rows: Rows) -> Table:
    """Background lost at each learning rate at which most of the seeds that tried it reached the target."""
    by_rate, before = _by_rate(rows), _before(rows)
    lrs = sorted({rate for found in by_rate.values() for rate in found if rate is not None})
    lines = []
    for name, found in by_rate.items():
        if None not in found:
            drops = [relative_drop(found[lr], before, "background")[0] if lr in found else None for lr in lrs]
            well = [lr in found and _reached(found[lr]) > 0.5 for lr in lrs]
            cells = [f"{drop:.2f}" if ok and drop is not None else "–" for drop, ok in zip(drops, well, strict=True)]
            lines.append([_say(name), *cells])
    return Table("", ["method", *(f"{lr:g}" for lr in lrs)], lines)


def real(rows: Rows) -> Table:
    """Of a base model that reads real text, each method and learning rate, means over seeds: what is answered, as a
    question and as the beginning of a sentence."""
    found: dict[tuple[str, float | None], list[Row]] = {}
    for kind in ("before", "adapter", "learned"):
        for row in rows:
            if row["kind"] == kind:
                found.setdefault((row.get("method", kind), row.get("lr")), []).append(row)
    lines: list[Row] = [
        {"method": name, "seeds": len({row["seed"] for row in own})}
        | ({} if rate is None else {"lr": rate})
        | {key: _mean(own, key) for key in ("new", "background", "cloze", "perplexity")}
        for (name, rate), own in found.items()
    ]
    return Table.of("", lines, _NAME | _REAL)


def rate_of(rows: Rows) -> float:
    return float(rows[0]["lr"])


def chosen_rows(rows: Rows) -> Table:
    """What each choice of rows, or of a memory layer's slots, keeps beyond as many random ones: of the background, and
    of questions on an article."""
    taken = chosen(rows)
    lines: list[Row] = []
    for random, kind in RANDOM.items():
        size = random.removeprefix(f"{kind}random")
        for name, own in taken.items():
            same = name.startswith(kind) and name.endswith(size) and (size or not name[-1].isdigit())
            if same and name != random and random in taken:
                line: Row = {"method": name, "steps": _mean(own, "steps"), "rows": _mean(own, "changed_rows")}
                for key in ("background", "in_context"):
                    half = 1 if key == "background" else None
                    line[key], line[f"{key}_interval"] = difference(own, taken[random], key, half=half)
                lines.append(line)
    return Table.of("", lines, _NAME | _CHOSEN)


def relative_drop(
    after: Rows, before: Mapping[tuple[str, int], Row], key: str, *, half: int | None = None
) -> tuple[float | None, tuple[float, float] | None]:
    """1 - after / before of a set's mean score, with its interval over seeds and questions."""
    pairs = [(row, before[_place(row)]) for row in after if _place(row) in before]
    columns, seeds = _columns(pairs, key, half)
    if not seeds or not sum(columns[1]):
        return None, None
    bounds = nested_interval(columns, lambda a, b: 1 - a / b, seeds=seeds)
    return 1 - sum(columns[0]) / sum(columns[1]), bounds


def difference(
    own: Rows, other: Rows, key: str, *, half: int | None = None
) -> tuple[float | None, tuple[float, float] | None]:
    """One method's mean score minus another's on the same seeds and questions, with its interval."""
    theirs = {_place(row): row for row in other}
    columns, seeds = _columns([(row, theirs[_place(row)]) for row in own if _place(row) in theirs], key, half)
    if not seeds:
        return None, None
    return fmean(columns[0]) - fmean(columns[1]), nested_interval(columns, lambda a, b: a - b, seeds=seeds)


def _columns(
    pairs: Sequence[tuple[Row, Row]], key: str, half: int | None
) -> tuple[tuple[list[float], list[float]], list[int]]:
    """Scores of both rows of each pair, item after item, and the seed of each."""
    columns: tuple[list[float], list[float]] = [], []
    seeds: list[int] = []
    for rows in pairs:
        scores = [_items(row, key, half) for row in rows]
        if len(scores[0]) == len(scores[1]):
            for column, values in zip(columns, scores, strict=True):
                column += values
            seeds += [rows[0]["seed"]] * len(scores[0])
    return columns, seeds


def _items(row: Row, key: str, half: int | None) -> list[float]:
    values = row["items"].get(key, [])
    return values if half is None else values[half::2]


def curves(rows: Rows) -> Figure | None:
    """New facts and background by learning rate, where most seeds reached the target; and one against the other."""
    by_rate = {name: found for name, found in _by_rate(rows).items() if name in SHOWN}
    if not by_rate:
        return None
    before, styles = _before(rows), dict(zip(SHOWN, LINES, strict=False))
    learned, left, against = [], [], []
    for name, found in by_rate.items():
        rates = sorted(rate for rate in found if rate is not None)
        learned.append(Series(_say(name), styles[name], [Point(rate, _score(found[rate], "new")) for rate in rates]))
        points = [_kept_point(found[rate], before) for rate in rates]
        pairs = [(rate, point) for rate, point in zip(rates, points, strict=True) if point is not None]
        left.append(Series(_say(name), styles[name], [Point(rate, share, bounds) for rate, (share, bounds) in pairs]))
        against.append(
            Series(_say(name), styles[name], [Point(_score(found[rate], "new"), share) for rate, (share, _) in pairs])
        )
    legend = [(_say(name), styles[name]) for name in by_rate]
    adapter = [row for row in rows if row["kind"] == "adapter"]
    if adapter and (point := _kept_point(adapter, before)) is not None:
        against.append(Series("adapter", OTHER, [Point(_score(adapter, "new"), point[0])]))
        legend.append(("adapter", OTHER))
    rate = Axis("learning rate", log=True)
    new = Axis("new facts answered", limits=SHARE.limits, ticks=SHARE.ticks)
    panels = [
        Panel("New facts", learned, rate, new),
        Panel("Background kept", left, rate, SHARE),
        Panel("New against kept", against, new, SHARE),
    ]
    return Figure("forgetting", panels, legend, [], [])


def _kept_point(rows: Rows, before: Mapping[Any, Row]) -> tuple[float, tuple[float, float] | None] | None:
    drop, bounds = relative_drop(rows, before, "background")
    if drop is None:
        return None
    return 1 - drop, None if bounds is None else (1 - bounds[1], 1 - bounds[0])


# Spurious or true


def spurious(rows: Rows) -> Table:
    """Old facts after k samples of other content; the same of facts that nobody told; the probe on both before them."""
    base = [row for row in rows if row["kind"] == "base"]
    lines = [_recovered("before", base)] if base else []
    lines += [_recovered(name, own) for name, own in _grouped(rows, "recovery").items()]
    ks = sorted({row["k"] for row in rows if row["kind"] == "recovery"})
    cells = _NAME | {f"old, k = {k}": number(f"old_{k}") for k in ks}
    last = {"untold": number("untold"), "probe, old": number("probe_old"), "probe, untold": number("probe_untold")}
    return Table.of("", lines, cells | last)


def _recovered(name: str, rows: Rows) -> Row:
    ks = sorted({row.get("k", 0) for row in rows})
    of = {k: [row for row in rows if row.get("k", 0) == k] for k in ks}
    return {
        **{"method": name, **{f"old_{k}": _mean(of[k], "old") for k in ks}, "untold": _mean(of[ks[-1]], "untold")},
        **{key: _mean(of[ks[0]], key) for key in ("probe_old", "probe_untold")},
    }


def recoveries(rows: Rows) -> Figure | None:
    """Old facts, and facts that nobody told, by samples of other content; bars are intervals over seeds and facts."""
    grouped = _grouped(rows, "recovery")
    if not grouped:
        return None
    legend = list(zip(map(_say, grouped), LINES, strict=False))
    panels = []
    for title, key in (("Old facts, never shown again", "old"), ("Facts that nobody told", "untold")):
        series = []
        for (name, style), own in zip(legend, grouped.values(), strict=False):
            points = []
            for k in sorted({row["k"] for row in own}):
                at = [row for row in own if row["k"] == k]
                scores = [value for row in at for value in row["items"][key]]
                seeds = [row["seed"] for row in at for _ in row["items"][key]]
                points.append(Point(k, fmean(scores), nested_interval([scores], lambda a: a, seeds=seeds)))
            series.append(Series(name, style, points))
        ticks = sorted({row["k"] for own in grouped.values() for row in own})
        panels.append(Panel(title, series, Axis("samples of other content", ticks=ticks), SHARE))
    return Figure("spurious", panels, legend, [], [])


# Five tasks in sequence


def tasks(rows: Rows) -> Table:
    """Each method at the learning rate with the best final average, as all of them are tried at the same ones."""
    lines: list[Row] = []
    for name, own in _grouped(rows, "sequence").items():
        rates = [[row for row in own if row["lr"] == rate] for rate in dict.fromkeys(row["lr"] for row in own)]
        best = max(rates, key=lambda at: _mean(at, "final_average") or 0.0)
        averages = [row["final_average"] for row in best]
        line = {key: _mean(best, key) for key in ("final_average", "bwt", "background", "reached")}
        lines.append({"method": name, **line, "lowest": min(averages), "highest": max(averages)})
    return Table.of("", lines, _NAME | _TASKS)


def _grouped(rows: Rows, kind: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] == kind:
            found.setdefault(row["method"], []).append(row)
    return found


def _before(rows: Rows) -> dict[tuple[str, int], Row]:
    return {_place(row): row for row in rows if row["kind"] == "before"}


def _place(row: Row) -> tuple[str, int]:
    return row["checkpoint"], row["seed"]


def _reached(rows: Rows) -> float:
    return fmean(float(row.get("reached", False)) for row in rows)


def _score(rows: Rows, key: str, *, half: int | None = None) -> float:
    return fmean(value for row in rows for value in _items(row, key, half))


def _mean(rows: Iterable[Row], key: str) -> float | None:
    values = [float(row[key]) for row in rows if row.get(key) is not None]
    return fmean(values) if values else None


def _say(name: str) -> str:
    return name.replace("_", " ")


_NAME: dict[str, Cell] = {"method": lambda row: _say(row["method"])}
_FRONTIER: dict[str, Cell] = {
    **{"seeds": number("seeds", 0), "new": number("new"), "reached": number("reached")},
    **{"background lost": number("drop"), "low": number("low"), "high": number("high")},
}
_KEPT: dict[str, tuple[str, Cell]] = {
    "steps": ("steps", number("steps", 0)),
    "in_context": ("in context", number("in_context")),
    "abstention": ("says unknown", number("abstention")),
    "kl": ("KL, nats", number("kl", 3)),
    "wikitext_nats": ("WikiText, nats a token", number("wikitext_nats")),
    "nq_open": ("NQ-open", number("nq_open", 3)),
    "cloze": ("real facts, cloze", number("cloze")),
    "changed_share": ("parameters that differ", number("changed_share", 3)),
}
_KEPT_KEYS = tuple(_KEPT)
_REAL: dict[str, Cell] = {
    "learning rate": lambda row: f"{row['lr']:g}" if "lr" in row else "–",
    **{"seeds": number("seeds", 0), "new": number("new"), "real facts, asked": number("background")},
    **{"real facts, cloze": number("cloze"), "perplexity of WikiText": number("perplexity", 1)},
}
_CHOSEN: dict[str, Cell] = {
    **{"rows": number("rows", 0), "steps": number("steps", 0), "background": number("background", 3, "+")},
    **{"95 % interval": interval("background_interval", 3, "+"), "in context": number("in_context", 3, "+")},
    "its 95 % interval": interval("in_context_interval", 3, "+"),
}
_TASKS: dict[str, Cell] = {
    **{"final average": number("final_average"), "lowest": number("lowest"), "highest": number("highest")},
    **{"BWT": number("bwt", 2, "+"), "background": number("background"), "target reached": number("reached")},
}
TABLES: dict[str, Callable[[Rows], Table]] = {
    **{"frontier": frontier, "kept": kept, "budget": budget, "rates": rates, "rows": chosen_rows},
    **{"spurious": spurious, "tasks": tasks, "smollm2": real},
}
