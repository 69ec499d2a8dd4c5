"""When an adapter wins and when it does not, in one paragraph whose every figure comes from the rows.

parts = verdict(rows)      # (what it says, sentence): wins, what is level, losses
"""

from collections.abc import Callable, Sequence

from benchmarks.plots import INTERFERENCE, even_found, interference_rows
from benchmarks.summary import (
    ADAPTER,
    ALTERNATIVES,
    CEILING,
    CONTROL_TASKS,
    FLOOR,
    GRADIENT,
    WRONG,
    Row,
    Rows,
    is_by_length,
    name_of,
    task_name,
)
from benchmarks.svg import short


def verdict(rows: Rows) -> list[tuple[str, str]]:
    """One paragraph in up to three parts, (what it says, sentence): wins, what is level, losses.

    What was not measured is in none of them.
    """
    wins, level, losses = ([], [], [])
    for part in (_quality, _harm, _seconds, _flops, _memory):
        for found, more in zip((wins, level, losses), part(rows), strict=True):
            found += more
    said = (("An adapter wins", wins), ("It is level", level), ("It does not win", losses))
    return [(title, f"{'; '.join(phrases)}.") for title, phrases in said if phrases]


def details(rows: Rows) -> list[tuple[str, str]]:
    """More sentences: (what about, sentence)."""
    even = even_found([row for row in rows if is_by_length(row) and row["method"] == ADAPTER])
    found = [("Break-even", even), ("Against trained adapters", _gradients(rows))]
    return [(title, text) for title, text in found if text]


def set_by_set(rows: Rows) -> tuple[Sequence[str], list[list[str]]]:
    """(head, lines) of a table: the adapter minus each alternative on every set, with 95 % intervals."""
    others = (CEILING, "retrieval", WRONG)
    lines = []
    for row in answerable(rows):
        cells = [f"{task_name(row['task'])}, {row['set']}", f"{row['exact_match']:.2f}"]
        for other in others:
            found = row["against"].get(other)
            interval = found and found["interval"]
            text = f"{found['difference']:+.2f}" if found else "–"
            cells.append(f"{text} ({interval[0]:+.2f} to {interval[1]:+.2f})" if interval else text)
        lines.append(cells)
    return ("set", name_of(ADAPTER), *(f"minus {name_of(other)}" for other in others)), lines


def answerable(rows: Rows) -> list[Row]:
    """The adapter's rows on sets where full context answers better than no context."""
    return [
        row
        for row in rows
        if row["kind"] == "summary"
        and row["method"] == ADAPTER
        and row["task"] not in (*INTERFERENCE, *CONTROL_TASKS)
        and {CEILING, FLOOR} <= set(row.get("against", {}))
        and _of(row, CEILING) > _of(row, FLOOR)
    ]


def compared(rows: Rows, other: str) -> tuple[list[Row], list[Row], list[Row]]:
    """Sets on which the adapter is better, not told apart, worse: by the interval of the difference. Best first."""
    won, level, lost = [], [], []
    for row in sorted(rows, key=lambda r: -r["against"].get(other, {}).get("difference", 0)):
        if other in row["against"]:
            low, high = row["against"][other]["interval"] or (-1, 1)
            (won if low > 0 else lost if high < 0 else level).append(row)
    return won, level, lost


Phrases = tuple[list[str], list[str], list[str]]  # of wins, of what is level, of losses


def _quality(rows: Rows) -> Phrases:
    own = answerable(rows)
    result: Phrases = ([], [], [])
    for other in (CEILING, "retrieval"):
        number = sum(other in row["against"] for row in own)
        for phrases, found, place, word in zip(
            result, compared(own, other), (0, 0, -1), ("best", "best", "worst"), strict=True
        ):
            if found:
                example = f"{word}: {_examples([found[place]], other)}"
                verb = "with" if phrases is result[1] else "against"
                phrases.append(f"in quality {verb} {name_of(other)} on {len(found)} of {number} sets ({example})")
    floors = [row["against"][WRONG] for row in own if WRONG in row["against"]]
    above = sum(bool(f["interval"]) and f["interval"][0] > 0 for f in floors)
    if above:
        result[0].append(f"against its control, another document's adapter, on {above} of {len(floors)} sets")
    return result


