"""Retriever: bm25 over words and cosines over vectors, fused by reciprocal rank; whose and when are part of the search.

retriever = Retriever(store, embedder=embedder)
retriever.search("Who taught Fenda Elfax?", Filters(user_id="alice"), limit=5, as_of="2026-04-01")

Vectors are computed by whoever searches first and stored; each user's are then held in memory as one matrix, or where
PostgreSQL has pgvector searched by the server.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from numbers import Real
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, Row, and_, column, insert, select, table, text

from hypernet.memory.embedding import Embedder, Vectors, question_vectors
from hypernet.memory.store import full_text
from hypernet.memory.store.records import Filters, Hit, whole_number
from hypernet.memory.store.schema import among, memories, vectors
from hypernet.memory.store.times import FOREVER, Instant, now, to_micros
from hypernet.memory.store.token_store import TokenStore
from hypernet.text.cleaning import whole

# Added to a rank before its reciprocal is taken. Cormack, Clarke, Buettcher 2009, SIGIR: reciprocal rank fusion.
RANK_OFFSET = 60
_USERS_HELD = 256  # whose matrices stay in memory
_STORED_AS = np.float16  # 2.4e-4 of a cosine, half the bytes
# pgvector's column, which the tables of other databases do not have. <#> is minus the dot product.
_EMBEDDINGS = table("vectors", column("seq"), column("embedder"), column("embedding"))
_KEEP = text("UPDATE vectors SET embedding = CAST(:embedding AS vector) WHERE seq = :seq AND embedder = :embedder")
_NEAREST = f"""
SELECT m.seq FROM memories m JOIN vectors v ON v.seq = m.seq AND v.embedder = :embedder
WHERE v.embedding IS NOT NULL AND {full_text.HOLDS}
ORDER BY v.embedding <#> CAST(:question AS vector), m.seq DESC LIMIT CAST(:limit AS bigint)
"""


@dataclass(frozen=True)
class _Matrix:
    """One user's live memories as of one batch.

    seqs, valid_at, invalid_at: [N], microseconds; ids: agent_id and run_id, [N]; vectors: [N, D] of unit length.
    """

    batch: int
    seqs: npt.NDArray[np.int64]
    valid_at: npt.NDArray[np.int64]
    invalid_at: npt.NDArray[np.int64]
    ids: dict[str, npt.NDArray[np.object_]]
    vectors: Vectors

    def holding(self, filters: Filters, as_of: int) -> npt.NDArray[np.bool_]:
        """[N], whether each is within the filters and holds then."""
        found = (self.valid_at <= as_of) & (as_of < self.invalid_at)
        for name, ids in self.ids.items():
            if (wanted := getattr(filters, name)) is not None:
                found &= ids == wanted
        return found


class Retriever:
    """Searches one store.

    Args:
        store: what is searched.
        embedder: gives the vectors; None: words alone.
        num_candidates: of each ranking that are fused.
        dense_weight: of the vectors' ranking, where the words' has 1.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        embedder: Embedder | None = None,
        num_candidates: int = 50,
        dense_weight: float = 0.5,
    ) -> None:
        check_settings(num_candidates, dense_weight)
        self.store, self.embedder = store, embedder
        self.num_candidates, self.dense_weight = num_candidates, dense_weight
        self._held: OrderedDict[str | None, _Matrix] = OrderedDict()
        self._kept: dict[str | None, int] = {}  # user → the batch up to which pgvector has their vectors
        with store.database.read() as connection:
            self._in_server = embedder is not None and store.database.dialect.finds_vectors(connection)
        self._lock = Lock()  # of _held: a server searches from several threads

    def search(
        self,
        question: str,
        filters: Filters,
        *,
        limit: int = 5,
        as_of: Instant | None = None,
        known_at: Instant | None = None,
    ) -> list[Hit]:
        """The memories within the filters that hold at `as_of` (None: now) and answer best, the best first.

        Args:
            known_at: as it was known then; None: now.

        Raises:
            ValueError: the question is no text, a filter blank, a date impossible or the limit below 1.
        """
        if not isinstance(question, str):
            raise ValueError(f"A question is a text, not {question!r}.")
        limit, filters, question = whole_number(limit, "limit"), filters.checked(), whole(question, "question")
        when = now() if as_of is None else to_micros(as_of, "as_of")
        known = None if known_at is None else to_micros(known_at, "known_at")
        matrix, dense = None, self.embedder is not None and bool(question.strip())
        if dense:
            with self._lock:
                if self._in_server:
                    self._keep(filters.user_id)
                else:
                    matrix = self._matrix(filters.user_id)
        with self.store.database.read() as connection:
            held = None if known is None else self.store.holding(connection, filters, as_of=when, known_at=known)
            wanted = max(limit, self.num_candidates)
            words = full_text.ranked(connection, question, filters, as_of=when, known_at=known, limit=wanted)
            rankings = [([seq for seq in words if held is None or seq in held][:wanted], 1.0)]
            if dense and matrix is None:
                near = self._nearest_in_server(connection, question, filters, when, known, wanted)
                near = [seq for seq in near if held is None or seq in held][:wanted]
                rankings.append((near, self.dense_weight))
            elif matrix is not None:
                rankings.append((self._nearest(question, matrix, filters, when, held, wanted), self.dense_weight))
            scores: dict[int, float] = {}
            for ranking, weight in rankings:
                for rank, seq in enumerate(ranking, 1):
                    scores[seq] = scores.get(seq, 0.0) + weight / (RANK_OFFSET + rank)
            best = sorted(scores, key=lambda seq: (-scores[seq], -seq))[:limit]
            # A matrix may be one batch older than this transaction: what was deleted in between is not there.
            found = self.store.rows_by_seq(connection, best) if held is None else held
            contested = [seq for seq in best if seq in found and found[seq].conflict == "keep_both"]
            conflicts = self.store.conflicting(connection, contested, when) if contested else {}
        return [
            Hit(**vars(found[seq]), score=scores[seq], conflicts=conflicts.get(seq, ())) for seq in best if seq in found
        ]

    def _nearest(
        self,
        question: str,
        matrix: _Matrix,
        filters: Filters,
        when: int,
        held: dict[int, Any] | None,
        limit: int,
    ) -> list[int]:
        if held is None:
            chosen = matrix.holding(filters, when)
        else:
            chosen = np.isin(matrix.seqs, np.fromiter(held, np.int64, len(held)))
        if not chosen.any():
            return []
        assert self.embedder is not None
        cosines = matrix.vectors @ question_vectors(self.embedder, [question])[0]
        cosines[~chosen] = -np.inf
        best = np.argpartition(-cosines, limit)[:limit] if limit < len(cosines) else np.arange(len(cosines))
        best = best[np.lexsort((-matrix.seqs[best], -cosines[best]))]
        return [int(seq) for seq in matrix.seqs[best[np.isfinite(cosines[best])]]]

    def _nearest_in_server(
        self, connection: Connection, question: str, filters: Filters, when: int, known: int | None, limit: int
    ) -> list[int]:
        """With `known`, ends that became known later count as well, as `full_text.ranked`."""
        assert self.embedder is not None
        values = {
            **{"embedder": self.embedder.name, "question": _literal(question_vectors(self.embedder, [question])[0])},
            **{"as_of": when, "known_at": FOREVER if known is None else known, "ends_are_old": known is not None},
            **{"limit": limit if known is None else None, **filters.given},
        }
        own = "".join(f" AND m.{name} = :{name}" for name in filters.given)
        return list(connection.execute(text(_NEAREST.format(filters=own)), values).scalars())

    def _keep(self, user_id: str | None) -> None:
        """Gives pgvector the vectors of one user (None: everybody) that it lacks."""
        assert self.embedder is not None
        with self.store.database.read() as connection:
            batch = self.store.last_batch(connection)
            if self._kept.get(user_id) == batch:
                return
            same = (_EMBEDDINGS.c.seq == memories.c.seq) & (_EMBEDDINGS.c.embedder == self.embedder.name)
            where = [memories.c.live, memories.c.text.is_not(None), _EMBEDDINGS.c.embedding.is_(None)]
            if user_id is not None:
                where.append(memories.c.user_id == user_id)
            rows = connection.execute(select(memories.c.seq).outerjoin(_EMBEDDINGS, same).where(*where)).all()
            found = self._stored(connection, rows, None)
        if missing := [row.seq for row in rows if row.seq not in found]:
            found |= self._embed(missing)
        if found:
            with self.store.database.write() as connection:
                values = [{"seq": seq, "embedding": _literal(vector)} for seq, vector in sorted(found.items())]
                connection.execute(_KEEP, [{**value, "embedder": self.embedder.name} for value in values])
        self._kept[user_id] = batch

    def _matrix(self, user_id: str | None) -> _Matrix:
        """One user's vectors (None: everybody's), read anew where something was written since."""
        assert self.embedder is not None
        with self.store.database.read() as connection:
            batch = self.store.last_batch(connection)
            held = self._held.get(user_id)
            if held is not None and held.batch == batch:
                self._held.move_to_end(user_id)
                return held
            rows = self._rows(connection, user_id)
            stored = self._stored(connection, rows, held)
        missing = [row.seq for row in rows if row.seq not in stored]
        if missing:
            stored |= self._embed(missing)
        rows = [row for row in rows if row.seq in stored]  # not purged meanwhile
        found = _Matrix(
            batch=batch,
            seqs=np.array([row.seq for row in rows], np.int64),
            valid_at=np.array([row.valid_at for row in rows], np.int64),
            invalid_at=np.array([FOREVER if row.invalid_at is None else row.invalid_at for row in rows], np.int64),
            ids={name: np.array([row._mapping[name] for row in rows], object) for name in ("agent_id", "run_id")},
            vectors=np.stack([stored[row.seq] for row in rows]) if rows else np.zeros((0, 1), np.float32),
        )
        self._held[user_id] = found
        while len(self._held) > _USERS_HELD:
            self._held.popitem(last=False)
        return found

    def _rows(self, connection: Connection, user_id: str | None) -> Sequence[Row[Any]]:
        names = ("seq", "valid_at", "invalid_at", "agent_id", "run_id")
        where = [memories.c.live, memories.c.text.is_not(None)]
        if user_id is not None:
            where.append(memories.c.user_id == user_id)
        return connection.execute(select(*(memories.c[name] for name in names)).where(*where)).all()

    def _stored(
        self, connection: Connection, rows: Sequence[Row[Any]], held: _Matrix | None
    ) -> dict[int, npt.NDArray[np.float32]]:
        """seq → vector, of those that are held or in the database."""
        assert self.embedder is not None
        known = {} if held is None else dict(zip(held.seqs.tolist(), held.vectors, strict=True))
        lacking = [row.seq for row in rows if row.seq not in known]
        if lacking:
            where = and_(vectors.c.embedder == self.embedder.name, among(vectors.c.seq, lacking))
            for seq, blob in connection.execute(select(vectors.c.seq, vectors.c.vector).where(where)):
                known[seq] = np.frombuffer(blob, _STORED_AS).astype(np.float32)
        return known

    def _embed(self, seqs: Sequence[int]) -> dict[int, npt.NDArray[np.float32]]:
        """Computes vectors and stores them with whatever is still there."""
        assert self.embedder is not None
        with self.store.database.read() as connection:
            statement = select(memories.c.seq, memories.c.text).where(among(memories.c.seq, seqs))
            texts = {seq: content for seq, content in connection.execute(statement)}
        rounded = self.embedder.embed(list(texts.values())).astype(_STORED_AS)
        found = dict(zip(texts, rounded, strict=True))
        with self.store.database.write() as connection:
            there = set(connection.execute(select(memories.c.seq).where(among(memories.c.seq, texts))).scalars())
            where = and_(vectors.c.embedder == self.embedder.name, among(vectors.c.seq, texts))
            stored = set(connection.execute(select(vectors.c.seq).where(where)).scalars())  # by a faster process
            rows = [
                {"seq": seq, "embedder": self.embedder.name, "vector": vector.tobytes()}
                for seq, vector in found.items()
                if seq in there - stored
            ]
            if rows:
                connection.execute(insert(vectors), rows)
        return {seq: found[seq].astype(np.float32) for seq in there}


def _literal(vector: npt.NDArray[np.float32]) -> str:
    """As pgvector reads it."""
    return f"[{','.join(map(str, vector.tolist()))}]"


def check_settings(num_candidates: int, dense_weight: float) -> None:
    """Raises ValueError if one of them cannot be."""
    whole_number(num_candidates, "num_candidates")
    if isinstance(dense_weight, bool) or not isinstance(dense_weight, Real) or not 0 <= dense_weight < inf:
        raise ValueError(f"dense_weight is {dense_weight!r}. Give a number from 0 on.")
