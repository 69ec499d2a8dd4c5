"""TraceStore: which memories were in a prompt, and how much likelier each made the answer.

answer = memory.ask("Who taught Fenda Elfax?", user_id="alice", tier="token")
traces = TraceStore(memory.store)
traces.record(answer, memory.explain(answer))
traces.examples()                                    # question, texts, effects: what a retriever learns from

A trace belongs to all memories of its prompt, beside which its effects were measured: where one is deleted nobody reads
the trace, and `purge` erases both. A user's traces can also be deleted by themselves.
"""

import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Row, delete, func, insert, select

from hypernet.memory.ask import Answer, Effect
from hypernet.memory.store.reading import same
from hypernet.memory.store.records import EVERYBODY, Filters, split_ref
from hypernet.memory.store.schema import memories, traces
from hypernet.memory.store.times import now
from hypernet.memory.store.token_store import TokenStore


class Example(NamedTuple):
    """A question with the texts that were in its prompt, and by how many nats each moved log p of the answer.

    user_id: whose; None: nobody's.
    """

    question: str
    texts: tuple[str, ...]
    effects: tuple[float, ...]
    user_id: str | None = None


class TraceStore:
    """The traces of one memory."""

    def __init__(self, store: TokenStore) -> None:
        self.store = store

    def record(self, answer: Answer, effects: Sequence[Effect], *, base_model: str = "") -> int:
        """Keeps what `explain` found of an answer. Returns how many memories that were.

        Args:
            base_model: fingerprint of what answered.

        Raises:
            ValueError: an effect is of a memory that was not behind the answer.
        """
        if strange := [effect.memory for effect in effects if effect.memory not in answer.memories]:
            raise ValueError(f"{strange[0]} was not behind this answer. Record what explain gives of it.")
        common = {
            **{"asked": secrets.token_hex(8), "at": now(), "question": answer.question, "base_model": base_model},
            **{"user_id": answer.user_id, "agent_id": answer.agent_id, "run_id": answer.run_id},
        }
        rows = []
        for effect in effects:
            identity, version = split_ref(effect.memory)
            moved = {"log_p": effect.log_p, "log_p_without": effect.log_p_without}
            rows.append({**common, "memory_id": identity, "version": version, **moved})
        if rows:
            with self.store.database.write() as connection:
                connection.execute(insert(traces), rows)
        return len(rows)

    def examples(self, filters: Filters = EVERYBODY) -> list[Example]:
        """Of questions asked within the filters whose memories are all live; in an order that their content decides, so
        that what was deleted has left no gap."""
        where = [traces.c[name] == value for name, value in filters.checked().given.items()]
        statement = (
            select(traces, memories.c.text)
            .outerjoin(memories, same(memories.c, traces.c.memory_id, traces.c.version) & memories.c.live)
            .where(*where)
        )
        with self.store.database.read() as connection:
            rows = connection.execute(statement).all()
        prompts: dict[str, list[Row[Any]]] = {}
        for row in rows:
            prompts.setdefault(row.asked, []).append(row)
        examples = []
        for own in prompts.values():
            if all(row.text is not None for row in own):
                texts, effects = zip(*sorted((row.text, row.log_p - row.log_p_without) for row in own), strict=True)
                examples.append(Example(own[0].question, texts, effects, own[0].user_id))
        return sorted(examples, key=lambda one: (one.user_id or "", *one[:3]))

    def count(self) -> int:
        """Traces that are stored, those of deleted memories among them."""
        with self.store.database.read() as connection:
            return connection.execute(select(func.count()).select_from(traces)).scalar_one()

    def delete(self, filters: Filters) -> int:
        """Deletes the traces within the filters for good, and the pages that held them. Returns how many.

        Raises:
            ValueError: no filter is given: it never means everybody.
        """
        given = filters.checked().given
        if not given:
            raise ValueError("Deleting traces needs a filter: user_id, agent_id or run_id. It never means everybody.")
        with self.store.database.write() as connection:
            where = [traces.c[name] == value for name, value in given.items()]
            number = connection.execute(delete(traces).where(*where)).rowcount
        if number:
            self.store.database.erase()
        return number
