"""The full-text index of live memories, ranked by bm25, with whose memories may be seen as part of the question.

Texts are folded (NFKC, case) and scripts without spaces are cut into characters, so that any part of a run can be
asked for: by its pairs of characters, as search engines do. Questions are only ever searched as quoted words.

SQLite's FTS5 cuts and ranks by itself. PostgreSQL has no bm25 and cuts by its locale, so words are cut here and stemmed
there, by the same stemmer (Porter's); a tsvector keeps them, in which a word has as many positions as it has
occurrences, 255 at most. Its bm25 is FTS5's, with the frequencies of all memories: within one user's 200 a word that
few of them hold looks as rare as a name, and Recall@5 of 8 such users is 0.93 instead of 0.98. `words_counted` keeps
them: of 10,000 memories a search takes 3 ms, and 250 if it counts.

Source: Robertson, Zaragoza 2009, doi:10.1561/1500000019; FTS5's formula, https://sqlite.org/fts5.html#the_bm25_function
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any

from sqlalchemy import Connection, Row, TextClause, delete, text

from hypernet.memory.store.records import Filters
from hypernet.memory.store.schema import among, words
from hypernet.memory.store.times import FOREVER

MAX_WORDS = 256  # of a question
# Han with its extensions, kana, Hangul, Thai, Lao, Myanmar, Khmer.
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"
)
_RUN = re.compile(f"[{_SPACELESS}]+")
_ACCENTS = re.compile("([a-z])[\u0300-\u036f]+")  # of Latin letters alone, as FTS5 has it
# Of a tsvector: bytes of a word and of all of them, which has room for counts and for whose it is.
_MAX_WORD_CHARACTERS, _MAX_BYTES = 500, 500_000

# Of a memory m, for `ranked` and for searches of the same parameters.
HOLDS = """m.live AND m.created_at <= :known_at AND m.valid_at <= :as_of
  AND (:ends_are_old OR m.invalid_at IS NULL OR m.invalid_at > :as_of) {filters}"""
_INSERT = {
    "sqlite": text("INSERT INTO words(rowid, text, scope) VALUES(:seq, :text, :scope)"),
    "postgresql": text("""
INSERT INTO words(rowid, length, lexemes) SELECT :seq, :length, CAST(COALESCE(string_agg(lexeme, ' '), '') AS tsvector)
FROM (
  SELECT '''' || stem || ''':' || (SELECT string_agg(CAST(n AS text), ',') FROM generate_series(1, least(sum, 255)) n)
  FROM (
    SELECT (ts_lexize('words_stem', word))[1], sum(count)
    FROM unnest(CAST(:words AS text[]), CAST(:counts AS int[])) AS found(word, count) GROUP BY 1
  ) AS stems(stem, sum)
  UNION ALL SELECT '''' || token || '''' FROM unnest(CAST(:scope AS text[])) token
) AS lexemes(lexeme)
"""),
}
_RANKED = {
    "sqlite": f"""
SELECT m.seq FROM words JOIN memories m ON m.seq = words.rowid WHERE words MATCH :match AND {HOLDS}
ORDER BY bm25(words, 1.0, 0.0), m.seq DESC LIMIT :limit
""",
    "postgresql": f"""