def _harm(rows: Rows) -> Phrases:
    """On questions that the document says nothing about."""
    result: Phrases = ([], [], [])
    own = [row for row in interference_rows(rows) if row["method"] == ADAPTER and FLOOR in row["against"]]
    titles = ("better than no context", "with no context", "below no context")
    for phrases, found, title in zip(result, compared(own, FLOOR), titles, strict=True):
        if found:
            scores = ", ".join(f"{r['set']} {r['exact_match']:.2f} instead of {_of(r, FLOOR):.2f}" for r in found)
            phrases.append(f"on questions that its document does not answer {title} ({scores})")
    return result


def _seconds(rows: Rows) -> Phrases:
    wins, losses, always = [], [], []
    for other in ALTERNATIVES:
        clock = _break_even(rows, other, "seconds")
        finite = [(tokens, number) for tokens, number in clock if number is not None]
        never = [tokens for tokens, number in clock if number is None]
        if finite:
            first = finite[0][0]
            where = f" at {len(finite)} of {len(clock)} lengths, from {short(first)} tokens" if never else ""
            numbers = _range([number for _, number in finite])
            wins.append(f"by the clock against {name_of(other)}{where}, after {numbers} questions per document")
            if never:
                below = f"below {short(first)} tokens" if max(never) < first else f"at {_range(never)} tokens"
                losses.append(f"by the clock against {name_of(other)} {below}")
        elif never:
            always.append(name_of(other))
    if always:
        losses.append(f"by the clock against {' and '.join(always)}, at any number of questions")
    return wins, [], losses


def _flops(rows: Rows) -> Phrases:
    wins, losses = [], []
    for other in ALTERNATIVES:
        numbers = [number for _, number in _break_even(rows, other, "flops")]
        if numbers and None not in numbers:
            wins.append(f"{name_of(other)} after {_range(numbers)}")
        elif numbers:
            losses.append(f"in FLOPs against {name_of(other)} at {numbers.count(None)} of {len(numbers)} lengths")
    return [f"in FLOPs against {', '.join(wins)} questions"] if wins else [], [], losses


def _break_even(rows: Rows, other: str, what: str) -> list[tuple[float, float | None]]:
    """(document tokens, questions), shortest first."""
    own = [row for row in rows if is_by_length(row) and row["method"] == ADAPTER]
    found = [(row["document_tokens"], (row.get("break_even") or {}).get(other, {})) for row in own]
    return sorted(((tokens, even[what]) for tokens, even in found if what in even), key=lambda pair: pair[0])


def _memory(rows: Rows) -> Phrases:
    longest = max((row["document_tokens"] for row in rows if is_by_length(row)), default=0)
    found = {r["method"]: r["stored_bytes"] for r in rows if is_by_length(r) and r["document_tokens"] == longest}
    own = found.get(ADAPTER)
    if not own:
        return [], [], []
    size = lambda value: f"{short(value / 1024)} KiB"  # noqa: E731
    sides = {
        side: [m for m in ("prefix_cache", "retrieval", CEILING) if found.get(m) and (found[m] > own) == side]
        for side in (True, False)
    }
    said = [
        [f"in bytes kept ({size(own)} of {short(longest)} tokens) against {_listed(names, found, size)}"]
        if names
        else []
        for names in (sides[True], sides[False])
    ]
    return said[0], [], said[1]


def _listed(names: Sequence[str], found: dict[str, float], size: Callable[[float], str]) -> str:
    return " and ".join(f"{name_of(name)} ({size(found[name])})" for name in names)


def _gradients(rows: Rows) -> str:
    own = [row for row in answerable(rows) if row["task"] == "encyclopedia"]
    parts = []
    for method in GRADIENT:
        both = [row for row in own if method in row["against"]]
        if both:
            won, level, lost = map(len, compared(both, method))
            parts.append(f"{name_of(method)} {won} won, {level} level, {lost} lost")
    return f"of the encyclopedia's {len(own)} sets: {'; '.join(parts)}." if parts else ""


def _of(row: Row, other: str) -> float:
    """The other method's exact match, on the questions that both answered."""
    return row["exact_match"] - row["against"][other]["difference"]


def _examples(rows: Rows, other: str) -> str:
    named = (
        f"{task_name(row['task'])}, {row['set']}, {row['exact_match']:.2f} against {_of(row, other):.2f}"
        for row in rows
    )
    return "; ".join(named)


def _range(values: Sequence[float]) -> str:
    low, high = (short(value, digits=2) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
