"""Tables of the rows of benchmarks.memory.nights: means over the seeds.

markdown(rows, "nights")
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks.measuring.rows import Row
from benchmarks.report.tables import Table

REACHED = 0.8  # of the answers with the fact in the prompt
NAMES = {
    **{"Supervised": "SFT", "TeacherKL": "KL", "OnPolicy": "on-policy", "Deep": "deep"},
    **{"NoRehearsal": "none", "SelfSynthesised": "self-synthesised", "Replay": "replay of other known facts"},
    **{"OtherSubjects": "other subjects", "PromotionGate": "the gate", "AlwaysYes": "always yes"},
    **{"alice": "who was told", "bob": "another user", "TeacherKL, wrong memory": "KL, another memory in the prompt"},
}


def markdown(rows: Sequence[Row], part: str) -> str:
    """One part's table."""
    return TABLES[part]([row for row in rows if row["kind"] == part]).markdown()


def nights(rows: Sequence[Row]) -> Table:
    names = {False: "told", True: "told another's facts"}
    label = {"night": lambda row: f"{row['night']}, {names[row['shuffled']]}"}
    cells = {
        **{"before": "before", "after": "after", "of all so far": "all_so_far", "in the prompt": "oracle"},
        **{"background": "background", "passed": "promoted"},
    }
    return _means(rows, label, cells)


def poison(rows: Sequence[Row]) -> Table:
    cells = {
        **{"made live": "promoted", "live hash unchanged": "hash_unchanged", "known before": "known_before"},
        **{"known after": "known_after", "next night passes": "later_promoted", "its facts": "later_facts"},
    }
    return _means(rows, {"gate": lambda row: NAMES[row["gate"]]}, cells)


def objectives(rows: Sequence[Row]) -> Table:
    """Closed book at each number of steps, and what the first that reaches `REACHED` of the prompt's answers took."""
    steps = sorted({row["steps"] for row in rows})
    lines = []
    for objective, start in dict.fromkeys((row["objective"], row["start"]) for row in rows):
        own = [row for row in rows if (row["objective"], row["start"]) == (objective, start)]
        by_steps = {number: [row for row in own if row["steps"] == number] for number in steps}
        closed = {number: _mean(of, "closed_book") for number, of in by_steps.items()}
        enough = [of for number, of in by_steps.items() if of and closed[number] >= REACHED * _mean(of, "open_book")]
        first = enough[0] if enough else []
        cells = [_said(closed[number]) for number in steps] + [_said(_mean(by_steps[steps[-1]], "background"))]
        took = [_said(_mean(first, key), digits) for key, digits in (("seconds", 1), ("tflops", 2))]
        lines.append([NAMES[objective], start, *cells, *took])
    numbers = [f"{number} steps" for number in steps]
    return Table("", ["objective", "start", *numbers, "background", "s to 0.8", "TFLOP to 0.8"], lines)


def rehearsal(rows: Sequence[Row]) -> Table:
    cells = {
        **{"closed book": "closed_book", "in the prompt": "open_book", "background": "background"},
        **{"questions": "rehearsed", "8-grams of what is measured": "overlapping_8_grams"},
    }
    return _means(rows, {"rehearsal": lambda row: NAMES[row["rehearsal"]]}, cells)


def tiers(rows: Sequence[Row]) -> Table:
    cells = {name: name for name in ("none", "token", "adapter", "weights", "oracle")}
    return _means(rows, {"asked by": lambda row: NAMES[row["user"]]}, cells)


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
    return Table("", ["what", "mean"], [[name, _said(_mean(rows, key))] for name, key in what.items()])


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    **{"nights": nights, "poison": poison, "objectives": objectives, "rehearsal": rehearsal, "tiers": tiers},
    "review": review,
}


def _means(rows: Sequence[Row], label: Mapping[str, Callable[[Row], str]], cells: Mapping[str, str]) -> Table:
    (name, of_row), lines = next(iter(label.items())), []
    for value in dict.fromkeys(map(of_row, rows)):
        own = [row for row in rows if of_row(row) == value]
        lines.append([value, *(_said(_mean(own, key)) for key in cells.values())])
    return Table("", [name, *cells], lines)


def _mean(rows: Iterable[Row], key: str) -> float | None:
    values = [float(row[key]) for row in rows]
    return sum(values) / len(values) if values else None


def _said(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
