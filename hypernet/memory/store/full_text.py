"""The full-text index of live memories: FTS5's bm25, with whose memories may be seen as part of the question.

Texts are folded (NFKC, case) and scripts without spaces are cut into characters, so that any part of a run can be
asked for: by its pairs of characters, as search engines do. Questions are only ever searched as quoted words.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable
from functools import cache

from sqlalchemy import Connection, TextClause, text

from hypernet.memory.store.records import Filters
from hypernet.memory.store.times import FOREVER

MAX_WORDS = 256  # of a question
# Han with its extensions, kana, Hangul, Thai, Lao, Myanmar, Khmer.
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"
)
_RUN = re.compile(f"[{_SPACELESS}]+")
_INSERT = text("INSERT INTO words(rowid, text, scope) VALUES(:seq, :text, :scope)")
_DELETE = text("DELETE FROM words WHERE rowid IN (SELECT value FROM json_each(:seqs))")
_RANKED = """
SELECT m.seq FROM words JOIN memories m ON m.seq = words.rowid
WHERE words MATCH :match AND m.live AND m.created_at <= :known_at AND m.valid_at <= :as_of
  AND (:ends_are_old OR m.invalid_at IS NULL OR m.invalid_at > :as_of) {filters}
ORDER BY bm25(words, 1.0, 0.0), m.seq DESC LIMIT :limit
"""


def index(connection: Connection, memories: Iterable[tuple[int, str, Filters]]) -> None:
    """Makes live memories findable: (seq, text, filters) each."""
    rows = [{"seq": seq, "text": folded(content), "scope": " ".join(_scope(whose))} for seq, content, whose in memories]
    if rows:
        connection.execute(_INSERT, rows)


def unindex(connection: Connection, seqs: Iterable[int]) -> None:
    connection.execute(_DELETE, {"seqs": json.dumps(list(seqs))})


def rebuild(connection: Connection) -> None:
    """Writes the index anew: words of deleted texts stay in its segments until then."""
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
    if not (words := query(question)):
        return []
    scope = " AND ".join(f'scope : "{token}"' for token in _scope(filters))
    values = {
        "match": f"{scope} AND (text : ({words}))" if scope else f"text : ({words})",
        "as_of": as_of,
        "known_at": FOREVER if known_at is None else known_at,
        "ends_are_old": known_at is not None,
        "limit": -1 if known_at is not None else limit,
        **filters.given,
    }
    return [row[0] for row in connection.execute(_ranked(tuple(filters.given)), values)]


@cache
def _ranked(filters: tuple[str, ...]) -> TextClause:
    return text(_RANKED.format(filters="".join(f" AND m.{name} = :{name}" for name in filters)))


def folded(content: str) -> str:
    """As it is indexed: compatibility forms and case folded, scripts without spaces cut into characters."""
    content = unicodedata.normalize("NFKC", content).casefold()
    return _RUN.sub(lambda run: " " + " ".join(run.group()) + " ", content)


def query(question: str) -> str:
    """FTS5 expression: any of the question's words, each a quoted string; empty if it has none."""
    content = unicodedata.normalize("NFKC", question).casefold()
    terms: list[str] = []
    for run in _RUN.findall(content):
        terms += [" ".join(run[i : i + 2]) for i in range(max(1, len(run) - 1))]
    rest = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in _RUN.sub(" ", content))
    terms = [term for term in dict.fromkeys([*rest.split(), *terms]) if any(c.isalnum() for c in term)]
    return " OR ".join(f'"{term}"' for term in terms[:MAX_WORDS])


def _scope(filters: Filters) -> list[str]:
    """One word of the index per id. FTS5 then walks one user's memories instead of everybody's."""
    return [
        name[0] + hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:24]
        for name, value in filters.given.items()
    ]
