"""TokenStore: memories as text in one folder, append-only, with two time axes; nothing is overwritten until `purge`.

store = TokenStore("outputs/memory")
(ref,) = store.add([Draft(text="Fenda Elfax was taught by Orla Wint.", valid_at="2026-03-01")])
store.update(ref.id, "Fenda Elfax was taught by Jorun Pell.", valid_at="2026-06-01")
store.valid(Filters(user_id="alice"), as_of="2026-04-01", known_at="2026-05-01")
store.delete(ref.id); store.rollback("v3"); store.purge(); store.verify()

Every call that writes is one transaction and one batch. What holds when is computed from the statements themselves
(`hypernet.memory.store.timeline`), so the order in which they arrive does not matter.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import (
    Connection,
    Integer,
    Row,
    String,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal,
    literal_column,
    select,
    text,
    update,
)

from hypernet.memory.store import full_text
from hypernet.memory.store.database import Database
from hypernet.memory.store.deletions import DELETIONS_FILE, MAX_REASON_CHARACTERS, DeletionLog
from hypernet.memory.store.reading import StoreReader, ends_of, named, same, unknown, within
from hypernet.memory.store.records import (
    EVERYBODY,
    Batch,
    Draft,
    Filters,
    MemoryRef,
    batch_number,
    check_text,
    checked_conflict,
    split_ref,
)
from hypernet.memory.store.schema import (
    among,
    batches,
    contains,
    events,
    memories,
    traces,
    utilities,
    vectors,
    words,
)
from hypernet.memory.store.timeline import JOINING, End
from hypernet.memory.store.times import Instant, now, to_micros, to_text

UNFINISHED_PURGE = ".purging"  # there while deleted content may still lie in free pages or the log

# Live: its batch stands, it is not deleted, and everything that it was derived from is live.
_STATES = (
    select(
        text("""m.seq, m.live, CASE
  WHEN NOT b.active THEN 0
  WHEN (SELECT e.operation FROM events e JOIN batches eb ON eb.number = e.batch
        WHERE e.memory_id = m.memory_id AND e.version = m.version AND eb.active
          AND e.operation IN ('delete', 'restore') ORDER BY e.seq DESC LIMIT 1) = 'delete' THEN 0
  WHEN EXISTS (SELECT 1 FROM contains k LEFT JOIN memories mm
               ON mm.memory_id = k.member_id AND mm.version = k.member_version AND mm.live
               WHERE k.derived_id = m.memory_id AND k.derived_version = m.version AND mm.seq IS NULL) THEN 0
  ELSE 1 END""")
    )
    .select_from(text("memories m JOIN batches b ON b.number = m.batch"))
    .where(among(literal_column("m.seq", Integer), "seqs"))
)


class Verification(NamedTuple):
    """damage: what cannot be mended. repaired: what a killed process had left, now finished."""

    damage: tuple[str, ...]
    repaired: tuple[str, ...]


class _Writing(NamedTuple):
    """A transaction that writes into a batch. at: microseconds, later than anything written before."""

    connection: Connection
    batch: int
    at: int


class TokenStore(StoreReader):
    """The memories of one folder.

    Args:
        folder: made by the first call if `create`.
        database: URL of PostgreSQL, such as postgresql+psycopg://user@host/name, for a memory that is new or there
            already; the folder keeps it, without a password. None: what the folder has, or SQLite.
        create: whether it may be made where it is missing.
        conflict: what an added memory does to others with its key: "latest" (latest valid wins), "add_only" (nothing),
            "keep_both" (both hold, and hits name each other) or "source_priority".
        source_priority: patterns of sources such as "notes/*", the best first; any other comes last.

    Raises:
        ValueError: the folder is no memory, or an unknown `conflict`.
        OSError: it cannot be read or written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        create: bool = True,
        database: str | None = None,
        conflict: str = "latest",
        source_priority: Sequence[str] = (),
    ) -> None:
        if isinstance(source_priority, str):
            raise ValueError(f"source_priority is {source_priority!r}. Give a list of patterns.")
        self.conflict, self.source_priority = checked_conflict(conflict), tuple(source_priority)
        self.folder = Path(folder).expanduser().resolve()
        super().__init__(Database(self.folder, create=create, url=database))
        self.log = DeletionLog(self.folder, self.database)

    def close(self) -> None:
        self.database.close()

    # --- Writing ----------------------------------------------------------------------------------------------------

    def add(self, drafts: Sequence[Draft], *, operation: str = "add", batch: str | None = None) -> list[MemoryRef]:
        """Stores memories, all of them or none.

        A draft whose (subject, relation) its user already has becomes the next version of that memory. One whose
        id@version was ever here, deleted or not, is left out.

        Args:
            batch: the one to add to; None begins one.

        Raises:
            ValueError: a text is empty, a date impossible, or what it was derived from is not here.
        """
        for draft in drafts:
            draft.checked()
        with self._writing(operation, batch=batch) as writing:
            refs = self._add(writing, drafts, operation=operation)
            if not refs and batch is None:
                _undo(writing)
        return refs

    def update(
        self,
        key: str,
        content: str,
        *,
        valid_at: Instant | None = None,
        invalid_at: Instant | None = None,
        source: str | None = None,
    ) -> MemoryRef:
        """States a new version of a memory, which holds from valid_at (None: now) on; the ones before stay.

        Raises:
            ValueError: there is no such memory, or as `add`.
        """
        draft = Draft(text=content, valid_at=valid_at, invalid_at=invalid_at, source=source).checked()
        with self._writing("update") as writing:
            row = self._versions_of(writing.connection, key)[-1]
            return self._add(writing, [draft], operation="update", follows=row)[0]

    def invalidate(self, key: str, *, at: Instant | None = None) -> MemoryRef:
        """States that a memory no longer holds from `at` (None: now) on. Returns that statement, which is a version.

        Raises:
            ValueError: there is no such memory, or it began to hold only later.
        """
        draft = Draft(text=None, valid_at=at)
        when = None if at is None else to_micros(at, "at")
        with self._writing("invalidate") as writing:
            when = writing.at if when is None else when
            rows = [row for row in self._versions_of(writing.connection, key) if row.text is not None]
            begun = [row for row in rows if row.valid_at <= when]
            if not begun:
                raise ValueError(
                    f"{key} holds from {to_text(min(row.valid_at for row in rows))} on, after {to_text(when)}. Give a "
                    "later time, or delete it if it was never true."
                )
            row = max(begun, key=lambda row: (row.valid_at, row.seq))
            return self._add(writing, [draft], operation="invalidate", follows=row)[0]

    def delete(self, key: str, *, reason: str | None = None) -> Batch:
        """Takes a memory, or one version of it, out of everything that reads, with what was derived from it.

        Reversible by `restore` and `rollback` until `purge`.

        Raises:
            ValueError: there is no such memory, or the reason holds its text.
        """
        _check_reason(reason)
        self.log.check()
        with self._writing("delete") as writing:
            rows = self._versions_of(writing.connection, key)
            if reason and any(row.text and row.text.casefold() in reason.casefold() for row in rows):
                raise ValueError(f"The reason holds the memory's text, and {DELETIONS_FILE} keeps it. Give another.")
            result = self._delete(writing, [row.seq for row in rows], reason)
        self.log.catch_up()
        return result

    def delete_versions(self, refs: Iterable[str], *, reason: str | None = None) -> Batch:
        """Takes these id@version out in one batch, with what was derived from them; what is not there is left out.

        Raises:
            ValueError: one has no version, or the reason is too long.
        """
        wanted = [split_ref(ref) for ref in refs]
        if (lacking := next((identity for identity, version in wanted if version is None), None)) is not None:
            raise ValueError(f"{lacking} has no version. Give id@version.")
        _check_reason(reason)
        self.log.check()
        with self._writing("delete") as writing:
            found = [
                seq
                for identity, version in wanted
                for seq in writing.connection.execute(
                    select(memories.c.seq).where(memories.c.live, *named(identity, version))
                ).scalars()
            ]
            if not found:
                _undo(writing)
                return Batch("", "delete")
            result = self._delete(writing, found, reason)
        self.log.catch_up()
        return result

    def delete_all(self, filters: Filters, *, reason: str | None = None) -> Batch:
        """Deletes every memory within the filters, with what was derived from them, and no other.

        Raises:
            ValueError: no filter is given, or one is blank.
        """
        filters = _given(filters, "delete_all")
        _check_reason(reason)
        self.log.check()
        with self._writing("delete") as writing:
            found = writing.connection.execute(select(memories.c.seq).where(memories.c.live, *within(filters)))
            if not (seqs := list(found.scalars())):
                _undo(writing)
                return Batch("", "delete")
            result = self._delete(writing, seqs, reason)
        self.log.catch_up()
        return result

    def restore(self, key: str) -> Batch:
        """Brings a deleted memory back, with what was derived from it.

        Raises:
            ValueError: it is unknown, not deleted, purged or taken back by `rollback`, or something that it was
                derived from is deleted.
        """
        identity, version = split_ref(key)
        self.log.check()
        with self._writing("restore") as writing:
            connection = writing.connection
            asked = list(
                connection.execute(
                    select(memories.c.seq).where(~memories.c.live, *named(identity, version)).order_by(memories.c.seq)
                ).scalars()
            )
            if not asked:
                raise self._not_deleted(connection, key)
            self._record(writing, "restore", asked)
            moved = self._refresh(connection, asked)
            if not moved.keys() & set(asked):
                raise self._not_restored(connection, key, asked)
            result = self._done(writing, "restore", asked, moved, derived="show")
        self.log.catch_up()
        return result

    def rollback(self, version: str | int) -> Batch:
        """Takes a batch back: what it added goes, what it deleted returns, as if it had never been.

        A rollback is a batch too; taking it back does again what it undid.

        Raises:
            ValueError: there is no such batch, it has been taken back, or what it deleted was purged since.
        """
        number = batch_number(version)
        self.log.check()
        with self._writing("rollback", target=number) as writing:
            connection = writing.connection
            batch = connection.execute(select(batches).where(batches.c.number == number)).one_or_none()
            if batch is None or number == writing.batch:
                raise ValueError(f"There is no batch v{number}. `versions` lists them.")
            if batch.operation in ("purge", "repair"):
                raise ValueError(f"v{number} is a {batch.operation}, which cannot be taken back.")
            if not batch.active:
                raise ValueError(f"v{number} has been taken back. To undo that, roll back the rollback.")
            touched = select(events.c.memory_id, events.c.version).where(events.c.batch == number).subquery()
            seqs = list(
                connection.execute(
                    select(memories.c.seq)
                    .join(touched, same(memories.c, touched.c.memory_id, touched.c.version))
                    .distinct()
                ).scalars()
            )
            num_touched = connection.execute(
                select(func.count()).select_from(select(touched).distinct().subquery())
            ).scalar_one()
            if batch.operation in ("delete", "rollback") and num_touched != len(seqs):
                raise ValueError(f"v{number} cannot be taken back: content that would return was purged.")
            _set_active(connection, batch, active=False)
            moved = self._refresh(connection, seqs)
            result = self._done(writing, "rollback", seqs, moved)
        self.log.catch_up()
        return result

    def purge(self, key: str | None = None, filters: Filters = EVERYBODY) -> Batch:
        """Erases the content of what was deleted or taken back, and of what was derived from it: from the tables, the
        index, free pages and the log.

        Its id and version, never its content, stay in the events and in `DELETIONS_FILE`. Live memories are not
        touched. There is no way back.

        Args:
            key: a deleted memory's; None: all within the filters.

        Raises:
            ValueError: `key` is not deleted.
        """
        filters = filters.checked()
        chosen = named(*split_ref(key)) if key is not None else []
        self.log.check()
        with self._writing("purge") as writing:
            connection = writing.connection
            rows = list(
                connection.execute(
                    select(memories.c.seq).where(~memories.c.live, *chosen, *within(filters)).order_by(memories.c.seq)
                ).scalars()
            )
            if key is not None and not rows:
                raise ValueError(f"{key} is not deleted, or was purged before. Delete it first.")
            if not rows and not self.is_unfinished:
                _undo(writing)
                return Batch("", "purge")
            rows = self._with_derived(connection, rows)
            (self.folder / UNFINISHED_PURGE).touch()
            _sync(self.folder)
            result = self._done(writing, "purge", rows)
            connection.execute(delete(vectors).where(among(vectors.c.seq, rows)))
            connection.execute(delete(memories).where(among(memories.c.seq, rows)))
            for table, identity, version in (
                (contains, contains.c.derived_id, contains.c.derived_version),
                (utilities, utilities.c.memory_id, utilities.c.version),
            ):
                connection.execute(delete(table).where(~exists().where(same(memories.c, identity, version))))
            # What the other memories of its prompts did was measured beside it.
            gone = ~exists().where(same(memories.c, traces.c.memory_id, traces.c.version))
            connection.execute(delete(traces).where(traces.c.asked.in_(select(traces.c.asked).where(gone))))
            full_text.rebuild(connection)
        self.log.catch_up()
        return result._replace(finished=self._finish_purge())

    def start_batch(self, operation: str) -> str:
        """A batch that several calls of `add` write to. Returns its name."""
        with self._writing(operation) as writing:
            return f"v{writing.batch}"

    # --- Reading ----------------------------------------------------------------------------------------------------

    @property
    def is_unfinished(self) -> bool:
        """Whether a purge was interrupted, so that content may lie in the file; `verify` finishes it."""
        return (self.folder / UNFINISHED_PURGE).exists()

    # --- Whole ------------------------------------------------------------------------------------------------------

    def verify(self) -> Verification:
        """Recomputes everything that is computed, compares texts with their hashes, and finishes what was interrupted.

        Raises:
            OSError: it cannot be written where something is to be mended.
        """
        damage = self.database.damage()
        if damage:
            return Verification(tuple(damage), ())
        with self.database.read() as connection:
            rows = connection.execute(select(memories).order_by(memories.c.seq)).all()
            indexed = set(connection.execute(select(words.c.rowid)).scalars())
            num_wrong_counts = full_text.num_wrong_counts(connection)
            states = self._states(connection, [row.seq for row in rows])
        damage = [
            f"{row.memory_id}@{row.version} is not the text that was stored"
            for row in rows
            if row.text is not None and _sha256(row.text) != row.sha256
        ]
        expected = ends_of(row for row in rows if states[row.seq][1])
        findable = {row.seq for row in rows if row.text is not None and states[row.seq][1]}
        wrong = [
            row.seq
            for row in rows
            if states[row.seq][0] != states[row.seq][1]
            or (row.live and expected.get(row.seq) != End(row.invalid_at, row.expired_at))
        ]
        repaired = []
        changed = {*wrong, *(indexed ^ findable)}
        if changed or num_wrong_counts:
            with self._writing("repair") as writing:
                self._refresh(writing.connection, [row.seq for row in rows])
                self._resolve(writing.connection, {row.timeline for row in rows})
                full_text.clear(writing.connection)
                full_text.index_rows(writing.connection, self._rows(writing.connection, sorted(findable)))
            counts = f"the index's counts of {num_wrong_counts} words"
            repaired.append(f"computed columns or the index of {len(changed)} versions" if changed else counts)
        repaired += self.log.repair()
        if self.is_unfinished:
            if self._finish_purge():
                repaired.append("an interrupted purge")
            else:
                damage.append("a purge waits for another process that is reading; verify again later")
        return Verification(tuple(damage), tuple(repaired))

    # --- Inside -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self, operation: str, *, batch: str | None = None, target: int | None = None) -> Iterator[_Writing]:
        with self.database.write() as connection:
            last = connection.execute(select(events.c.at).order_by(events.c.seq.desc()).limit(1)).scalar()
            at = max(now(), (last or 0) + 1)  # clocks are set back; what was told later stays later
            if batch is None:
                values = {"at": at, "operation": operation, "target": target, "active": True}
                number = connection.execute(insert(batches).values(values).returning(batches.c.number)).scalar_one()
            else:
                number = batch_number(batch)
                active = connection.execute(select(batches.c.active).where(batches.c.number == number)).scalar()
                if not active:
                    raise ValueError(f"Batch v{number} is not there or was taken back. Begin another.")
            yield _Writing(connection, number, at)

    def _add(
        self, writing: _Writing, drafts: Sequence[Draft], *, operation: str, follows: Row[Any] | None = None
    ) -> list[MemoryRef]:
        """follows: the version that the drafts are new versions of, which gives them all that they do not say."""
        connection = writing.connection
        refs: list[MemoryRef] = []
        rows: list[dict[str, Any]] = []
        derived: list[tuple[MemoryRef, str, str | None]] = []
        begun: dict[str, str] = {}  # timeline → memory id, of this call
        last: dict[str, int] = {}  # memory id → its highest version so far
        placed: set[tuple[str, int]] = set()  # id and version of those that came with them
        for draft in drafts:
            values = self._inherited(draft, follows) if follows else self._values(draft)
            timeline = values["timeline"]
            identity = values["memory_id"] or self._memory_of(connection, timeline, begun)
            if identity is None:
                identity = secrets.token_hex(8)
                last[identity] = 0
            values["memory_id"] = identity
            values["timeline"] = timeline = timeline or identity
            begun[timeline] = identity
            if identity not in last:
                last[identity] = self._last_version(connection, identity)
            if draft.version is not None:
                place = (identity, draft.version)
                if place in placed or self._was_here(connection, *place):
                    continue
                placed.add(place)
            values["version"] = draft.version or last[identity] + 1
            last[identity] = max(last[identity], values["version"])
            values |= {"batch": writing.batch, "created_at": writing.at, "live": True}
            values["valid_at"] = writing.at if draft.valid_at is None else to_micros(draft.valid_at, "valid_at")
            until = values["invalid_at"] = values["stated_until"]
            values["expired_at"] = None if until is None else writing.at
            if until is not None and until <= values["valid_at"]:
                raise ValueError(
                    f"It would end at {to_text(until)}, which is not after {to_text(values['valid_at'])}, when it "
                    "begins. Give the first instant at which it no longer holds."
                )
            ref = MemoryRef(identity, values["version"], f"v{writing.batch}")
            refs.append(ref)
            rows.append(values)
            derived += [(ref, member, values["user_id"]) for member in draft.derived_from]
        if not rows:
            return []
        connection.execute(insert(memories), rows)
        self._derive(connection, derived)
        stored = self._of_refs(connection, writing, refs)
        self._record(writing, operation, [row.seq for row in stored])
        full_text.index_rows(connection, stored)
        shared = {row.timeline for row in stored if row.timeline != row.memory_id or row.version > 1}
        self._resolve(connection, shared)
        return refs

    def _values(self, draft: Draft) -> dict[str, Any]:
        filters, conflict = draft.filters, draft.conflict or self.conflict
        key = None
        if draft.subject is not None and draft.relation is not None:
            said = (draft.subject, draft.relation)
            parts = [filters.user_id, filters.agent_id, *(" ".join(name.casefold().split()) for name in said)]
            key = json.dumps(parts, ensure_ascii=False)
        joins = key is not None and conflict in JOINING
        return {
            **{"text": draft.text, "sha256": None if draft.text is None else _sha256(draft.text)},
            **{"memory_id": draft.id, "key": key, "timeline": key if joins else None},
            **{"role": draft.role, "subject": draft.subject, "relation": draft.relation, "source": draft.source},
            "metadata": draft.metadata_json(),
            **{"conflict": conflict, "priority": self._priority(draft.source, conflict)},
            "stated_until": None if draft.invalid_at is None else to_micros(draft.invalid_at, "invalid_at"),
            **filters._asdict(),
        }

    def _inherited(self, draft: Draft, row: Row[Any]) -> dict[str, Any]:
        kept = ("memory_id", "key", "timeline", "role", "subject", "relation", "conflict", *Filters._fields)
        values = self._values(draft) | {name: row._mapping[name] for name in kept}
        values["priority"] = row.priority if draft.text is None else self._priority(draft.source, row.conflict)
        return values

    def _priority(self, source: str | None, conflict: str) -> int:
        if conflict != "source_priority":
            return 0
        patterns = enumerate(self.source_priority)
        return next((n for n, pattern in patterns if fnmatchcase(source or "", pattern)), len(self.source_priority))

    def _memory_of(self, connection: Connection, timeline: str | None, begun: Mapping[str, str]) -> str | None:
        """The memory whose next version a statement on this timeline is."""
        if timeline is None or timeline in begun:
            return begun.get(timeline or "")
        statement = select(memories.c.memory_id).where(memories.c.timeline == timeline, memories.c.live)
        return connection.execute(statement.order_by(memories.c.seq.desc()).limit(1)).scalar()

    def _last_version(self, connection: Connection, identity: str) -> int:
        """The highest version ever given, purged ones included: id@version names one text forever."""
        statement = select(func.coalesce(func.max(events.c.version), 0)).where(events.c.memory_id == identity)
        return connection.execute(statement).scalar_one()

    def _was_here(self, connection: Connection, identity: str, version: int) -> bool:
        where = (events.c.memory_id == identity, events.c.version == version)
        return connection.execute(select(exists().where(*where))).scalar_one()

    def _derive(self, connection: Connection, derived: Sequence[tuple[MemoryRef, str, str | None]]) -> None:
        rows = []
        for ref, member, user_id in derived:
            identity, version = split_ref(member)
            if version is None:
                raise ValueError(f"derived_from holds {member!r} without a version. Give id@version.")
            where = (*named(identity, version), memories.c.live, memories.c.user_id.is_not_distinct_from(user_id))
            if not connection.execute(select(exists().where(*where))).scalar_one():
                raise ValueError(f"derived_from holds {member}, which this user does not have. See `list`.")
            names = ("derived_id", "derived_version", "member_id", "member_version")
            rows.append(dict(zip(names, (ref.id, ref.version, identity, version), strict=True)))
        if rows:
            connection.execute(insert(contains), rows)

    def _of_refs(self, connection: Connection, writing: _Writing, refs: Sequence[MemoryRef]) -> Sequence[Row[Any]]:
        """The rows just inserted: the batch may hold earlier ones."""
        statement = select(memories).where(memories.c.batch == writing.batch).order_by(memories.c.seq.desc())
        return connection.execute(statement.limit(len(refs))).all()[::-1]

    def _record(self, writing: _Writing, operation: str, seqs: Iterable[int], reason: str | None = None) -> None:
        names = ("batch", "at", "operation", "reason", "memory_id", "version")
        given = [literal(value) for value in (writing.batch, writing.at, operation)]
        rows = select(*given, literal(reason, String), memories.c.memory_id, memories.c.version)
        rows = rows.where(among(memories.c.seq, seqs)).order_by(memories.c.seq)
        writing.connection.execute(insert(events).from_select(names, rows))

    def _delete(self, writing: _Writing, seqs: Sequence[int], reason: str | None) -> Batch:
        self._record(writing, "delete", seqs, reason)
        moved = self._refresh(writing.connection, seqs)
        return self._done(writing, "delete", seqs, moved, derived="hide", reason=reason)

    def _done(
        self,
        writing: _Writing,
        operation: str,
        asked: Sequence[int],
        moved: Iterable[int] | None = None,
        *,
        derived: str = "",
        reason: str | None = None,
    ) -> Batch:
        """What a call did; records what only moved because it was derived, and a rollback or purge as a whole.

        Args:
            asked: what the call was about. moved: what it changed; None: all that was asked.
            derived: the operation to record for what moved without being asked for.
        """
        changed, known = list(asked if moved is None else moved), set(asked)
        followed = [seq for seq in changed if seq not in known]
        if operation in ("rollback", "purge"):
            self._record(writing, operation, changed, reason)
        else:
            self._record(writing, derived, followed, reason)
        statement = select(memories.c.memory_id, memories.c.version).where(among(memories.c.seq, changed))
        rows = writing.connection.execute(statement.order_by(memories.c.seq))
        refs = tuple(f"{identity}@{version}" for identity, version in rows)
        return Batch(f"v{writing.batch}", operation, refs, len(followed))

    def _states(self, connection: Connection, seqs: Iterable[int]) -> dict[int, tuple[bool, bool]]:
        """seq → whether it is live by its column, and by what has happened."""
        rows = connection.execute(_STATES, {"seqs": json.dumps(list(seqs))})
        return {seq: (bool(was), bool(is_)) for seq, was, is_ in rows}

    def _refresh(self, connection: Connection, seqs: Iterable[int]) -> dict[int, bool]:
        """Recomputes who is live among these and what was derived from them. Returns seq → live of those that moved."""
        moved: dict[int, bool] = {}
        todo = list(seqs)
        while todo:
            changed = {seq: is_ for seq, (was, is_) in self._states(connection, todo).items() if was != is_}
            for live in (False, True):
                seqs = [seq for seq, is_ in changed.items() if is_ == live]
                connection.execute(update(memories).where(among(memories.c.seq, seqs)).values(live=live))
            moved |= changed
            todo = self._derived_of(connection, changed)
        full_text.unindex(connection, [seq for seq, live in moved.items() if not live])
        full_text.index_rows(connection, self._rows(connection, [seq for seq, live in moved.items() if live]))
        timelines = select(memories.c.timeline).where(among(memories.c.seq, moved)).distinct()
        self._resolve(connection, connection.execute(timelines).scalars())
        return moved

    def _not_deleted(self, connection: Connection, key: str) -> ValueError:
        identity, version = split_ref(key)
        if connection.execute(select(exists().where(*named(identity, version)))).scalar_one():
            return ValueError(f"{key} is not deleted: there is nothing to restore.")
        where = [events.c.memory_id == identity, *([] if version is None else [events.c.version == version])]
        if connection.execute(select(exists().where(*where))).scalar_one():
            return ValueError(f"{key} was purged: its content is gone for good. Add it anew.")
        return unknown(key)

    def _not_restored(self, connection: Connection, key: str, seqs: Sequence[int]) -> ValueError:
        """Why these stay away: their batches were rolled back, or what they were derived from is not here."""
        undoing = batches.alias()
        rolled_back = (
            select(batches.c.number, undoing.c.number)
            .join_from(memories, batches, batches.c.number == memories.c.batch)
            .join(undoing, (undoing.c.target == batches.c.number) & undoing.c.active)
            .where(among(memories.c.seq, seqs), ~batches.c.active)
            .order_by(undoing.c.number.desc())
        )
        if found := connection.execute(rolled_back).first():
            return ValueError(
                f"{key} was not deleted but taken back with its batch v{found[0]}. To undo that, roll back v{found[1]}."
            )
        member = memories.alias()
        lacking = (
            select(contains.c.member_id, contains.c.member_version)
            .join_from(memories, contains, same(memories.c, contains.c.derived_id, contains.c.derived_version))
            .outerjoin(member, same(member.c, contains.c.member_id, contains.c.member_version) & member.c.live)
            .where(among(memories.c.seq, seqs), member.c.seq.is_(None))
        )
        names = ", ".join(f"{identity}@{version}" for identity, version in connection.execute(lacking))
        return ValueError(f"{key} stays deleted: it was derived from {names}, deleted too. Restore that first.")

    def _derived_of(self, connection: Connection, seqs: Iterable[int]) -> list[int]:
        if not connection.execute(select(exists().select_from(contains))).scalar_one():
            return []
        member, derived = memories.alias(), memories.alias()
        statement = (
            select(derived.c.seq)
            .join_from(contains, member, same(member.c, contains.c.member_id, contains.c.member_version))
            .join(derived, same(derived.c, contains.c.derived_id, contains.c.derived_version))
            .distinct()
        )
        return list(connection.execute(statement.where(among(member.c.seq, seqs))).scalars())

    def _with_derived(self, connection: Connection, seqs: Sequence[int]) -> list[int]:
        found, todo = dict.fromkeys(seqs), list(seqs)
        while todo := [seq for seq in self._derived_of(connection, todo) if seq not in found]:
            found |= dict.fromkeys(todo)
        return list(found)

    def _resolve(self, connection: Connection, timelines: Iterable[str]) -> None:
        """Recomputes the ends of all statements of these timelines and writes those that changed."""
        where = (among(memories.c.timeline, timelines), memories.c.live)
        rows = connection.execute(select(memories).where(*where)).all()
        end_of = ends_of(rows)
        changed = [
            {"of": row.seq, **end_of[row.seq]._asdict()}
            for row in rows
            if end_of[row.seq] != End(row.invalid_at, row.expired_at)
        ]
        if changed:
            statement = update(memories).where(memories.c.seq == bindparam("of"))
            connection.execute(statement.values({name: bindparam(name) for name in End._fields}), changed)

    def _finish_purge(self) -> bool:
        finished = self.database.erase()
        if finished:
            (self.folder / UNFINISHED_PURGE).unlink(missing_ok=True)
        return finished


def _check_reason(reason: str | None) -> None:
    check_text("reason", reason)
    if reason is not None and len(reason) > MAX_REASON_CHARACTERS:
        raise ValueError(f"The reason has {len(reason)} characters; {MAX_REASON_CHARACTERS} at most. Shorten it.")


def _given(filters: Filters, operation: str) -> Filters:
    if not filters.checked().given:
        raise ValueError(f"{operation} needs a filter: user_id, agent_id or run_id. It never means everybody.")
    return filters


def _undo(writing: _Writing) -> None:
    """Leaves no batch of a call that had nothing to do."""
    transaction = writing.connection.get_transaction()
    assert transaction is not None
    transaction.rollback()


def _set_active(connection: Connection, batch: Row[Any], *, active: bool) -> None:
    connection.execute(update(batches).where(batches.c.number == batch.number).values(active=active))
    if batch.operation == "rollback":
        target = connection.execute(select(batches).where(batches.c.number == batch.target)).one()
        _set_active(connection, target, active=not active)


def _sha256(content: str) -> str:
    return hashlib.sha256(content.encode("utf-8")).hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
