"""The report's tables from its rows: at most seven columns, one number a cell, an interval in a column of its own.

tables = set_tables(rows)                                # of every set: scores, scores by full context's, costs
table = score_table("Exact match", rows, {"set": lambda row: row["set"]})
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.measuring.rows import Row, Rows
from benchmarks.report.names import (
    ADAPTER,
    ALTERNATIVES,
    CEILING,
    CONTROL_TASKS,
    FLOOR,
    INTERFERENCE,
    WRONG,
    name_of,
    short,
    task_name,
)

Cell = Callable[[Row], str]


class Table(NamedTuple):
    caption: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Without its caption: numbers to the right, but for the first column."""
        is_number = [any(line[i][:1].isdigit() for line in self.lines) for i in range(1, len(self.head))]
        rule = ["---", *("---:" if right else "---" for right in is_number)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (self.head, rule, *self.lines))

    @classmethod
    def of(cls, caption: str, rows: Iterable[Row], cells: Mapping[str, Cell]) -> "Table":
        """A line for each row, a column for each cell."""
        return cls(caption, list(cells), [[cell(row) for cell in cells.values()] for row in rows])


def number(key: str, digits: int = 2, sign: str = "") -> Cell:
    return lambda row: "–" if row.get(key) is None else f"{row[key]:{sign}.{digits}f}"


def scaled(key: str, factor: float = 1) -> Cell:
    """Three significant digits of the value times the factor."""
    return lambda row: "–" if row.get(key) is None else short(row[key] * factor)


def interval(key: str, digits: int = 2, sign: str = "") -> Cell:
    return lambda row: " to ".join(f"{end:{sign}.{digits}f}" for end in row.get(key) or ()) or "–"


def score_cells(digits: int = 2) -> dict[str, Cell]:
    return {"exact match": number("exact_match", digits), "95 % interval": interval("interval", digits)}


METHOD: dict[str, Cell] = {"method": lambda row: name_of(row["method"])}


def _peak(row: Row) -> str:
    peaks = [row[key] for key in ("prepare_peak_bytes", "answer_peak_bytes") if row.get(key) is not None]
    return short(max(peaks) / 2**20) if peaks else "–"


def score_table(caption: str, rows: Iterable[Row], by: Mapping[str, Cell], *, digits: int = 2) -> Table:
    """A line for each row: where it is from, its method, exact match with interval, share of the gap closed."""
    return Table.of(
        caption, rows, {**by, **METHOD, **score_cells(digits), "share of the gap closed": number("gap_closed")}
    )


SET_TABLES: dict[str, dict[str, Cell]] = {
    "scores": METHOD
    | score_cells(3)
    | {
        "token F1": number("token_f1"),
        "ROUGE-L precision": number("rouge_l_precision"),
        "ROUGE-L recall": number("rouge_l_recall"),
        "log-likelihood, nats": number("log_likelihood", 1),
    },
    "relative to full context and no context": METHOD
    | {
        "relative to full context": number("relative"),
        "its 95 % interval": interval("relative_interval"),
        "share of the gap closed": number("gap_closed"),
        "95 % interval of the share": interval("gap_closed_interval"),
        "right before the document": number("old_answer"),
    },
    "time": METHOD
    | {
        "prepare, ms": scaled("prepare_s", 1000),
        "first token, ms": scaled("first_token_s", 1000),
        "question, ms": scaled("question_s", 1000),
        "tokens/s": scaled("tokens_per_s"),
    },
    "memory and FLOPs": METHOD
    | {
        "kept, KiB": scaled("stored_bytes", 1 / 1024),
        "peak, MiB": _peak,
        "MFLOP to prepare": scaled("prepare_flops", 1e-6),
        "MFLOP per question": scaled("answer_flops", 1e-6),
    },
}


def set_tables(rows: Rows) -> list[tuple[str, Table]]:
    """(task, table): four for every set, their captions with its counts."""
    summaries = [row for row in rows if row["kind"] == "summary"]
    result = []
    for task, name in dict.fromkeys((row["task"], row["set"]) for row in summaries):
        chosen = [row for row in summaries if (row["task"], row["set"]) == (task, name)]
        counts = ", ".join(f"{chosen[0][what]} {what}" for what in ("questions", "cases", "seeds"))
        fits = next((row["fits"] for row in chosen if row["method"] == CEILING), 1.0)
        cut = (
            f"; {1 - fits:.0%} of the prompts with the documents did not fit and lost their middle" if fits < 1 else ""
        )
        for what, cells in SET_TABLES.items():
            cells = {head: cell for head, cell in cells.items() if any(cell(row) != "–" for row in chosen)}
            caption = f"{task_name(task)}, {name}: {what} ({counts}{cut})"
            result.append((task, Table.of(caption, chosen, cells)))
    return result


def break_even_table(rows: Rows) -> Table:
    """Of the adapter's rows: questions about one version of a document from which on it is cheaper, by alternative."""
    pairs = [
        {**row, "other": other, **row["break_even"][other]}
        for row in rows
        for other in ALTERNATIVES
        if row["break_even"].get(other)
    ]
    cells = {
        "set": lambda row: row["set"],
        "document tokens": scaled("document_tokens"),
        "than": lambda row: name_of(row["other"]),
        "questions, by the clock": lambda row: questions(row, "seconds"),
        "95 % interval": lambda row: " to ".join(map(_or_never, row.get("seconds_interval") or ())) or "–",
        "questions, in FLOPs": lambda row: questions(row, "flops"),
    }
    return Table.of("Questions from which on the adapter is cheaper, measured set by set", pairs, cells)


def questions(row: Row, key: str, *, digits: int = 2) -> str:
    """A break-even: how many questions, or never."""
    return "–" if key not in row else "never" if row[key] is None else short(row[key], digits=digits)


def differences(rows: Rows) -> Table:
    """The adapter's exact match minus each alternative's on every set that full context answers better than none."""
    chosen = [row for row in rows if row["kind"] == "summary" and row["method"] == ADAPTER]
    chosen = [
        r for r in chosen if r["task"] not in (*INTERFERENCE, *CONTROL_TASKS) and {CEILING, FLOOR} <= {*r["against"]}
    ]
    chosen = [r for r in chosen if r["against"][CEILING]["difference"] < r["against"][FLOOR]["difference"]]
    cells: dict[str, Cell] = {"set": lambda row: f"{task_name(row['task'])}, {row['set']}"}
    for other in (CEILING, "retrieval", WRONG):
        found = lambda row, other=other: row["against"].get(other, {})  # noqa: E731
        cells[f"minus {name_of(other)}"] = lambda row, found=found: number("difference", 2, "+")(found(row))
        cells[f"95 % interval, {name_of(other)}"] = lambda row, found=found: interval("interval", 2, "+")(found(row))
    return Table.of(f"{name_of(ADAPTER)}: difference of exact match, set by set", chosen, cells)


def _or_never(value: float | None) -> str:
    return "never" if value is None else short(value, digits=2)
