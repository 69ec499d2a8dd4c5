"""Utilities: how useful each memory was to what acted upon it, learned while it is used; no weight changes.

utilities = Utilities(store, rate=0.1)
hits = utilities.ranked(retriever.search(question, filters, limit=8))[:3]    # similarity finds, utility ranks
utilities.credit([hits[0].ref], outcome=1.0)                                 # of the one that was acted upon
utilities.evict(filters, keep=1000)                                          # the least useful go

Q ← Q + rate · (outcome - Q) is a mean of the outcomes in which the last ones count most. It belongs to id@version: a
new version begins anew, what is deleted has none, `restore` brings it back with its memory, and `purge` erases it. No
memory's utility is computed from another's, so that deleting one leaves the others as they were.

Source: MemRL, https://arxiv.org/abs/2601.03192
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from sqlalchemy import Connection, insert, select, update

from hypernet.memory.store.reading import same, unknown, within
from hypernet.memory.store.records import EVERYBODY, Batch, Filters, Hit, split_ref
from hypernet.memory.store.schema import among, memories, utilities
from hypernet.memory.store.times import now
from hypernet.memory.store.token_store import TokenStore


class Utility(NamedTuple):
    """value: mean of outcomes, the last ones counting most. outcomes: how many; 0: the value is the initial one."""

    value: float
    outcomes: int


class Utilities:
    """The utilities of one store's memories.

    Args:
        store: whose memories.
        rate: of learning, in (0, 1]; 1 keeps the last outcome alone.
        initial: of a memory without an outcome; above the outcomes of a bad one, so that what is untried gets its turn.
        weight: of utility against similarity in a ranking, from 0 (similarity alone) to 1 (utility alone).

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(self, store: TokenStore, *, rate: float = 0.1, initial: float = 0.5, weight: float = 0.5) -> None:
        if not 0 < rate <= 1 or not 0 <= weight <= 1 or not math.isfinite(initial):
            raise ValueError(
                f"rate is {rate}, weight {weight} and initial {initial}. Give a rate above 0 up to 1, a weight from 0 "
                "to 1 and a finite number."
            )
        self.store, self.rate, self.initial, self.weight = store, rate, initial, weight

    def credit(self, refs: Iterable[str], outcome: float) -> dict[str, Utility]:
        """Learns from one outcome, and returns what became of each id@version.

        Args:
            refs: the memories that were acted upon. Not all that were in the prompt: an outcome says nothing about
                those that were only read.

        Raises:
            ValueError: the outcome is not finite, or there is no such memory; then nothing is learned.
        """
        if not math.isfinite(outcome):
            raise ValueError(f"The outcome is {outcome}. Give a finite number, such as 1 or 0 for success or not.")
        wanted = list(dict.fromkeys(refs))
        with self.store.database.write() as connection:
            known = self._known(connection, wanted)
            found = {
                ref: Utility(one.value + self.rate * (outcome - one.value), one.outcomes + 1)
                for ref, one in known.items()
            }
            at = now()
            for ref, after in found.items():
                identity, version = _split(ref)
                values = {**after._asdict(), "updated_at": at}
                if known[ref].outcomes:
                    where = (utilities.c.memory_id == identity, utilities.c.version == version)
                    connection.execute(update(utilities).where(*where).values(values))
                else:
                    connection.execute(insert(utilities).values(memory_id=identity, version=version, **values))
        return found

    def of(self, filters: Filters = EVERYBODY) -> dict[str, Utility]:
        """id@version → utility, of live memories within the filters that have had an outcome."""
        own = same(memories.c, utilities.c.memory_id, utilities.c.version)
        statement = select(utilities).join(memories, own).where(memories.c.live, *within(filters.checked()))
        with self.store.database.read() as connection:
            rows = connection.execute(statement.order_by(memories.c.seq)).all()
        return {f"{row.memory_id}@{row.version}": Utility(row.value, row.outcomes) for row in rows}

    def get(self, ref: str) -> Utility:
        """Of one id@version.

        Raises:
            ValueError: there is no such memory.
        """
        with self.store.database.read() as connection:
            return self._known(connection, [ref])[ref]

    def ranked(self, hits: Sequence[Hit]) -> list[Hit]:
        """The hits of a search, the one to act upon first.

        By (1 - weight) · z(score) + weight · z(utility), z(x) = (x - mean) / standard deviation over these hits, 0
        where all are equal. Of equals the more useful one, then the one that the search had first.
        """
        with self.store.database.read() as connection:
            known = self._known(connection, [hit.ref for hit in hits])
        values = [known[hit.ref].value for hit in hits]
        scores = mixed([hit.score for hit in hits], values, weight=self.weight)
        # Of two hits the z-scores are 1 and -1: by the default weight they are equal but for what is rounded.
        order = sorted(range(len(hits)), key=lambda place: (-round(scores[place], 9), -values[place], place))
        return [hits[place] for place in order]

    def evict(self, filters: Filters, *, keep: int, reason: str | None = "evicted by utility") -> Batch:
        """Deletes the least useful memories that hold now until so many are left; of equals the oldest go first.

        What was derived from one of them goes with it. One batch, which `rollback` takes back.

        Raises:
            ValueError: keep is below 0, or no filter is given.
        """
        if keep < 0 or not filters.checked().given:
            raise ValueError(f"evict needs a filter and keep from 0 on; got {filters} and {keep}.")
        known, held = self.of(filters), self.store.valid(filters)
        untried = Utility(self.initial, 0)
        worst = sorted(held, key=lambda memory: known.get(memory.ref, untried).value)  # stable: the oldest first
        return self.store.delete_versions([one.ref for one in worst[: max(0, len(held) - keep)]], reason=reason)

    def _known(self, connection: Connection, refs: Sequence[str]) -> dict[str, Utility]:
        """Of each id@version, in their order. Raises ValueError unless all are live."""
        own = same(memories.c, utilities.c.memory_id, utilities.c.version)
        columns = (memories.c.memory_id, memories.c.version, utilities.c.value, utilities.c.outcomes)
        where = (memories.c.live, among(memories.c.memory_id, [_split(ref)[0] for ref in refs]))
        rows = connection.execute(select(*columns).outerjoin(utilities, own).where(*where))
        found = {f"{row.memory_id}@{row.version}": row for row in rows}
        if (lacking := next((ref for ref in refs if ref not in found), None)) is not None:
            raise unknown(lacking)
        return {ref: Utility(self.initial, 0) if found[ref].value is None else Utility(*found[ref][2:]) for ref in refs}


def mixed(similarities: Sequence[float], values: Sequence[float], *, weight: float) -> list[float]:
    """(1 - weight) · z(similarities) + weight · z(values); z is 0 where all numbers are equal."""
    return [float(one) for one in (1 - weight) * _z(similarities) + weight * _z(values)]


def _z(values: Sequence[float]) -> np.ndarray:
    given = np.asarray(values, dtype=np.float64)
    spread = given.std() if len(given) else 0.0
    return (given - given.mean()) / spread if spread > 1e-12 else np.zeros_like(given)


def _split(ref: str) -> tuple[str, int]:
    identity, version = split_ref(ref)
    if version is None:
        raise ValueError(f"{ref} has no version. Give id@version, as a hit's ref.")
    return identity, version
