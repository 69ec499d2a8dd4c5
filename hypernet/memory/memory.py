"""Memory: what users said, remembered with its dates, found, corrected and forgotten. No network and no model needed.

memory = Memory.open("outputs/memory")                       # model="assets/tiny" searches by meaning too
ref = memory.add("Fenda Elfax was taught by Orla Wint.", user_id="alice", valid_at="2026-03-01")
memory.add([{"role": "user", "content": "I moved to Halvawold"}], user_id="alice", run_id="chat-7")
memory.search("Who taught Fenda Elfax?", user_id="alice", limit=5, as_of="2026-04-01")
memory.update(ref.id, "Fenda Elfax was taught by Jorun Pell.", valid_at="2026-06-01")
memory.delete(ref.id, reason="asked"); memory.rollback("v4"); memory.delete_all(user_id="alice"); memory.purge()

memory = Memory.open("outputs/memory", model="assets/tiny")  # loaded when it is first needed
memory.write_adapters(user_id="alice")                       # one slot for each version, by one forward pass
memory.ask("Who taught Fenda Elfax?", user_id="alice", tier="adapter").text
memory.forget(ref.id).passed                                 # as if it had never been there

A filter that is not given does not restrict; `delete_all` without any is refused.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from hypernet.adapters.break_even import Costs, break_even
from hypernet.memory.ask import Answer, Asker, Case, Effect, MemoryQuestion
from hypernet.memory.audit import DeletionAudit, ForgetReport, left_twins, remove_twins
from hypernet.memory.bank import AdapterBank, Written
from hypernet.memory.capture import Conversation, Message, drafts_of
from hypernet.memory.embedding import Embedder, LazyModel, open_embedder
from hypernet.memory.exchange import read_drafts, write_memories
from hypernet.memory.extraction import Extractor
from hypernet.memory.ledger import TIERS, CostLedger, Measured
from hypernet.memory.profile import Profile, profile
from hypernet.memory.retriever import Retriever, check_settings
from hypernet.memory.store.copying import copy_memory
from hypernet.memory.store.database import check_folder, check_outside
from hypernet.memory.store.records import (
    Batch,
    Draft,
    Filters,
    HistoryEntry,
    Hit,
    MemoryRef,
    MemoryVersion,
    checked_conflict,
)
from hypernet.memory.store.times import Instant
from hypernet.memory.store.token_store import TokenStore, Verification
from hypernet.memory.traces.kept import erase_stale, is_stale
from hypernet.memory.use.utilities import Utilities
from hypernet.memory.weights.versions import erase_purged, has_purged
from hypernet.text.cleaning import whole

if TYPE_CHECKING:
    from hypernet.doc_to_lora import DocToLoRA


class Memory:
    """Delegates: `store` keeps, `retriever` finds, `bank` holds adapters, `asker` answers, `utilities` learns which are
    useful. `Memory.open` makes them.

    Args:
        extractor: gives added texts their keys, see `hypernet.memory.extraction`; None: keys are only what is given.
    """

    def __init__(
        self,
        store: TokenStore,
        retriever: Retriever,
        *,
        bank: AdapterBank | None = None,
        extractor: Extractor | None = None,
        limit: int = 5,
        max_new_tokens: int = 32,
        search_above: int | None = 100,
        num_adapter_candidates: int = 20,
    ) -> None:
        self.store, self.retriever, self.extractor = store, retriever, extractor
        self.bank, self.ledger = bank or AdapterBank(store), CostLedger(store)
        self.utilities = Utilities(store)
        numbers = {"limit": limit, "max_new_tokens": max_new_tokens, "num_adapter_candidates": num_adapter_candidates}
        self.asker = Asker(store, retriever, self.bank, self.ledger, search_above=search_above, **numbers)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        database: str | None = None,
        model: "str | Path | DocToLoRA | None" = None,
        embedder: str | Path | Embedder | None = None,
        conflict: str = "latest",
        source_priority: Sequence[str] = (),
        extractor: Extractor | None = None,
        num_candidates: int = 50,
        dense_weight: float = 0.5,
        limit: int = 5,
        max_new_tokens: int = 32,
        search_above: int | None = 100,
        num_adapter_candidates: int = 20,
        join: str = "route",
        top_k: int | None = None,
        gate_power: float | None = None,
        shard_memories: int = 128,
        pass_chunks: int = 16,
        dtype: str = "float16",
        create: bool = True,
    ) -> Self:
        """A folder's memory, made where it is missing.

        Args:
            database: URL of PostgreSQL, see `TokenStore`; None: what the folder has, or SQLite.
            model: checkpoint, hub name or folder: it answers, writes adapters, and its embeddings find by meaning. Of a
                base model the latter alone. Loaded when it is first needed. None: words alone.
            embedder: instead of the model's: "sentence-transformers:<name>", or any `Embedder`.
            conflict, source_priority: what an added memory does to others with its key, see `TokenStore`.
            num_candidates, dense_weight: see `Retriever`.
            limit, max_new_tokens: memories in a prompt and tokens of an answer, see `Asker`.
            search_above, num_adapter_candidates: whether a search comes before the adapters, see `Asker`.
            join, top_k, gate_power, shard_memories, pass_chunks, dtype: of adapters, see `AdapterBank`.
            create: whether it may be made.

        Raises:
            ValueError: the folder is no memory, there is no such model, or a setting is impossible.
            OSError: it cannot be read or written.
        """
        # Found before a folder is made: a folder of something else, settings, the model.
        check_folder(Path(folder).expanduser(), create=create, url=database)
        check_settings(num_candidates, dense_weight)
        checked_conflict(conflict)
        lazy = None if model is None else LazyModel(model)
        chosen = open_embedder(embedder) if isinstance(embedder, (str, Path)) else embedder or lazy
        shared: dict[str, Any] = {"conflict": conflict, "source_priority": source_priority}
        store = TokenStore(folder, create=create, database=database, **shared)
        retriever = Retriever(store, embedder=chosen, num_candidates=num_candidates, dense_weight=dense_weight)
        joined = {"join": join, "top_k": top_k, "gate_power": gate_power}
        stored = {"shard_memories": shard_memories, "pass_chunks": pass_chunks, "dtype": dtype}
        bank = AdapterBank(store, lazy, **joined, **stored)  # type: ignore[arg-type]
        numbers = {"limit": limit, "max_new_tokens": max_new_tokens, "num_adapter_candidates": num_adapter_candidates}
        return cls(store, retriever, bank=bank, extractor=extractor, search_above=search_above, **numbers)

    def close(self) -> None:
        self.store.close()

    # --- Writing ----------------------------------------------------------------------------------------------------

    def add(
        self,
        content: str | Sequence[Message],
        *,
        user_id: str | None = None,
        agent_id: str | None = None,
        run_id: str | None = None,
        subject: str | None = None,
        relation: str | None = None,
        valid_at: Instant | None = None,
        invalid_at: Instant | None = None,
        source: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        conflict: str | None = None,
        derived_from: Sequence[str | MemoryRef] = (),
    ) -> Any:
        """Remembers a text, or each message of a chat.

        Args:
            subject, relation: the key: the user's memory with the same one gets a new version. None: it stands alone.
            valid_at, invalid_at: when it was or will be true; None: from now on, without an end.
            source: where it comes from, for people and for `source_priority`.
            metadata: JSON that is given back.
            conflict: instead of the memory's own, see `TokenStore`.
            derived_from: id@version of memories that it was made of; it is deleted with any of them.

        Returns:
            A MemoryRef: id, version and batch; for a chat a list of them.

        Raises:
            ValueError: there is no text, a date is impossible, only half a key is given, ...
        """
        filters = Filters(user_id, agent_id, run_id)
        common: dict[str, Any] = {
            **{
                "valid_at": valid_at,
                "invalid_at": invalid_at,
                "source": source,
                "metadata": {} if metadata is None else metadata,
            },
            **{"conflict": conflict, "derived_from": tuple(map(str, derived_from))},
        }
        if not isinstance(content, str) and (not isinstance(content, Sequence) or isinstance(content, bytes)):
            raise ValueError(f"A memory is a text or a list of messages, not {content!r}.")
        if not isinstance(content, str):
            if subject is not None or relation is not None:
                raise ValueError("A chat has no single subject and relation. Add its messages one by one.")
            return self.store.add(self._keyed(drafts_of(content, filters, **common)))
        draft = Draft(text=content, filters=filters, subject=subject, relation=relation, **common)
        return self.store.add(self._keyed([draft]))[0]

    def update(
        self,
        key: str | MemoryRef,
        content: str,
        *,
        valid_at: Instant | None = None,
        invalid_at: Instant | None = None,
        source: str | None = None,
    ) -> MemoryRef:
        """States a memory anew from `valid_at` (None: now) on. The versions before stay, and hold until then."""
        content = whole(content, "content") if isinstance(content, str) else content
        return self.store.update(_key(key), content, valid_at=valid_at, invalid_at=invalid_at, source=source)

    def invalidate(self, key: str | MemoryRef, *, at: Instant | None = None) -> MemoryRef:
        """States that a memory no longer holds from `at` (None: now) on."""
        return self.store.invalidate(_key(key), at=at)

    def delete(self, key: str | MemoryRef, *, reason: str | None = None) -> Batch:
        """Takes a memory, or one id@version of it, and what was derived from it out of everything."""
        return self.store.delete(_key(key), reason=reason)

    def delete_all(
        self,
        *,
        user_id: str | None = None,
        agent_id: str | None = None,
        run_id: str | None = None,
        reason: str | None = None,
    ) -> Batch:
        """Deletes what matches every filter that is given. ValueError without any: it never means everybody."""
        return self.store.delete_all(Filters(user_id, agent_id, run_id), reason=reason)

    def restore(self, key: str | MemoryRef) -> Batch:
        """Brings a deleted memory back, until it is purged."""
        return self.store.restore(_key(key))

    def rollback(self, version: str) -> Batch:
        """Takes a batch back, as if it had never been. A rollback can be rolled back too."""
        return self.store.rollback(version)

    def purge(
        self,
        key: str | MemoryRef | None = None,
        *,
        user_id: str | None = None,
        agent_id: str | None = None,
        run_id: str | None = None,
    ) -> Batch:
        """Erases the content of what was deleted or taken back from the folder, with its adapters and traces and every
        version of weights and trained retriever that it went into. There is no way back."""
        batch = self.store.purge(None if key is None else _key(key), Filters(user_id, agent_id, run_id))
        self.bank.sweep()
        erase_purged(self.store)
        erase_stale(self.store)
        return batch

    def forget(
        self,
        key: str | MemoryRef,
        *,
        verify: bool = True,
        reason: str | None = None,
        questions: Sequence[tuple[str, str]] | None = None,
    ) -> ForgetReport:
        """Deletes a memory, what was derived from it and its adapters, and compares what is left with a twin that never
        had it; the report goes to deletions.jsonl. `purge` erases the content.

        Args:
            verify: False compares nothing.
            questions: (question, answer) pairs that the memory answers, for the membership test; None: made of it.
        """
        cases = None if questions is None else _cases(questions)
        return DeletionAudit(self.asker).forget(_key(key), reason=reason, verify=verify, cases=cases)

    def write_adapters(
        self,
        *,
        user_id: str | None = None,
        agent_id: str | None = None,
        run_id: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Written:
        """Gives every version within the filters its adapter; those that are there stay.

        Args:
            progress: called with (memories done, memories to be written), after each pass.
        """
        return self.bank.write(Filters(user_id, agent_id, run_id), progress=progress)

    @contextmanager
    def capture(
        self, *, user_id: str | None = None, agent_id: str | None = None, run_id: str | None = None
    ) -> Iterator[Conversation]:
        """Records a conversation: `turn.user(text)`, `turn.assistant(text)`; `turn.version` takes it back."""
        yield Conversation(self.store, Filters(user_id, agent_id, run_id).checked())

    def import_jsonl(
        self, path: str | Path, *, format: str = "plain", user_id: str | None = None, agent_id: str | None = None
    ) -> Batch:
        """Adds a file's memories in one batch: all of them or none.

        What was here before under the same id, deleted or not, is left out: a deleted memory does not come back.

        Args:
            format: "plain", "mem0", "graphiti" or "letta", see `hypernet.memory.exchange`.
            user_id, agent_id: whose they become where the file does not say.

        Raises:
            ValueError: as `read_drafts`; or the file says that one is another user's or agent's than is given.
        """
        given = Filters(user_id, agent_id).checked()
        drafts = [_owned(draft, given, number) for number, draft in enumerate(read_drafts(path, format=format), 1)]
        refs = self.store.add(drafts, operation="import")
        version = refs[0].batch if refs else ""
        return Batch(version, "import", tuple(map(str, refs)), num_known=len(drafts) - len(refs))

    def export_jsonl(
        self,
        path: str | Path,
        *,
        format: str = "plain",
        user_id: str | None = None,
        agent_id: str | None = None,
        run_id: str | None = None,
    ) -> int:
        """Writes memories to a file, and returns how many lines.

        "plain" has every version, so that importing it gives the same view at every date; the others what holds now.

        Raises:
            ValueError: the file would lie in a memory's folder, where it could take the place of what is kept.
            OSError: it cannot be written.
        """
        check_outside(Path(path).expanduser())
        filters = Filters(user_id, agent_id, run_id)
        found = self.store.statements(filters) if format == "plain" else self.store.valid(filters)
        return write_memories(found, path, format=format)

    def copy(self, folder: str | Path, *, database: str | None = None) -> dict[str, int]:
        """Copies the whole memory into a new folder, of `database` (None: SQLite): every version, deleted ones too,
        events, batches, times, vectors, costs and adapters, under the same numbers. Returns table → rows.

        Raises:
            ValueError: the folder or the database holds something, or a text has U+0000 and it is PostgreSQL.
            OSError: it cannot be written or reached.
        """
        return copy_memory(self.store, folder, database=database)

    # --- Asking -----------------------------------------------------------------------------------------------------

    def ask(
        self,
        question: str,
        *,
        user_id: str | None = None,
        agent_id: str | None = None,
        run_id: str | None = None,
        tier: str = "auto",
        accuracy: float = 0.9,
        as_of: Instant | None = None,
        known_at: Instant | None = None,
    ) -> Answer:
        """Answers from the memories within the filters; the answer names its tier and its memories.

        Args:
            tier: "token" (found memories in the prompt), "adapter" (their adapters), "none", or "auto": the cheapest
                that has measured `accuracy`, see `measure`.
            as_of, known_at: as `search`.

        Raises:
            ValueError: there is no checkpoint; adapters are missing (`write_adapters`); ...
        """
        whose = Filters(user_id, agent_id, run_id)
        (answer,) = self.asker.ask([MemoryQuestion(question, whose, as_of, known_at)], tier=tier, accuracy=accuracy)
        return answer

    def ask_many(
        self,
        questions: Sequence[str],
        *,
        user_ids: Sequence[str | None],
        tier: str = "auto",
        accuracy: float = 0.9,
        as_of: Instant | None = None,
        known_at: Instant | None = None,
    ) -> tuple[Answer, ...]:
        """Answers questions of several users in one pass, each from its own user's memories alone.

        Args:
            user_ids: one for each question.
        """
        if isinstance(questions, str) or len(questions) != len(user_ids):
            raise ValueError(f"Got {len(user_ids)} user_ids for {len(questions)} questions. Give lists of one length.")
        pairs = zip(questions, user_ids, strict=True)
        asked = [MemoryQuestion(question, Filters(user), as_of, known_at) for question, user in pairs]
        return tuple(self.asker.ask(asked, tier=tier, accuracy=accuracy))

    def explain(self, answer: Answer) -> tuple[Effect, ...]:
        """For each memory behind an answer log p(answer) with it and as if it had never been there."""
        return tuple(self.asker.explain(answer))

    def measure(
        self,
        *,
        user_id: str | None = None,
        agent_id: str | None = None,
        run_id: str | None = None,
        questions: Sequence[tuple[str, str]] | None = None,
        tiers: Sequence[str] = TIERS,
    ) -> tuple[Measured, ...]:
        """Asks held questions of each tier and keeps accuracy and cost, by which `ask` chooses.

        Args:
            questions: (question, answer) pairs; None: one made of each keyed memory, see `Asker.measure`.
        """
        cases = None if questions is None else _cases(questions)
        return tuple(self.asker.measure(Filters(user_id, agent_id, run_id), cases, tiers=tiers))

    # --- Reading ----------------------------------------------------------------------------------------------------

    def search(
        self,
        question: str,
        *,
        user_id: str | None = None,
        agent_id: str | None = None,
        run_id: str | None = None,
        limit: int = 5,
        as_of: Instant | None = None,
        known_at: Instant | None = None,
    ) -> tuple[Hit, ...]:
        """What answers best of what holds at `as_of` (None: now), as it was known at `known_at` (None: now)."""
        filters = Filters(user_id, agent_id, run_id)
        return tuple(self.retriever.search(question, filters, limit=limit, as_of=as_of, known_at=known_at))

    def get(
        self, key: str | MemoryRef, *, as_of: Instant | None = None, known_at: Instant | None = None
    ) -> MemoryVersion:
        """A memory by id or id@version. ValueError if it is unknown or deleted."""
        return self.store.get(_key(key), as_of=as_of, known_at=known_at)

    def list(
        self,
        *,
        user_id: str | None = None,
        agent_id: str | None = None,
        run_id: str | None = None,
        limit: int | None = None,
        as_of: Instant | None = None,
        known_at: Instant | None = None,
    ) -> tuple[MemoryVersion, ...]:
        """What holds at `as_of`, as it was known at `known_at`, in the order stored."""
        filters = Filters(user_id, agent_id, run_id)
        return tuple(self.store.valid(filters, as_of=as_of, known_at=known_at, limit=limit))

    def history(self, key: str | MemoryRef) -> tuple[HistoryEntry, ...]:
        """Everything that happened to a memory, the oldest first; also of a deleted one, without its text."""
        return tuple(self.store.history(_key(key)))

    def profile(
        self,
        *,
        user_id: str | None = None,
        agent_id: str | None = None,
        run_id: str | None = None,
        limit: int = 20,
        recent_days: float = 7,
        as_of: Instant | None = None,
    ) -> Profile:
        """Stable facts and recent ones; `str` of it goes into a prompt."""
        filters = Filters(user_id, agent_id, run_id)
        return profile(self.store, filters, limit=limit, recent_days=recent_days, as_of=as_of)

    def versions(self) -> tuple[dict[str, Any], ...]:
        """Every batch, the oldest first, as `rollback` names them."""
        return tuple(self.store.versions())

    def status(
        self, *, user_id: str | None = None, agent_id: str | None = None, run_id: str | None = None
    ) -> dict[str, Any]:
        """memories, versions, valid_now, deleted (waiting for `purge`), bytes of the folder and of PostgreSQL's tables,
        is_unfinished (a purge or a write was interrupted), and tiers: of "token" and "adapter" a dict each.

        memories, valid_now: versions in the tier. missing, stale: without an adapter, and adapters that answer nothing
        (deleted, or of another hypernetwork or base model; `counts` has each). accuracy, oracle, questions,
        question_tokens, question_s, measured_at: what `measure` found last, or None. break_even: questions after which
        the adapters were cheaper than the prompt, inf: never, None: not measured.
        """
        filters = Filters(user_id, agent_id, run_id)
        counts = self.store.counts(filters)
        num_bytes = sum(path.stat().st_size for path in self.store.folder.rglob("*") if path.is_file())
        num_bytes += self.store.database.num_bytes()
        is_unfinished = (
            self.store.is_unfinished
            or self.bank.is_unfinished
            or bool(left_twins(self.store.folder))
            or has_purged(self.store)
            or is_stale(self.store)
        )
        return {**counts, "bytes": num_bytes, "is_unfinished": is_unfinished, "tiers": self._tiers(filters, counts)}

    def _tiers(self, filters: Filters, counts: dict[str, int]) -> dict[str, dict[str, Any]]:
        generator = self.bank.generator if self.bank.can_write else self.bank.last_generator(filters)
        slots = self.bank.counts(filters, generator)
        measured = self.ledger.latest(filters, generator=generator, base_model=None)
        token, adapter = measured.get("token"), measured.get("adapter")
        even = None
        if token and adapter:
            even = break_even(Costs(adapter.prepare_s, adapter.question_s), Costs(token.prepare_s, token.question_s))
        return {
            "token": {
                **{"memories": counts["versions"], "valid_now": counts["valid_now"], "missing": 0, "stale": 0},
                **{"bytes": self.store.content_bytes(filters), **_said(token), "break_even": None},
            },
            "adapter": {
                **{"memories": slots.slots, "valid_now": slots.valid_now, "missing": slots.missing},
                **{"stale": slots.stale, "bytes": slots.bytes, **_said(adapter), "break_even": even},
                "counts": slots._asdict(),
            },
        }

    def verify(self) -> Verification:
        """Compares everything with what was stored, and finishes what a killed process had begun."""
        found = self.store.verify()
        if found.damage:
            return found
        repaired = [*found.repaired, *self.bank.verify()]
        if number := remove_twins(self.store):
            repaired.append(f"{number} folders of interrupted audits")
        if erased := erase_purged(self.store):
            repaired.append(f"weights with purged memories: {', '.join(erased)}")
        if erase_stale(self.store):
            repaired.append("a trained retriever that saw deleted traces")
        return found._replace(repaired=tuple(repaired))

    # --- Inside -----------------------------------------------------------------------------------------------------

    def _keyed(self, drafts: Sequence[Draft]) -> Sequence[Draft]:
        """With whole characters; and with keys, where an extractor finds exactly one in a text that has none."""
        found = []
        for draft in drafts:
            content = whole(draft.text, "content") if isinstance(draft.text, str) else draft.text
            values = vars(draft) | {"text": content}
            if self.extractor and content and draft.subject is None and len(facts := self.extractor(content)) == 1:
                if facts[0].text.strip() == content.strip():
                    values |= {"subject": facts[0].subject, "relation": facts[0].relation}
            found.append(Draft(**values))
        return found


def _cases(questions: Sequence[tuple[str, str]]) -> list[Case]:
    """ValueError unless each is a question and its answer."""
    for pair in questions:
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(text, str) and text.strip() for text in pair):
            raise ValueError(f"{pair!r} is no question with its answer. Give pairs of texts.")
    return [Case(question, (answer,)) for question, answer in questions]


def _said(measured: Measured | None) -> dict[str, Any]:
    names = ("accuracy", "oracle", "questions", "question_tokens", "question_s")
    values = {name: None if measured is None else getattr(measured, name) for name in names}
    return {**values, "measured_at": None if measured is None else measured.at}


def _key(key: str | MemoryRef) -> str:
    """A ref that a call returned means the whole memory; one version is asked for as "id@version"."""
    return key.id if isinstance(key, MemoryRef) else str(key)


def _owned(draft: Draft, given: Filters, number: int) -> Draft:
    """ValueError if it is somebody else's: what is asked to be one user's does not go to another, nor the other way."""
    for name, own, other in zip(Filters._fields, draft.filters, given, strict=True):
        if own is not None and other is not None and own != other:
            raise ValueError(
                f"Memory {number} of the file has {name} {own!r}, and {other!r} was given. Give none to keep the "
                f"file's, or change {name} in the file."
            )
    filters = Filters(*(own or other for own, other in zip(draft.filters, given, strict=True)))
    return Draft(**(vars(draft) | {"filters": filters}))
