"""CostLedger: what each tier was measured to answer and to cost, for whom and when, and which one is to answer.

ledger = CostLedger(store)
ledger.add(Measured(tier="adapter", accuracy=0.93, question_s=0.012, ...), Filters(user_id="alice"))
ledger.choose(Filters(user_id="alice"), accuracy=0.9, memories=120, generator=..., base_model=...)
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from sqlalchemy import insert, select

from hypernet.memory.store.records import Filters
from hypernet.memory.store.schema import costs
from hypernet.memory.store.times import now, to_text
from hypernet.memory.store.token_store import TokenStore

TIERS = ("none", "adapter", "token")  # of equal cost, the first
# A tier answers less well among more memories, so its accuracy counts for up to so many times those that it was
# measured with: routed, one-sentence memories of the tiny model lose .03 from 10 to 50 and .09 more to 300.
MOST_GROWTH = 2.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one tier was measured to do.

    Attributes:
        reference: what an answer is compared with: "given" answers, or the "oracle": the base model's with the memory
            alone in its prompt.
        memories: that held. questions: asked, each once.
        accuracy: share of exact matches. oracle: the same with the memory alone in the prompt; None: not known.
        question_tokens: that the tier adds to a prompt, the mean. question_s: median seconds of one question by itself.
        prepare_s: of writing what the tier uses, once.
        at: when, ISO 8601; None: now.
    """

    tier: str
    generator: str | None
    base_model: str
    reference: str
    memories: int
    questions: int
    accuracy: float
    oracle: float | None
    question_tokens: float
    question_s: float
    prepare_s: float
    at: str | None = None


class Chosen(NamedTuple):
    """A tier and why, in a sentence."""

    tier: str
    reason: str


class CostLedger:
    """The measurements of one memory."""

    def __init__(self, store: TokenStore) -> None:
        self.store = store

    def add(self, measured: Measured, filters: Filters) -> Measured:
        """Keeps it, and returns it with the time at which it was kept."""
        at = now()
        values = {**asdict(measured), "at": at, **filters._asdict()}
        with self.store.database.write() as connection:
            connection.execute(insert(costs).values(values))
        return replace(measured, at=to_text(at))

    def latest(self, filters: Filters, *, generator: str | None, base_model: str | None) -> dict[str, Measured]:
        """Tier → its last measurement with exactly these filters, generator and base model (None: of any)."""
        where = [costs.c[name].is_not_distinct_from(value) for name, value in filters._asdict().items()]
        if base_model is not None:
            where.append(costs.c.base_model == base_model)
        with self.store.database.read() as connection:
            rows = connection.execute(select(costs).where(*where).order_by(costs.c.number)).all()
        names = Measured.__dataclass_fields__
        found = {}
        for row in rows:
            if row.generator is None or generator is None or row.generator == generator:
                values = {name: row._mapping[name] for name in names if name != "at"}
                found[row.tier] = Measured(**values, at=to_text(row.at))
        return found

    def choose(self, found: Mapping[str, Measured], *, accuracy: float, memories: int, ready: bool) -> Chosen:
        """The cheapest tier that has measured the accuracy asked for.

        Args:
            found: what `latest` gave.
            accuracy: at least so much.
            memories: that hold now.
            ready: whether all of them have adapters.

        Returns:
            Where none has, the most accurate one; where none was measured, "token".
        """
        usable = {
            tier: measured
            for tier, measured in found.items()
            if (tier != "adapter" or ready) and memories <= MOST_GROWTH * max(1, measured.memories)
        }
        if not usable:
            why = "no tier has been measured with these memories" if found else "no tier has been measured"
            return Chosen("token", f"{why}, see measure")

        def said(tier: str) -> str:
            m = usable[tier]
            return f"{m.accuracy:.2f} of {m.questions} questions on {str(m.at)[:10]}, {1e3 * m.question_s:.1f} ms each"

        enough = [tier for tier in TIERS if tier in usable and usable[tier].accuracy >= accuracy]
        if enough:
            best = min(enough, key=lambda tier: usable[tier].question_s)
            return Chosen(best, f"cheapest with at least {accuracy:g}: {said(best)}")
        best = max((tier for tier in TIERS if tier in usable), key=lambda tier: usable[tier].accuracy)
        return Chosen(best, f"none has measured {accuracy:g}; the most accurate: {said(best)}")
