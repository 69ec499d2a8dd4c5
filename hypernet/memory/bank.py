"""AdapterBank: for each memory version, id@version, the adapter that the hypernetwork makes of its text.

bank = AdapterBank(store, model)
bank.write(Filters(user_id="alice"))                    # what is missing, in batched passes; nothing a second time
held = bank.held(Filters(user_id="alice"))              # all of them as one adapter, one document for each version
(chosen,) = bank.choose(["Who taught Fenda?"], held, [held.holding(now())])
bank.verify()                                           # what a killed process left is removed or written anew

A slot is the part of a document in an `AdapterLibrary` entry under `adapters/`: up to `shard_memories` versions of one
user lie in one entry. With one entry each, 1,000 memories take 81 s to write and 11 s to read (each has four files that
are synced and hashed); in shards 3 s and 1 s. A shard is an ordinary adapter, so taking a memory out is
`select_chunks`, and what remains is bit-identical to one that never had it. The table `slots` says which entry holds
which version, and by what it was written: text, hypernetwork, base model and the shape of the pass. Files come first,
then one transaction: what no row names is an orphan.
"""

import fcntl
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, Row, and_, delete, exists, func, insert, literal, or_, select, update

from hypernet.memory.embedding import LazyModel
from hypernet.memory.store.reading import same, within
from hypernet.memory.store.records import EVERYBODY, Filters, split_ref
from hypernet.memory.store.schema import among, memories, slots
from hypernet.memory.store.times import FOREVER
from hypernet.memory.store.token_store import TokenStore

if TYPE_CHECKING:
    from hypernet.adapters.adapter import LoRAAdapter
    from hypernet.adapters.library import AdapterLibrary

log = logging.getLogger(__name__)

ADAPTERS_FOLDER, _LOCK_FILE = "adapters", ".adapters.lock"
_WAYS = ("route", "gate")


class Written(NamedTuple):
    """What `write` did.

    written: by the hypernetwork. copied: from a slot of the same text. kept: were there. refused: id@version → why its
    text makes no adapter. bytes: of the slots within the filters.
    """

    written: int
    copied: int
    kept: int
    refused: dict[str, str]
    seconds: float
    bytes: int


class SlotCounts(NamedTuple):
    """Of the versions within some filters.

    memories: live versions with a text. slots: of those, with an adapter by the generator that is asked about.
    valid_now: of those, that hold now. missing: without one. superseded: slots of live versions that hold no more.
    deleted: slots of what is deleted and may come back. other_generator, other_base_model: slots that another
    hypernetwork or base model wrote. bytes: of all slots.
    """

    memories: int
    slots: int
    valid_now: int
    missing: int
    superseded: int
    deleted: int
    other_generator: int
    other_base_model: int
    bytes: int

    @property
    def stale(self) -> int:
        """Slots that answer nothing until they are written anew or purged."""
        return self.deleted + self.other_generator + self.other_base_model


