"""Which of several statements about one thing holds when: a pure function of what was told, not of the order.

Statements share a timeline if they have the same (subject, relation) of one user, or are versions of one memory. Each
holds from its valid_at until the end that was stated with it or until the next one's valid_at, whichever comes first:
the latest valid wins. With source priorities a statement gives way to those of better sources alone. At one and the
same instant the one told last wins. A statement without text ends the one before it.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

# What an added memory does to others with its key.
CONFLICTS = ("latest", "add_only", "keep_both", "source_priority")
JOINING = ("latest", "source_priority")  # those that share a timeline with them


class Statement(NamedTuple):
    """seq: in the order told. priority: 0 is the best. Times in microseconds."""

    seq: int
    priority: int
    valid_at: int
    stated_until: int | None
    created_at: int


class End(NamedTuple):
    """When a statement stops to hold, and since when that is known; None: it has no end."""

    invalid_at: int | None
    expired_at: int | None


def ends(statements: Iterable[Statement]) -> dict[int, End]:
    """seq → its end, for the statements of one timeline."""
    found: dict[int, End] = {}
    better: list[Statement] = []  # of better priority; their ends are known
    ordered = sorted(statements, key=lambda s: (s.priority, s.valid_at, s.seq))
    for _, group in groupby(ordered, key=lambda s: s.priority):
        peers = list(group)
        for number, statement in enumerate(peers):
            found[statement.seq] = _end(statement, peers[number + 1 : number + 2], better, found)
        better += peers
    return found


def _end(
    statement: Statement, following: Sequence[Statement], better: Sequence[Statement], known: dict[int, End]
) -> End:
    candidates = [(other.valid_at, other.created_at) for other in following]
    if statement.stated_until is not None:
        candidates.append((statement.stated_until, statement.created_at))
    for other in better:
        until = known[other.seq].invalid_at
        if other.valid_at > statement.valid_at:
            candidates.append((other.valid_at, other.created_at))
        elif until is None or until > statement.valid_at:  # it never held
            candidates.append((statement.valid_at, other.created_at))
    if not candidates:
        return End(None, None)
    invalid_at, told = min(candidates)
    return End(invalid_at, max(told, statement.created_at))
