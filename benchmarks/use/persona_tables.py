"""Tables and the plot of the rows of benchmarks.use.persona: means over seeds, characters and statements, with 95 %
intervals over seeds and statements.

markdown(rows, "persona"), arms_figure(rows)
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import numpy as np

from benchmarks.forgetting.intervals import nested_interval
from benchmarks.measuring.rows import Row, Rows
from benchmarks.report.figures import Figure
from benchmarks.report.plots import LINES, Axis, Panel, Point, Series
from benchmarks.report.tables import Cell, Table, number

ORDER = (
    *("no persona", "sheet in the prompt", "vector", "random vector", "shipped hypernetwork"),
    *("hypernetwork, Perceiver", "hypernetwork", "SFT", "DPO"),
    *("another character's, hypernetwork", "another character's, SFT", "another character's, DPO"),
)
COMPARED = (
    *(("hypernetwork", "another character's, hypernetwork"), ("hypernetwork", "sheet in the prompt")),
    *(("hypernetwork", "hypernetwork, Perceiver"), ("hypernetwork", "SFT"), ("hypernetwork", "DPO")),
)
PERSONAS = {"none": "none", "hypernetwork": "hypernetwork's", "DPO": "DPO's"}
VACCINES = ("facts alone", "skewed", "v", "random vector", "-v")
_NAMES = {
    **{"v": "skewed, with v", "-v": "skewed, with -v", "random vector": "skewed, with a random vector"},
    "skewed": "skewed data, as it is",
}


def markdown(rows: Rows, part: str) -> str:
    return TABLES[part](rows).markdown()


def arms(rows: Rows) -> Table:
    """Every arm: log-odds above the base model's, statements answered in character, speech, facts kept."""
    found, lines = _arms(rows), []
    base = [row for row in rows if row["kind"] == "base"]
    if base:
        lines.append({"name": "no persona", "log_odds": 0.0, "in_character": fmean(r["in_character"] for r in base)})
        lines[0] |= {"said": 0.0, "facts": 1.0}
    lines += [{"name": name, **_line(own)} for name, own in found.items()]
    return Table.of("", lines, _ARMS)


def differences(rows: Rows) -> Table:
    """The hypernetwork minus other arms on the same statements, of the seeds that both have."""
    found, lines = _arms(rows), []
    for one, other in COMPARED:
        if one not in found or other not in found:
            continue
        line: Row = {"name": f"{one} against {other}"}
        for key in ("log_odds", "in_character"):
            both = {row["seed"] for row in found[one]} & {row["seed"] for row in found[other]}
            pair = [[row for row in found[name] if row["seed"] in both] for name in (one, other)]
            columns, seeds = [_items(own, key) for own in pair], _seeds(pair[0], key)
            low, high = nested_interval(columns, lambda a, b: a - b, seeds=seeds) or (None, None)
            line |= {key: fmean(columns[0]) - fmean(columns[1]), f"{key}_low": low, f"{key}_high": high}
        lines.append(line)
    return Table.of("", lines, _DIFFERENCES)


def told(rows: Rows) -> Table:
    """Facts of a document's adapter and a persona, alone and together."""
    found: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        if row["kind"] == "told":
            found.setdefault((row["persona"], row["document"]), []).append(row)
    lines = []
    for persona, name in PERSONAS.items():
        for document in (False, True):
            if own := found.get((persona, document)):
                low, high = nested_interval([_items(own, "log_odds")], _same, seeds=_seeds(own, "log_odds")) or _NONE
                means = {key: fmean(row[key] for row in own) for key in ("log_odds", "answered")}
                where = "with it" if document else "without"
                lines.append({"name": name, "document": where, **means, "low": low, "high": high})
    return Table.of("", lines, _TOLD)


