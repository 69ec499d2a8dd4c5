"""Tables of the rows of benchmarks.memory.nights: means over the seeds, and their range.

markdown(rows, "nights")
"""

from collections.abc import Callable, Mapping, Sequence

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
    label = {"night": lambda row: f"{row['night']}{_told(row)}"}
    cells = {
        **{"before": "before", "after": "after", "of all so far": "all_so_far", "in the prompt": "oracle"},
        **{"background": "background", "KL, nats": "gate_locality", "passed": "promoted"},
        "processor s": "processor_s",
    }
    return _means(rows, label, cells)


def _told(row: Row) -> str:
    if row["shuffled"]:
        return ", told another's facts"
    return "" if row["anew"] else ", on top of the last night's weights"


def poison(rows: Sequence[Row]) -> Table:
    cells = {
        **{"made live": "promoted", "live hash unchanged": "hash_unchanged", "known before": "known_before"},
        **{"known after": "known_after", "next night passes": "later_promoted", "its facts": "later_facts"},
    }
    return _means(rows, {"gate": lambda row: NAMES[row["gate"]]}, cells)


def objectives(rows: Sequence[Row]) -> Table:
    label = {"objective": lambda row: NAMES[row["objective"]], "start": lambda row: row["start"]}
    return _by_steps(rows, label, {"background": "background", "processor s": "processor_s", "TFLOP": "tflops"})


def rehearsal(rows: Sequence[Row]) -> Table:
    cells = {
        **{"background": "background", "KL, nats": "gate_locality", "questions": "rehearsed"},
        **{"8-grams of what is measured": "overlapping_8_grams"},
    }
    return _by_steps(rows, {"rehearsal": lambda row: NAMES[row["rehearsal"]]}, cells)


def _by_steps(rows: Sequence[Row], label: Mapping[str, Callable[[Row], str]], cells: Mapping[str, str]) -> Table:
    """Closed book at each number of steps; the rest where it first reaches `REACHED` of the prompt's answers."""
    steps, lines = sorted({row["steps"] for row in rows}), []
    labelled = [(tuple(of(row) for of in label.values()), row) for row in rows]
    for value in dict.fromkeys(one for one, _ in labelled):
        by_steps = {
            number: [row for one, row in labelled if one == value and row["steps"] == number] for number in steps
        }
        enough = [of for of in by_steps.values() if of and _mean(of, "closed_book") >= REACHED * _mean(of, "open_book")]
        first = enough[0] if enough else []
        lines.append(
            [
                *value,
                *(_said(of, "closed_book") for of in by_steps.values()),
                *(_said(first, key) for key in cells.values()),
            ]
        )
    numbers = [f"{number} steps" for number in steps]
    return Table("", [*label, *numbers, *(f"{name} at {REACHED}" for name in cells)], lines)


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
    return Table("", ["what", "mean"], [[name, _said(rows, key)] for name, key in what.items()])


def portability(rows: Sequence[Row]) -> Table:
    cells = {
        **{"before": "before", "another user": "another_user", "closed book": "closed_book"},
        **{"in the prompt": "open_book", "as with it in the prompt": "gate_recall", "background": "gate_background"},
        **{"KL, nats": "gate_locality", "TFLOP": "tflops", "processor s": "processor_s"},
    }
    return _means(rows, {"base model of": lambda row: row["checkpoint"]}, cells)


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    **{"nights": nights, "poison": poison, "objectives": objectives, "rehearsal": rehearsal, "tiers": tiers},
    **{"review": review, "portability": portability},
}


def _means(rows: Sequence[Row], label: Mapping[str, Callable[[Row], str]], cells: Mapping[str, str]) -> Table:
    (name, of_row), lines = next(iter(label.items())), []
    for value in dict.fromkeys(map(of_row, rows)):
        own = [row for row in rows if of_row(row) == value]
        lines.append([value, *(_said(own, key) for key in cells.values())])
    return Table("", [name, *cells], lines)


def _mean(rows: Sequence[Row], key: str) -> float:
    return sum(float(row[key]) for row in rows) / len(rows)


def _said(rows: Sequence[Row], key: str) -> str:
    """The mean over the seeds, and the lowest and highest of them where they differ."""
    found = [float(row[key]) for row in rows if row.get(key) is not None]
    if not found:
        return "–"
    text = f"{sum(found) / len(found):.2f}"
    return text if min(found) == max(found) else f"{text} [{min(found):.2f}, {max(found):.2f}]"
