"""Sleep: is it due? Then adapters are written, memories consolidated, judged, made live, and handed over.

night = Sleep(consolidation, cadence=EveryN(memories=25)).run(Filters(user_id="alice"))
night.reason, night.version, night.promoted

Every step leaves either nothing or all of it on the disk, and is skipped where it is done: who was killed sleeps again
and goes on, training from its last checkpoint.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from hypernet.consolidation.cadence import Cadence, EveryN, Waiting
from hypernet.consolidation.consolidation import Consolidation
from hypernet.memory.store.records import Filters
from hypernet.memory.store.times import Instant, now, to_micros

_DAY = 86_400_000_000  # microseconds


class Night(NamedTuple):
    """What a sleep did.

    Attributes:
        slept: whether it was due. reason: why not, or what came of it.
        version: the candidate. promoted: whether it is live now. waiting: memories that waited before.
        handed_over: of the live weights' memories, those that left their adapters.
    """

    slept: bool
    reason: str
    version: str | None = None
    promoted: bool = False
    waiting: int = 0
    handed_over: int = 0
    seconds: float = 0.0


class Sleep:
    """One memory's nights."""

    def __init__(self, consolidation: Consolidation, *, cadence: Cadence | None = None) -> None:
        self.consolidation, self.cadence = consolidation, cadence or EveryN()

    def run(
        self,
        filters: Filters,
        *,
        at_once: bool = False,
        at: Instant | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Night:
        """One night.

        Args:
            at_once: whether or not it is due.
            at: when; None: now.
        """
        started, own = time.perf_counter(), self.consolidation
        waiting = own.waiting(filters)
        if not waiting:
            self._finish(filters)
            return Night(False, "nothing waits")
        if not at_once and not self.cadence.is_due(self.waiting(filters, at=at)):
            return Night(False, f"not due: {len(waiting)} wait", waiting=len(waiting))
        own.memory.write_adapters(**filters._asdict())
        candidate = own.consolidate(filters, progress=progress)
        if candidate.passed:
            own.promote(candidate.name, filters)
        failed = () if candidate.gate is None else candidate.gate["failed"]
        return Night(
            True,
            "passed the gate" if candidate.passed else "refused: " + "; ".join(failed),
            candidate.name,
            candidate.passed,
            len(waiting),
            len(own.handed_over(filters)),
            time.perf_counter() - started,
        )

    def waiting(self, filters: Filters, *, at: Instant | None = None) -> Waiting:
        """What the cadence sees, in days."""
        own = self.consolidation
        until = now() if at is None else to_micros(at, "at")
        arrived = sorted(to_micros(memory.created_at, "created_at") / _DAY for memory in own.waiting(filters))
        judged = [version.gate["at"] for version in own.versions(filters).all() if version.gate is not None]
        first = min((to_micros(m.created_at, "created_at") for m in own.memory.store.valid(filters)), default=until)
        last = max((to_micros(at, "at") for at in judged), default=first)
        return Waiting(arrived, last / _DAY, until / _DAY)

    def _finish(self, filters: Filters) -> None:
        """What a killed process may have left between making a version live and handing over."""
        if self.consolidation.live(filters) is not None and not self.consolidation.handed_over(filters):
            self.consolidation.hand_over(filters)