def vaccination(rows: Rows) -> Table:
    """What training left of the trait, and how many facts it taught, also as a share of the arm without a vector."""
    found: dict[str, list[Row]] = {name: [] for name in VACCINES}
    for row in rows:
        if row["kind"] == "vaccination":
            found[row["arm"]].append(row)
    lines = []
    for name, own in found.items():
        if own:
            columns = [_items(each, "answered") for each in (own, found["skewed"])]
            low, high = nested_interval([_items(own, "said")], _same, seeds=_seeds(own, "said")) or _NONE
            kept = fmean(columns[0]) / fmean(columns[1]) if any(columns[1]) else None
            means = {key: fmean(row[key] for row in own) for key in ("said", "answered", "alpha")}
            lines.append({"name": _NAMES.get(name, name), **means, "low": low, "high": high, "kept": kept})
    return Table.of("", lines, _VACCINATION)


def arms_figure(rows: Rows) -> Figure | None:
    """A dot for each arm with its interval."""
    found = _arms(rows)
    if not found:
        return None
    points = []
    for place, own in enumerate(found.values()):
        line = _line(own)
        interval = None if line["low"] is None else [line["low"], line["high"]]
        points.append(Point(place, line["log_odds"], interval))
    names = [name.replace("another character's", "another's").replace("hypernetwork", "hyper") for name in found]
    series = [Series("log-odds of answers in character", LINES[0], points, joined=False)]
    axis = Axis("log-odds above the base model's, nats", limits=(-1.0, 6.0), ticks=(0, 1, 2, 3, 4, 5))
    return Figure("persona", [Panel("", series, Axis(""), axis, names)], [("log-odds", LINES[0])], [], [])


def _arms(rows: Rows) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for name in ORDER:
        own = [row for row in rows if row["kind"] == "arm" and row["arm"] == name]
        if own:
            found[name] = sorted(own, key=lambda row: (row["seed"], row["character"]))
    return found


def _line(own: Sequence[Row]) -> Row:
    scores, seeds = _items(own, "log_odds"), _seeds(own, "log_odds")
    low, high = nested_interval([scores], _same, seeds=seeds) or _NONE
    line: Row = {"log_odds": fmean(scores), "low": low, "high": high}
    line["in_character"] = fmean(_items(own, "in_character"))
    for key in ("said", "facts"):
        line[key] = None if own[0].get(key) is None else fmean(row[key] for row in own)
    return line


def _items(own: Sequence[Row], key: str) -> list[float]:
    return [float(score) for row in own for score in row["items"][key]]


def _seeds(own: Sequence[Row], key: str) -> list[int]:
    return [row["seed"] for row in own for _ in row["items"][key]]


def _same(mean: np.ndarray) -> np.ndarray:
    return mean


_NONE = (None, None)
_ENDS: dict[str, Cell] = {"low": number("low", 2, "+"), "high": number("high", 2, "+")}
_ARMS: dict[str, Cell] = {
    **{"persona": lambda row: row["name"], "log-odds, nats": number("log_odds", 2, "+"), **_ENDS},
    **{"in character": number("in_character"), "said, nats a token": number("said", 3, "+")},
    "facts kept": number("facts", 3),
}
_DIFFERENCES: dict[str, Cell] = {
    **{"difference": lambda row: row["name"], "log-odds, nats": number("log_odds", 2, "+")},
    **{"low": number("log_odds_low", 2, "+"), "high": number("log_odds_high", 2, "+")},
    **{"in character": number("in_character", 2, "+"), "its low": number("in_character_low", 2, "+")},
    "its high": number("in_character_high", 2, "+"),
}
_TOLD: dict[str, Cell] = {
    **{"persona": lambda row: row["name"], "document's adapter": lambda row: row["document"]},
    **{"log-odds, nats": number("log_odds", 2, "+"), **_ENDS, "its facts answered": number("answered")},
}
_VACCINATION: dict[str, Cell] = {
    **{"trained on": lambda row: row["name"], "trait, nats a token": number("said", 3, "+")},
    **{"low": number("low", 3, "+"), "high": number("high", 3, "+"), "facts answered": number("answered")},
    **{"of the gain kept": number("kept"), "strength": number("alpha", 1)},
}
TABLES: Mapping[str, Callable[[Rows], Table]] = {
    **{"persona": arms, "persona_against": differences, "persona_told": told, "persona_vaccination": vaccination}
}
