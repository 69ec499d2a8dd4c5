"""Memory: what users said, remembered with its dates, found, corrected and forgotten. No network and no model needed.

memory = Memory.open("outputs/memory")                       # model="assets/tiny" searches by meaning too
ref = memory.add("Fenda Elfax was taught by Orla Wint.", user_id="alice", valid_at="2026-03-01")
memory.add([{"role": "user", "content": "I moved to Halvawold"}], user_id="alice", run_id="chat-7")
memory.search("Who taught Fenda Elfax?", user_id="alice", limit=5, as_of="2026-04-01")
memory.update(ref.id, "Fenda Elfax was taught by Jorun Pell.", valid_at="2026-06-01")
memory.delete(ref.id, reason="asked"); memory.rollback("v4"); memory.delete_all(user_id="alice"); memory.purge()

A filter that is not given does not restrict; `delete_all` without any is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from hypernet.memory.capture import Conversation, Message, drafts_of
from hypernet.memory.embedding import Embedder, open_embedder
from hypernet.memory.exchange import read_drafts, write_memories
from hypernet.memory.extraction import Extractor
from hypernet.memory.profile import Profile, profile
from hypernet.memory.retriever import Retriever, check_settings
from hypernet.memory.store.database import check_folder
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
from hypernet.text.cleaning import whole


class Memory:
    """Delegates: `store` keeps, `retriever` finds. `Memory.open` makes both.

    Args:
        extractor: gives added texts their keys, see `hypernet.memory.extraction`; None: keys are only what is given.
    """

    def __init__(self, store: TokenStore, retriever: Retriever, *, extractor: Extractor | None = None) -> None:
        self.store, self.retriever, self.extractor = store, retriever, extractor

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        model: str | Path | None = None,
        embedder: str | Path | Embedder | None = None,
        conflict: str = "latest",
        source_priority: Sequence[str] = (),
        extractor: Extractor | None = None,
        num_candidates: int = 50,
        dense_weight: float = 0.5,
        create: bool = True,
    ) -> Self:
        """A folder's memory, made where it is missing.

        Args:
            model: base model or checkpoint, hub name or folder; its embeddings find by meaning. None: words alone.
            embedder: instead of the model's: "sentence-transformers:<name>", or any `Embedder`.
            conflict, source_priority: what an added memory does to others with its key, see `TokenStore`.
            num_candidates, dense_weight: see `Retriever`.
            create: whether it may be made.

        Raises:
            ValueError: the folder is no memory, there is no such model, or a setting is impossible.
            OSError: it cannot be read or written.
        """
        # Found before a folder is made: a folder of something else, settings, the model.
        check_folder(Path(folder).expanduser(), create=create)
        check_settings(num_candidates, dense_weight)
        checked_conflict(conflict)
        source = embedder if embedder is not None else model
        chosen = open_embedder(source) if isinstance(source, (str, Path)) else source
        store = TokenStore(folder, create=create, conflict=conflict, source_priority=source_priority)
        retriever = Retriever(store, embedder=chosen, num_candidates=num_candidates, dense_weight=dense_weight)
        return cls(store, retriever, extractor=extractor)

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
        """Erases the content of what was deleted or taken back from the folder. There is no way back."""
        return self.store.purge(None if key is None else _key(key), Filters(user_id, agent_id, run_id))

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
        """
        given = Filters(user_id, agent_id).checked()
        drafts = [_owned(draft, given) for draft in read_drafts(path, format=format)]
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
        """
        filters = Filters(user_id, agent_id, run_id)
        found = self.store.statements(filters) if format == "plain" else self.store.valid(filters)
        return write_memories(found, path, format=format)

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
        """memories, versions, valid_now, deleted (waiting for `purge`), bytes of the folder, is_unfinished."""
        counts = self.store.counts(Filters(user_id, agent_id, run_id))
        num_bytes = sum(path.stat().st_size for path in self.store.folder.rglob("*") if path.is_file())
        return {**counts, "bytes": num_bytes, "is_unfinished": self.store.is_unfinished}

    def verify(self) -> Verification:
        """Compares everything with what was stored, and finishes what a killed process had begun."""
        return self.store.verify()

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


def _key(key: str | MemoryRef) -> str:
    """A ref that a call returned means the whole memory; one version is asked for as "id@version"."""
    return key.id if isinstance(key, MemoryRef) else str(key)


def _owned(draft: Draft, given: Filters) -> Draft:
    filters = Filters(*(own or other for own, other in zip(draft.filters, given, strict=True)))
    return Draft(**(vars(draft) | {"filters": filters}))
