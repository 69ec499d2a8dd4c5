"""What is known of one user at a glance: what has been so for a while, and what was said lately."""

from numbers import Real
from typing import NamedTuple

from hypernet.memory.store.records import Filters, MemoryVersion, whole_number
from hypernet.memory.store.times import Instant, now, to_micros
from hypernet.memory.store.token_store import TokenStore

_DAY = 86_400_000_000  # microseconds
_MOST_DAYS = 3_652_059  # from year 1 to 9999


class Profile(NamedTuple):
    """stable: those with a key first, then the latest valid. recent: the latest first. Nothing ended is in either."""

    stable: tuple[MemoryVersion, ...]
    recent: tuple[MemoryVersion, ...]

    def __str__(self) -> str:
        """As lines for a prompt; empty if nothing is known."""
        parts = (("Known:", self.stable), ("Lately:", self.recent))
        return "\n".join(line for head, found in parts if found for line in (head, *(f"- {m.text}" for m in found)))


def profile(
    store: TokenStore, filters: Filters, *, limit: int = 20, recent_days: float = 7, as_of: Instant | None = None
) -> Profile:
    """The profile within the filters; what an assistant or a tool said is left out.

    Args:
        limit: of memories in each part.
        recent_days: how long what was stored counts as recent.
        as_of: when it holds; None: now.

    Raises:
        ValueError: no filter is given: a profile is somebody's.
    """
    if not filters.checked().given:
        raise ValueError("A profile is somebody's. Give user_id, agent_id or run_id.")
    limit = whole_number(limit, "limit")
    recent_days = checked_days(recent_days, "recent_days")
    until = now() if as_of is None else to_micros(as_of, "as_of")
    span: dict[str, int] = {"since": until - int(recent_days * _DAY), "until": until, "limit": limit}
    return Profile(tuple(store.stable(filters, **span)), tuple(store.recent(filters, **span)))


def checked_days(value: float, name: str) -> float:
    """Itself.

    Raises:
        ValueError: it is no number, or reaches beyond the calendar.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= _MOST_DAYS:
        raise ValueError(f"{name} is {value!r}. Give a number from 0 to {_MOST_DAYS}.")
    return value