@dataclass(frozen=True, eq=False)
class Held:
    """The slots of all live versions within some filters.

    Attributes:
        refs: id@version of each document of the adapter, [N].
        valid_at, invalid_at: microseconds, [N].
        owner: the document of each chunk, [C].
        missing: id@version → (valid_at, invalid_at) of the versions without a slot.
        adapter: None where there is no slot.
    """

    refs: tuple[str, ...]
    valid_at: npt.NDArray[np.int64]
    invalid_at: npt.NDArray[np.int64]
    owner: npt.NDArray[np.int64]
    missing: Mapping[str, tuple[int, int]]
    adapter: "LoRAAdapter | None"

    def holding(self, as_of: int) -> npt.NDArray[np.bool_]:
        """[N], whether each holds then."""
        return (self.valid_at <= as_of) & (as_of < self.invalid_at)

    def missing_at(self, as_of: int) -> list[str]:
        """id@version of what holds then and has no slot."""
        return [ref for ref, (since, until) in self.missing.items() if since <= as_of < until]

    @cached_property
    def place(self) -> dict[str, int]:
        return {ref: number for number, ref in enumerate(self.refs)}

    def cut(self, chunks: npt.NDArray[np.int64], weights: Sequence[float] | None = None) -> "LoRAAdapter":
        """`select_chunks` of its adapter, which would go through the provenance of all documents: 0.1 s of 10,000."""
        from hypernet.adapters.composition import select_chunks

        assert self.adapter is not None
        numbers = np.unique(self.owner[chunks])
        rows = np.flatnonzero(np.isin(self.owner, numbers))
        entries = self.adapter.provenance["documents"]
        whole = replace(
            self.adapter,
            A={name: block[rows] for name, block in self.adapter.A.items()},
            B={name: block[rows] for name, block in self.adapter.B.items()},
            provenance={**self.adapter.provenance, "documents": [entries[number] for number in numbers]},
        )
        return select_chunks(whole, np.searchsorted(rows, chunks).tolist(), weights)

    @cached_property
    def passages(self) -> list[str]:
        """What tells each chunk's wording from others, [C]."""
        assert self.adapter is not None
        return [passage for entry in self.adapter.provenance["documents"] for passage in entry["passages"]]


class Choice(NamedTuple):
    """What a question is asked with: an adapter of few chunks, and the memories that they are of, the best first."""

    adapter: "LoRAAdapter | None"
    refs: tuple[str, ...]