WITH sizes AS (
  SELECT CAST(memories AS float8) AS documents, CAST(length AS float8) / memories AS length
  FROM words_counted WHERE lexeme = ''
),
asked AS (
  SELECT lexeme, place, greatest(1e-6, ln((documents - memories + 0.5) / (memories + 0.5))) AS weight
  FROM (
    SELECT (ts_lexize('words_stem', word))[1] AS lexeme, place
    FROM unnest(CAST(:words AS text[])) WITH ORDINALITY AS given(word, place)
  ) AS stems JOIN words_counted USING (lexeme) CROSS JOIN sizes
),
scores AS (
  SELECT rowid,
    sum(weight * (number * 2.2 / (number + 1.2 * (0.25 + 0.75 * o.length / s.length))) ORDER BY place) AS score
  FROM (
    SELECT i.rowid, i.length, weight, place, CAST(cardinality(u.positions) AS float8) AS number
    FROM words i CROSS JOIN LATERAL unnest(i.lexemes) u JOIN asked USING (lexeme)
    WHERE {{scope}} AND i.lexemes @@ (SELECT CAST(string_agg('''' || lexeme || '''', '|') AS tsquery) FROM asked)
  ) AS o CROSS JOIN sizes s GROUP BY rowid
)
-- A look-up for each: without statistics of user_id all scores might be gone through for each memory, 12 s of 6,000.
SELECT seq FROM scores CROSS JOIN LATERAL (SELECT seq FROM memories m WHERE m.seq = scores.rowid AND {HOLDS} OFFSET 0) m
ORDER BY score DESC, seq DESC LIMIT CAST(:limit AS bigint)
""",
}

# PostgreSQL's: each word of some rows, and '' for all; memories that hold it, and their length together.
_HELD = """
SELECT lexeme, count(*) AS memories, sum(length) AS length
FROM words CROSS JOIN LATERAL unnest(array_append(tsvector_to_array(lexemes), '')) AS held(lexeme)
WHERE {rows} GROUP BY lexeme
"""
_HELD_BY = _HELD.format(rows="rowid = ANY(CAST(:seqs AS int[]))")
_ADD_COUNTS = text(f"""
INSERT INTO words_counted AS c (lexeme, memories, length) {_HELD_BY}
ON CONFLICT (lexeme) DO UPDATE SET memories = c.memories + excluded.memories, length = c.length + excluded.length
""")
_TAKE_COUNTS = text(f"""
WITH held AS MATERIALIZED ({_HELD_BY}), gone AS (
  DELETE FROM words_counted c USING held h WHERE c.lexeme = h.lexeme AND c.memories <= h.memories
)
UPDATE words_counted c SET memories = c.memories - h.memories, length = c.length - h.length
FROM held h WHERE c.lexeme = h.lexeme AND c.memories > h.memories
""")
_DIFFERENT_COUNTS = text(f"""
WITH held AS ({_HELD.format(rows="TRUE")})
SELECT count(*) FROM held h FULL JOIN words_counted c USING (lexeme)
WHERE (h.memories, h.length) IS DISTINCT FROM (c.memories, c.length)
""")


def index_rows(connection: Connection, memories: Iterable[Row[Any]]) -> None:
    """Makes live memories findable, those that have a text."""
    values = _counted if connection.dialect.name == "postgresql" else _folded
    found = [
        values(row.seq, row.text, Filters(row.user_id, row.agent_id, row.run_id))
        for row in memories
        if row.text is not None
    ]
    if found:
        connection.execute(_INSERT[connection.dialect.name], found)
        _change_counts(connection, _ADD_COUNTS, [row["seq"] for row in found])


def unindex(connection: Connection, seqs: Iterable[int]) -> None:
    seqs = list(seqs)
    if seqs:
        _change_counts(connection, _TAKE_COUNTS, seqs)
        connection.execute(delete(words).where(among(words.c.rowid, seqs)))


def clear(connection: Connection) -> None:
    """An index of nothing."""
    connection.execute(delete(words))
    if connection.dialect.name == "postgresql":
        connection.execute(text("DELETE FROM words_counted"))


def num_wrong_counts(connection: Connection) -> int:
    """Words of which PostgreSQL's index has another count than its rows."""
    if connection.dialect.name != "postgresql":
        return 0
    return int(connection.execute(_DIFFERENT_COUNTS).scalar_one())


def _change_counts(connection: Connection, statement: TextClause, seqs: list[int]) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(statement, {"seqs": seqs})


def rebuild(connection: Connection) -> None:
    """Writes FTS5's index anew: words of deleted texts stay in its segments until then. PostgreSQL's needs erasing."""
    if connection.dialect.name == "sqlite":
        connection.execute(text("INSERT INTO words(words) VALUES('rebuild')"))


def ranked(
    connection: Connection,
    question: str,
    filters: Filters,
    *,
    as_of: int,
    known_at: int | None,
    limit: int,
) -> list[int]:
    """seqs of memories that hold at `as_of` and share a word with the question, best first.

    With `known_at`, ends that became known later count as well: the caller leaves out what did not hold.
    """
    values = {
        "as_of": as_of,
        "known_at": FOREVER if known_at is None else known_at,
        "ends_are_old": known_at is not None,
        **filters.given,
    }
    limit_or_none = None if known_at is not None else limit
    if connection.dialect.name == "postgresql":
        asked = [word.replace(" ", "")[:_MAX_WORD_CHARACTERS] for word in _asked(_bare(question))]
        scope = "&".join(f"':{token}'" for token in _scope(filters))
        values |= {"words": asked, "limit": limit_or_none, **({"scope": scope} if scope else {})}
    else:
        expression = query(question)
        asked = [expression] if expression else []
        scope = " AND ".join(f'scope : "{token}"' for token in _scope(filters))
        values["match"] = f"{scope} AND (text : ({expression}))" if scope else f"text : ({expression})"
        values["limit"] = -1 if limit_or_none is None else limit_or_none
    if not asked:
        return []
    return [row[0] for row in connection.execute(_ranked(connection.dialect.name, tuple(filters.given)), values)]


@cache
def _ranked(dialect: str, filters: tuple[str, ...]) -> TextClause:
    own = "".join(f" AND m.{name} = :{name}" for name in filters)
    return text(_RANKED[dialect].format(filters=own, scope="lexemes @@ CAST(:scope AS tsquery)" if filters else "TRUE"))


def folded(content: str) -> str:
    """As FTS5 indexes it: compatibility forms and case folded, scripts without spaces cut into characters."""
    content = unicodedata.normalize("NFKC", content).casefold()
    return _RUN.sub(lambda run: " " + " ".join(run.group()) + " ", content)


def query(question: str) -> str:
    """FTS5 expression: any of the question's words, each a quoted string; empty if it has none."""
    return " OR ".join(f'"{word}"' for word in _asked(unicodedata.normalize("NFKC", question).casefold()))


def _asked(content: str) -> list[str]:
    """Each of a question's words once; of scripts without spaces pairs of characters."""
    pairs: list[str] = []
    for run in _RUN.findall(content):
        pairs += [" ".join(run[i : i + 2]) for i in range(max(1, len(run) - 1))]
    found = [word for word in dict.fromkeys([*_spaced(content), *pairs]) if any(c.isalnum() for c in word)]
    return found[:MAX_WORDS]


def _spaced(content: str) -> list[str]:
    """Words of scripts with spaces."""
    rest = _RUN.sub(" ", content)
    return "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in rest).split()


def _folded(seq: int, content: str, whose: Filters) -> dict[str, Any]:
    return {"seq": seq, "text": folded(content), "scope": " ".join(_scope(whose))}


def _bare(content: str) -> str:
    """Compatibility forms and case folded, Latin letters without accents: what FTS5 does to words by itself."""
    content = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", content).casefold())
    return unicodedata.normalize("NFKC", _ACCENTS.sub(r"\1", content))


def _counted(seq: int, content: str, whose: Filters) -> dict[str, Any]:
    """A row of PostgreSQL's index; words beyond `_MAX_BYTES` cannot be asked for."""
    content = _bare(content)
    found = [word[:_MAX_WORD_CHARACTERS] for word in _spaced(content)]
    length = len(found) + len(whose.given)
    for run in _RUN.findall(content):
        found += [*run, *(run[i : i + 2] for i in range(len(run) - 1))]
        length += len(run)
    counts, left = Counter(found), _MAX_BYTES
    kept: dict[str, int] = {}
    for word, number in counts.items():
        if (left := left - len(word.encode()) - 4 * min(number, 255)) < 0:
            break
        kept[word] = number
    values = {"words": list(kept), "counts": list(kept.values()), "scope": [f":{token}" for token in _scope(whose)]}
    return {"seq": seq, "length": length, **values}


def _scope(filters: Filters) -> list[str]:
    """One word of the index per id. It then walks one user's memories instead of everybody's."""
    return [
        name[0] + hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:24]
        for name, value in filters.given.items()
    ]
