"""Instants: ISO 8601 or datetime outside, microseconds since 1970 in UTC inside.

to_micros("2026-03-01", "valid_at")        # midnight, UTC
to_text(1772323200000000)                  # "2026-03-01T00:00:00+00:00"
"""

import time
from datetime import UTC, date, datetime, timedelta

Instant = str | date | datetime

FOREVER = 2**62  # later than any date
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_micros(value: Instant, what: str) -> int:
    """Microseconds since 1970-01-01 UTC. A date is its first instant; a time without a zone is UTC.

    Args:
        what: the argument's name, for the message.

    Raises:
        ValueError: not a date, or one that no calendar has.
    """
    given = value if isinstance(value, str) else str(value)
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value.strip())
        elif isinstance(value, date) and not isinstance(value, datetime):
            value = datetime(value.year, value.month, value.day)
        elif not isinstance(value, datetime):
            raise ValueError("no date")
        aware = value if value.tzinfo else value.replace(tzinfo=UTC)
        # At the calendar's edges a local date may exist whose UTC date does not.
        return (aware.astimezone(UTC) - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{what} is {given!r}, not a date that exists. Give ISO 8601, such as 2026-03-01 or "
            "2026-03-01T09:30:00+01:00."
        ) from error


def to_text(micros: int | None) -> str | None:
    """ISO 8601 in UTC; None stays None."""
    return None if micros is None else (_EPOCH + timedelta(microseconds=micros)).isoformat()


def now() -> int:
    return time.time_ns() // 1000