class AdapterBank:
    """The adapters of one memory's folder.

    Args:
        store: whose texts they are made of.
        model: the checkpoint that makes them; None: they can be counted, verified and removed, not written or read.
        join: "route" or "gate", see `hypernet.adapters.joining`. Routed, a question is read once more to choose.
        top_k, gate_power: the setting of that way; None: its own.
        shard_memories: most versions in one library entry.
        pass_chunks: chunks that the hypernetwork reads at once, see `DocToLoRA.internalize`.
        dtype: of the stored weights: "float32", "float16" or "bfloat16". The tiny model answers 99 of 100 questions on
            25 memories with each, and half precision takes half the bytes.
        max_held_bytes: of adapters kept in memory for the next question.

    Raises:
        ValueError: a setting is impossible.
    """

    def __init__(
        self,
        store: TokenStore,
        model: LazyModel | None = None,
        *,
        join: str = "route",
        top_k: int | None = None,
        gate_power: float | None = None,
        shard_memories: int = 128,
        pass_chunks: int = 16,
        dtype: str = "float16",
        max_held_bytes: int = 2 << 30,
    ) -> None:
        if join not in _WAYS:
            raise ValueError(f"join is {join!r}. Memories are joined by {' or '.join(_WAYS)}.")
        if shard_memories < 1 or pass_chunks < 2:
            raise ValueError(
                f"shard_memories is {shard_memories} and pass_chunks {pass_chunks}. Give at least 1 and 2."
            )
        if dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"dtype is {dtype!r}. Adapters are stored as float32, float16 or bfloat16.")
        self.store, self.model = store, model
        self.join, self.top_k, self.gate_power = join, top_k, gate_power
        self.shard_memories, self.pass_chunks, self.dtype = shard_memories, pass_chunks, dtype
        self._shards = _Cache(max_held_bytes // 2)
        self._combined = _Cache(max_held_bytes // 2)

    @property
    def folder(self) -> Any:
        return self.store.folder / ADAPTERS_FOLDER

    @cached_property
    def library(self) -> "AdapterLibrary":
        from hypernet.adapters.library import AdapterLibrary

        return AdapterLibrary(self.folder)

    @property
    def generator(self) -> str:
        """Names what decides the bits of a slot beside its text: hypernetwork, base model, chunks, pass, dtype.

        Raises:
            ValueError: the memory was opened without a checkpoint.
        """
        model = self._model()
        parts = {
            "hypernetwork": model.generator,
            "base_model": model.base_model_fingerprint,
            "max_chunk_tokens": model.max_chunk_tokens,
            "context_encoder": model.context_encoder.settings,
            "pass_chunks": self.pass_chunks,
            "dtype": self.dtype,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def can_write(self) -> bool:
        """Whether there is a checkpoint."""
        return self.model is not None and self.model.has_hypernetwork

    def beside(self, store: TokenStore) -> "AdapterBank":
        """A bank of another store, by the same model and settings."""
        settings = ("join", "top_k", "gate_power", "shard_memories", "pass_chunks", "dtype")
        return AdapterBank(store, self.model, **{name: getattr(self, name) for name in settings})

    @property
    def joined(self) -> dict[str, Any]:
        """How `DocToLoRA.generate` joins what `choose` gave: routed chunks were weighted there already."""
        return {"join": "gate", "gate_power": self.gate_power} if self.join == "gate" else {"join": "sum"}

    # --- Writing ----------------------------------------------------------------------------------------------------

    def write(self, filters: Filters = EVERYBODY, *, progress: Callable[[int, int], None] | None = None) -> Written:
        """Gives every live version within the filters its slot; those of another generator are replaced.

        Args:
            progress: called with (memories done, memories to be written), after each pass.

        Raises:
            ValueError: a filter is blank, or there is no checkpoint.
            OSError: the disk is full, ...; what was written so far stays.
        """
        filters, generator = filters.checked(), self.generator
        started, written, copied, refused = time.perf_counter(), 0, 0, dict[str, str]()
        with self._alone():
            self._sweep()
            todo, done = self._lacking(filters, generator), 0
            for user_id, of_user in groupby(todo, key=lambda row: row.user_id):
                rows = list(of_user)
                while rows:
                    entry, room = self._open_shard(user_id, generator)
                    part, rows = rows[:room], rows[room:]
                    told = None if progress is None else partial(_tell, progress, done, len(part), len(todo))
                    made, reused = self._write_part(part, entry, generator, refused, told)
                    written, copied, done = written + made, copied + reused, done + len(part)
                    if progress is not None:
                        progress(done, len(todo))
        counts = self.counts(filters, generator)
        kept = counts.slots - written - copied
        return Written(written, copied, kept, refused, time.perf_counter() - started, counts.bytes)

    def drop(self, refs: Iterable[str]) -> None:
        """Takes slots out of the files; those of live memories are written anew by the next `write`."""
        with self._alone():
            self._drop(refs)

    def sweep(self) -> None:
        """Removes from the files what was purged, and what a killed process left."""
        if self.folder.is_dir():
            with self._alone():
                self._sweep()

    def verify(self) -> list[str]:
        """Reads every file, removes what is damaged or nobody's, and returns what was done; texts are not touched."""
        if not self.folder.is_dir() and not self._entries():
            return []
        done = []
        with self._alone():
            entries = self._entries()
            damaged = {damage.name for damage in self.library.verify()} if self.library.own_paths() else set()
            lost = [entry for entry in entries if entry in damaged or not (self.folder / entry).is_dir()]
            num_lost = sum(entries[entry] for entry in lost)
            for entry in lost:
                self._forget_entry(entry)
            if num_lost:
                done.append(f"{num_lost} damaged or missing adapters taken out; write_adapters writes them anew")
            if num_swept := self._sweep():
                done.append(f"{num_swept} adapters or files of adapters that belong to nothing")
        return done

    @property
    def is_unfinished(self) -> bool:
        """Whether something lies in the files that no memory has: a purge or a write was interrupted."""
        if not self.folder.is_dir():
            return False
        with self.store.database.read() as connection:
            if connection.execute(select(slots.c.seq).where(_purged()).limit(1)).scalar() is not None:
                return True
            named = set(connection.execute(select(slots.c.entry).distinct()).scalars())
        return any(path.is_dir() and path.name not in named for path in self.library.own_paths())

    # --- Reading ----------------------------------------------------------------------------------------------------

    def counts(self, filters: Filters = EVERYBODY, generator: str | None = None) -> SlotCounts:
        """How many versions have slots, and why others count for nothing.

        Args:
            generator: which slots are asked about; None: the one that wrote last within the filters.
        """
        generator = generator or self.last_generator(filters)
        when = time.time_ns() // 1000
        live = and_(memories.c.live, memories.c.text.is_not(None))
        current = slots.c.generator == generator
        holds = and_(memories.c.valid_at <= when, or_(memories.c.invalid_at.is_(None), memories.c.invalid_at > when))
        base_model = select(slots.c.base_model).where(current).limit(1).scalar_subquery()
        has_slot = slots.c.seq.is_not(None)

        def number(*where: Any) -> Any:
            return func.count().filter(*where)

        statement = (
            select(
                number(live),
                number(live, has_slot, current),
                number(live, has_slot, current, holds),
                number(live, or_(slots.c.seq.is_(None), ~current)),
                number(live, has_slot, current, ~holds),
                number(~live, has_slot),
                number(live, has_slot, ~current, slots.c.base_model == base_model),
                number(live, has_slot, ~current, slots.c.base_model != base_model),
                func.coalesce(func.sum(slots.c.bytes), 0),
            )
            .select_from(memories)
            .outerjoin(slots, same(memories.c, slots.c.memory_id, slots.c.version))
            .where(*within(filters.checked()))
        )
        with self.store.database.read() as connection:
            return SlotCounts(*(int(value) for value in connection.execute(statement).one()))

    def last_generator(self, filters: Filters = EVERYBODY) -> str | None:
        """The one that wrote last within the filters; None: nothing was written."""
        statement = (
            select(slots.c.generator)
            .join(memories, same(memories.c, slots.c.memory_id, slots.c.version))
            .where(*within(filters.checked()))
            .order_by(slots.c.change.desc())
            .limit(1)
        )
        with self.store.database.read() as connection:
            return connection.execute(statement).scalar()

    def seconds(self, filters: Filters, generator: str) -> float:
        """That writing the slots within the filters took."""
        statement = (
            select(func.coalesce(func.sum(slots.c.seconds), 0.0))
            .join(memories, same(memories.c, slots.c.memory_id, slots.c.version))
            .where(memories.c.live, slots.c.generator == generator, *within(filters.checked()))
        )
        with self.store.database.read() as connection:
            return float(connection.execute(statement).scalar_one())

    def entries_of(self, refs: Iterable[str]) -> dict[str, str]:
        """id@version → library entry, of those that have a slot."""
        wanted = set(refs)
        identities = {split_ref(ref)[0] for ref in wanted}
        statement = select(slots.c.memory_id, slots.c.version, slots.c.entry)
        with self.store.database.read() as connection:
            rows = connection.execute(statement.where(among(slots.c.memory_id, identities))).all()
        return {ref: row.entry for row in rows if (ref := f"{row.memory_id}@{row.version}") in wanted}

    def held(self, filters: Filters) -> Held:
        """The slots of live versions within the filters by this bank's generator, as one adapter.

        Raises:
            ValueError: there is no checkpoint, or a file is damaged.
        """
        filters, generator = filters.checked(), self.generator
        with self.store.database.read() as connection:
            last = func.coalesce(func.max(slots.c.change), 0)
            state = self.store.last_batch(connection), connection.execute(select(last)).scalar_one(), generator
            if (found := self._combined.get(filters)) is not None and found[0] == state:
                return found[1]
            rows = connection.execute(
                select(memories.c.memory_id, memories.c.version, memories.c.valid_at, memories.c.invalid_at, slots)
                .outerjoin(
                    slots,
                    same(memories.c, slots.c.memory_id, slots.c.version) & (slots.c.generator == generator),
                )
                .where(memories.c.live, memories.c.text.is_not(None), *within(filters))
                .order_by(slots.c.entry, memories.c.seq)
            ).all()
        ref_of = {row: f"{row[0]}@{row[1]}" for row in rows}
        span_of = {row: (row.valid_at, FOREVER if row.invalid_at is None else row.invalid_at) for row in rows}
        wanted: dict[str, dict[str, Row[Any]]] = {}
        for row in rows:
            if row.entry is not None:
                wanted.setdefault(row.entry, {})[ref_of[row]] = row
        parts, chosen = [], []
        for entry, of_entry in wanted.items():
            part = _documents(self._shard(entry), of_entry)
            self._model().between_passes()  # a shard takes as long to read as several steps of an answer
            parts.append(part)
            chosen += [of_entry[document["name"]] for document in part.provenance["documents"]]
        adapter = parts[0].with_chunks_of(parts[1:], warn_of_copies=False) if parts else None
        counts = [] if adapter is None else [end - start for start, end in adapter.chunk_spans()]
        result = Held(
            refs=tuple(ref_of[row] for row in chosen),
            valid_at=np.array([span_of[row][0] for row in chosen], np.int64),
            invalid_at=np.array([span_of[row][1] for row in chosen], np.int64),
            owner=np.repeat(np.arange(len(counts)), counts),
            missing={ref_of[row]: span_of[row] for row in rows if row.entry is None},
            adapter=adapter,
        )
        self._combined.put(filters, (state, result), 0 if adapter is None else adapter.num_bytes)
        return result

    def choose(self, questions: Sequence[str], held: Held, visible: Sequence[npt.NDArray[np.bool_]]) -> list[Choice]:
        """For each question the adapter of what answers it, out of the memories that it may see.

        Args:
            visible: for each question, [N] of `held`.
        """
        from hypernet.adapters.joining import Joining, highest

        if held.adapter is None:
            return [Choice(None, ())] * len(questions)
        joining = self._model().trained_joining
        if joining.way != "route" or self.join != "route" or self.top_k is not None:
            joining = Joining(
                self.join,
                top_k=self.top_k if self.join == "route" else None,
                gate_power=self.gate_power if self.join == "gate" else None,
            )
        top_k, power = (joining.top_k or 2, joining.weight_power or 0.0)
        result = [Choice(None, ())] * len(questions)
        groups: dict[bytes, list[int]] = {}
        for place, mask in enumerate(visible):
            groups.setdefault(mask.tobytes(), []).append(place)
        seen = [self._distinct(held, visible[places[0]]) for places in groups.values()]
        scored = np.unique(np.concatenate([np.zeros(0, np.int64), *seen]))
        if not len(scored):
            return result
        part = held.cut(scored) if len(scored) < len(held.owner) else held.adapter
        scores = self._model().routing_scores(questions, part)
        for places, chunks in zip(groups.values(), seen, strict=True):
            if not len(chunks):
                continue
            own = np.searchsorted(scored, chunks)
            best, weights = highest(scores[places][:, own], top_k=top_k, weight_power=power)
            whole = held.cut(chunks) if self.join == "gate" else None
            for place, numbers, factors in zip(places, best, weights, strict=True):
                if not scores[place, own].any():  # nothing is close to it
                    continue
                order = sorted(numbers, key=lambda number: -float(scores[place, own[number]]))
                refs = tuple(dict.fromkeys(held.refs[held.owner[chunks[number]]] for number in order))
                adapter = whole if whole is not None else held.cut(chunks[numbers], factors)
                result[place] = Choice(adapter, refs)
        return result

    # --- Inside -----------------------------------------------------------------------------------------------------

    def _distinct(self, held: Held, visible: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Chunks of visible memories; of a passage that several of them have one."""
        from hypernet.adapters.joining import distinct

        assert held.adapter is not None
        shown = visible[held.owner]
        own = [held.passages[chunk] for chunk in np.flatnonzero(shown)]
        if len(set(own)) < len(own):
            adapter = held.adapter
            kept = distinct(
                *(adapter.A, adapter.B, adapter.targets),
                passages=[
                    passage if is_shown else None for passage, is_shown in zip(held.passages, shown, strict=True)
                ],
                documents=held.owner.tolist(),
                weights=[1.0] * len(held.refs),
                within=True,
            )
            shown = shown & np.isin(np.arange(len(shown)), kept)
        return np.flatnonzero(shown)

    def _model(self) -> Any:
        if self.model is None:
            raise ValueError("Adapters need a checkpoint: open the memory with model=..., such as assets/tiny.")
        return self.model.doc_to_lora()

    def _lacking(self, filters: Filters, generator: str) -> Sequence[Row[Any]]:
        statement = (
            select(memories)
            .outerjoin(slots, same(memories.c, slots.c.memory_id, slots.c.version) & (slots.c.generator == generator))
            .where(memories.c.live, memories.c.text.is_not(None), slots.c.seq.is_(None), *within(filters))
            .order_by(memories.c.user_id, memories.c.seq)
        )
        with self.store.database.read() as connection:
            return connection.execute(statement).all()

    def _open_shard(self, user_id: str | None, generator: str) -> tuple[str | None, int]:
        """The entry of this user that has room, and how much; a new one has all."""
        statement = (
            select(slots.c.entry, func.count().label("n"))
            .join(memories, same(memories.c, slots.c.memory_id, slots.c.version))
            .where(slots.c.generator == generator, memories.c.user_id.is_not_distinct_from(user_id))
            .group_by(slots.c.entry)
            .having(func.count() < self.shard_memories)
            .order_by(func.count())
            .limit(1)
        )
        with self.store.database.read() as connection:
            row = connection.execute(statement).one_or_none()
        return (None, self.shard_memories) if row is None else (row.entry, self.shard_memories - row.n)

    def _write_part(
        self,
        rows: Sequence[Row[Any]],
        old: str | None,
        generator: str,
        refused: dict[str, str],
        progress: Callable[[int, int], None] | None,
    ) -> tuple[int, int]:
        """Writes rows of one user into one shard, together with what the old one holds."""
        model = self._model()
        pieces, seconds = self._pieces(rows, generator, refused, progress)
        if not pieces:
            return 0, 0
        first, *others = [
            *([self._shard(old, as_stored=True)] if old else []),
            *(_renamed(piece, ref) for ref, piece in pieces.items()),
        ]
        shard = first.with_chunks_of(others, warn_of_copies=False)
        entry = self.library.add(shard)
        per_chunk = shard.num_bytes // max(1, shard.num_chunks + (shard.bias_rank > 0))
        with self.store.database.write() as connection:
            change = _next_change(connection)
            written = [row for row in rows if _ref(row) in pieces]
            for row in written:  # one of another generator
                where = same(slots.c, literal(row.memory_id), literal(row.version))
                connection.execute(delete(slots).where(where))
            connection.execute(
                insert(slots),
                [
                    {
                        **{"memory_id": row.memory_id, "version": row.version, "sha256": row.sha256},
                        **{"generator": generator, "base_model": model.base_model_fingerprint, "entry": entry},
                        **{"chunks": pieces[_ref(row)].num_chunks, "seconds": seconds.get(_ref(row), 0.0)},
                        **{"bytes": pieces[_ref(row)].num_chunks * per_chunk, "change": change},
                    }
                    for row in written
                ],
            )
            if old:
                connection.execute(update(slots).where(slots.c.entry == old).values(entry=entry, change=change))
        self._sweep()  # the old shard, and shards of another generator that nothing is left of
        return len(seconds), len(pieces) - len(seconds)

    def _pieces(
        self,
        rows: Sequence[Row[Any]],
        generator: str,
        refused: dict[str, str],
        progress: Callable[[int, int], None] | None,
    ) -> tuple[dict[str, "LoRAAdapter"], dict[str, float]]:
        """id@version → adapter of one document; and the seconds of those that the hypernetwork made."""
        from hypernet.text.cleaning import visible
        from hypernet.text.documents import Document

        model, known = self._model(), self._known({row.sha256 for row in rows}, generator)
        documents, refs_of = [], dict[str, list[str]]()
        for row in rows:
            if row.sha256 in known or row.sha256 in refs_of:
                refs_of.setdefault(row.sha256, []).append(_ref(row))
                continue
            try:
                content = visible(row.text, _ref(row))
                model.chunk(content)
            except ValueError as error:
                refused[_ref(row)] = " ".join(str(error).split())
                continue
            refs_of[row.sha256] = [_ref(row)]
            hashed = hashlib.sha256(content.encode()).hexdigest()
            documents.append(Document(name=row.sha256, text=content, sha256=hashed))
        of_text: dict[str, LoRAAdapter] = {}
        seconds: dict[str, float] = {}
        if documents:
            started, paused = time.perf_counter(), model.paused_s
            made = model.internalize(documents, pass_chunks=self.pass_chunks, progress=progress)
            each = (time.perf_counter() - started - (model.paused_s - paused)) / len(documents)
            made = made.to(dtype=_torch_dtype(self.dtype))
            of_text = dict(zip([d.name for d in documents], _each_document(made), strict=True))
            seconds = {refs_of[d.name][0]: each for d in documents}
        for content, (entry, ref) in known.items():
            of_text[content] = _documents(self._shard(entry, as_stored=True), {ref})
        return {ref: of_text[content] for content, refs in refs_of.items() for ref in refs}, seconds

    def _known(self, hashes: set[str], generator: str) -> dict[str, tuple[str, str]]:
        """Text's SHA-256 → entry and id@version of a slot that has it."""
        statement = select(slots).where(slots.c.generator == generator, among(slots.c.sha256, hashes))
        with self.store.database.read() as connection:
            rows = connection.execute(statement).all()
        return {row.sha256: (row.entry, _ref(row)) for row in rows if (self.folder / row.entry).is_dir()}

    def _shard(self, entry: str, *, as_stored: bool = False) -> "LoRAAdapter":
        """An entry of the library; in the hypernetwork's dtype unless as_stored."""
        if (found := self._shards.get(entry)) is None:
            try:
                found = self.library.load(entry)
            except ValueError as error:
                raise ValueError(f"{error} For a memory: run verify, then write the adapters.") from error
            self._shards.put(entry, found, found.num_bytes)
        if as_stored:
            return found
        return found.to(dtype=next(self._model().hypernetwork.parameters()).dtype)

    def _drop(self, refs: Iterable[str]) -> None:
        of_entry: dict[str, set[str]] = {}
        for ref, entry in self.entries_of(refs).items():
            of_entry.setdefault(entry, set()).add(ref)
        sizes = self._entries() if of_entry else {}
        for entry, names in of_entry.items():
            if len(names) == sizes[entry]:  # nothing of it is left: it need not be read
                self._forget_entry(entry)
                continue
            try:
                shard = self._shard(entry, as_stored=True)
            except ValueError:  # damaged: all of it is written anew
                self._forget_entry(entry)
                continue
            rest = [d["name"] for d in shard.provenance["documents"] if d["name"] not in names]
            new = self.library.add(_documents(shard, rest)) if rest else None
            with self.store.database.write() as connection:
                for ref in names:
                    identity, version = split_ref(ref)
                    connection.execute(delete(slots).where(same(slots.c, literal(identity), literal(version))))
                values = {"entry": new, "change": _next_change(connection)}
                connection.execute(update(slots).where(slots.c.entry == entry).values(values))
            self._remove(entry)

    def _sweep(self) -> int:
        """Takes out purged slots, orphans and leftovers; the caller is alone. Returns how many."""
        with self.store.database.read() as connection:
            rows = connection.execute(select(slots.c.memory_id, slots.c.version).where(_purged())).all()
        self._drop([f"{identity}@{version}" for identity, version in rows])
        if not self.folder.is_dir():
            return len(rows)
        named = self._entries()
        own = self.library.own_paths()
        orphans = [path.name for path in own if path.is_dir() and path.name[0] != "." and path.name not in named]
        for name in orphans:
            self._remove(name)
        leftovers = self.library.clean() if self.library.own_paths() else ()
        return len(rows) + len(orphans) + len(leftovers)

    def _entries(self) -> dict[str, int]:
        """Library entry → slots in it."""
        with self.store.database.read() as connection:
            rows = connection.execute(select(slots.c.entry, func.count()).group_by(slots.c.entry))
            return {entry: number for entry, number in rows}

    def _forget_entry(self, entry: str) -> None:
        with self.store.database.write() as connection:
            connection.execute(delete(slots).where(slots.c.entry == entry))
        self._remove(entry)

    def _remove(self, entry: str) -> None:
        self._shards.pop(entry)
        if (self.folder / entry).is_dir():
            self.library.remove(entry)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time changes the files; the system lets go of the lock however it ends."""
        with (self.store.folder / _LOCK_FILE).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class _Cache:
    """The last used values, as long as all together have no more than max_bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self._held = max_bytes, OrderedDict[Any, tuple[Any, int]]()

    def get(self, key: Any) -> Any:
        if key not in self._held:
            return None
        self._held.move_to_end(key)
        return self._held[key][0]

    def put(self, key: Any, value: Any, num_bytes: int) -> None:
        self._held[key] = value, num_bytes
        self._held.move_to_end(key)
        while len(self._held) > 1 and sum(size for _, size in self._held.values()) > self.max_bytes:
            self._held.popitem(last=False)

    def pop(self, key: Any) -> None:
        self._held.pop(key, None)


def _ref(row: Row[Any]) -> str:
    return f"{row.memory_id}@{row.version}"


def _purged() -> Any:
    """Slots whose memory version is no more."""
    return ~exists().where(same(memories.c, slots.c.memory_id, slots.c.version)).correlate(slots)


def _next_change(connection: Connection) -> int:
    return int(connection.execute(select(func.coalesce(func.max(slots.c.change), 0) + 1)).scalar_one())


def _tell(progress: Callable[[int, int], None], before: int, of_part: int, total: int, done: int, chunks: int) -> None:
    """Chunks of a part as memories of all."""
    progress(before + of_part * done // max(1, chunks), total)


def _documents(adapter: "LoRAAdapter", names: Iterable[str]) -> "LoRAAdapter":
    """The adapter of some of its documents, by name."""
    from hypernet.adapters.composition import select_chunks

    wanted = set(names)
    spans = zip(adapter.provenance["documents"], adapter.chunk_spans(), strict=True)
    chunks = [chunk for entry, span in spans if entry["name"] in wanted for chunk in range(*span)]
    return adapter if len(chunks) == adapter.num_chunks else select_chunks(adapter, chunks)


def _each_document(adapter: "LoRAAdapter") -> list["LoRAAdapter"]:
    """An adapter for each document; copies share no memory with this one."""
    return [
        replace(
            adapter,
            A={name: rows[start:end] for name, rows in adapter.A.items()},
            B={name: rows[start:end] for name, rows in adapter.B.items()},
            provenance={**adapter.provenance, "documents": [entry]},
        )
        for entry, (start, end) in zip(adapter.provenance["documents"], adapter.chunk_spans(), strict=True)
    ]


def _renamed(adapter: "LoRAAdapter", name: str) -> "LoRAAdapter":
    """Its one document named so. The hash is of name and text: a library holds what has the same hashes once, under the
    first one's names."""
    (entry,) = adapter.provenance["documents"]
    hashed = hashlib.sha256(f"{name} {entry['text_sha256']}".encode()).hexdigest()
    return replace(adapter, provenance={**adapter.provenance, "documents": [{**entry, "name": name, "sha256": hashed}]})


def _torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)
