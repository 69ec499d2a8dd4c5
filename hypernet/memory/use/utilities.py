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

from hypernet.memory.store.reading import named, same, unknown, within
from hypernet.memory.store.records import EVERYBODY, Batch, Filters, Hit, split_ref
from hypernet.memory.store.schema import memories, utilities
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
        found: dict[str, Utility] = {}
        with self.store.database.write() as connection:
            for ref in dict.fromkeys(refs):
                identity, version = _split(ref)
                known = self._stored(connection, identity, version)
                before = known or Utility(self.initial, 0)
                after = Utility(before.value + self.rate * (outcome - before.value), before.outcomes + 1)
                values = {**after._asdict(), "updated_at": now()}
                if known:
                    where = (utilities.c.memory_id == identity, utilities.c.version == version)
                    connection.execute(update(utilities).where(*where).values(values))
                else:
                    named_values = {"memory_id": identity, "version": version, **values}
                    connection.execute(insert(utilities).values(named_values))
                found[ref] = after
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
            return self._stored(connection, *_split(ref)) or Utility(self.initial, 0)

    def ranked(self, hits: Sequence[Hit]) -> list[Hit]:
        """The hits of a search, the one to act upon first.

        By (1 - weight) · z(score) + weight · z(utility), z(x) = (x - mean) / standard deviation over these hits, 0
        where all are equal; of equals the one that the search had first.
        """
        with self.store.database.read() as connection:
            known = [self._stored(connection, hit.id, hit.version) for hit in hits]
        values = [self.initial if one is None else one.value for one in known]
        scores = mixed([hit.score for hit in hits], values, weight=self.weight)
        return [hits[place] for place in sorted(range(len(hits)), key=lambda place: (-scores[place], place))]

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

    def _stored(self, connection: Connection, identity: str, version: int) -> Utility | None:
        """Raises ValueError unless the memory is live."""
        own = same(memories.c, utilities.c.memory_id, utilities.c.version)
        columns = (memories.c.seq, utilities.c.value, utilities.c.outcomes)
        statement = select(*columns).outerjoin(utilities, own).where(memories.c.live, *named(identity, version))
        row = connection.execute(statement).first()
        if row is None:
            raise unknown(f"{identity}@{version}")
        return None if row.value is None else Utility(row.value, row.outcomes)


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
