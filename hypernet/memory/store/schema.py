"""The tables, in SQLAlchemy Core. Changing one takes a migration in `migrations/versions` and a new SCHEMA_VERSION.

batches    one row per call that wrote; `rollback` switches `active`
events     append-only: what happened to which memory version in which batch, never its content
memories   one row per memory version; the columns after created_at are computed from the rest
contains   what was derived from what: deleting a member deletes what contains it
vectors    a memory's embedding by one embedder
words      the full-text index of live memories: FTS5 of SQLite; tsvector of PostgreSQL, with `words_counted`
slots      the adapter of a memory version: which entry of `adapters/` holds it, by what it was written
costs      what a tier was measured to answer and to cost, and when
utilities  how useful a memory version was to what acted upon it; purged with it
traces     which memories were in a prompt, and how they moved log p of the answer; gone with its memory
"""

import json
from collections.abc import Iterable
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    bindparam,
    column,
    literal,
    table,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.functions import FunctionElement

SCHEMA_VERSION = "0005"
APPLICATION_ID = 0x48794D65  # "HyMe" in the header of memory.sqlite

metadata = MetaData()

batches = Table(
    "batches",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("operation", String, nullable=False),
    Column("target", Integer),  # of a rollback
    Column("active", Boolean, nullable=False, default=True),
    sqlite_autoincrement=True,
)

events = Table(
    "events",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("batch", Integer, ForeignKey("batches.number"), nullable=False, index=True),
    Column("at", BigInteger, nullable=False),
    Column("operation", String, nullable=False),
    Column("memory_id", String, nullable=False),
    Column("version", Integer, nullable=False),
    Column("reason", Text),
    Index("ix_events_memory", "memory_id", "version"),
    sqlite_autoincrement=True,
)

memories = Table(
    "memories",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("batch", Integer, ForeignKey("batches.number"), nullable=False, index=True),
    Column("memory_id", String, nullable=False),
    Column("version", Integer, nullable=False),
    Column("text", Text),
    Column("user_id", String),
    Column("agent_id", String, index=True),
    Column("run_id", String, index=True),
    Column("role", String),
    Column("subject", Text),
    Column("relation", Text),
    Column("source", Text),
    Column("sha256", String),
    Column("metadata", Text, nullable=False),
    Column("conflict", String, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("key", Text, index=True),  # user, agent, subject and relation; None without the latter two
    Column("timeline", Text, nullable=False, index=True),  # the key, or the memory's id
    Column("valid_at", BigInteger, nullable=False),
    Column("stated_until", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("live", Boolean, nullable=False),
    Column("invalid_at", BigInteger),
    Column("expired_at", BigInteger),
    UniqueConstraint("memory_id", "version"),
    Index("ix_memories_user", "user_id", "live", "created_at"),
    sqlite_autoincrement=True,
)

contains = Table(
    "contains",
    metadata,
    Column("derived_id", String, primary_key=True),
    Column("derived_version", Integer, primary_key=True),
    Column("member_id", String, primary_key=True),
    Column("member_version", Integer, primary_key=True),
    Index("ix_contains_member", "member_id", "member_version"),
)

vectors = Table(
    "vectors",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("embedder", String, primary_key=True),
    Column("vector", LargeBinary, nullable=False),
)

slots = Table(
    "slots",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("memory_id", String, nullable=False),
    Column("version", Integer, nullable=False),
    Column("generator", String, nullable=False, index=True),  # `AdapterBank.generator`
    Column("base_model", String, nullable=False),  # fingerprint
    Column("sha256", String, nullable=False),  # of the memory's text
    Column("entry", String, nullable=False, index=True),  # id in the AdapterLibrary
    Column("chunks", Integer, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("seconds", Float, nullable=False),  # its part of the pass that wrote it; 0 if it was copied
    Column("change", Integer, nullable=False, index=True),  # higher than any before
    UniqueConstraint("memory_id", "version"),
    sqlite_autoincrement=True,
)

costs = Table(
    "costs",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("user_id", String),
    Column("agent_id", String),
    Column("run_id", String),
    Column("tier", String, nullable=False),
    Column("generator", String),  # None: no adapters were used
    Column("base_model", String, nullable=False),
    Column("reference", String, nullable=False),  # "given" answers, or the "oracle": the memory alone in the prompt
    Column("memories", Integer, nullable=False),  # that held
    Column("questions", Integer, nullable=False),
    Column("accuracy", Float, nullable=False),
    Column("oracle", Float),  # accuracy with the memory alone in the prompt, where it is known
    Column("question_tokens", Float, nullable=False),  # that the tier adds to a prompt
    Column("question_s", Float, nullable=False),  # median, one question at a time
    Column("prepare_s", Float, nullable=False),  # of writing what it uses, once
    sqlite_autoincrement=True,
)

utilities = Table(
    "utilities",
    metadata,
    Column("memory_id", String, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("value", Float, nullable=False),
    Column("outcomes", Integer, nullable=False),  # that it was learned from
    Column("updated_at", BigInteger, nullable=False),
)

traces = Table(
    "traces",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("asked", String, nullable=False, index=True),  # one question asked once; its memories share it
    Column("at", BigInteger, nullable=False),
    Column("user_id", String, index=True),
    Column("agent_id", String),
    Column("run_id", String),
    Column("question", Text, nullable=False),
    Column("memory_id", String, nullable=False),
    Column("version", Integer, nullable=False),
    Column("log_p", Float, nullable=False),  # of the answer in nats, with all memories of the prompt
    Column("log_p_without", Float, nullable=False),
    Column("base_model", String, nullable=False),  # fingerprint
    Index("ix_traces_memory", "memory_id", "version"),
    sqlite_autoincrement=True,
)

# Not in `metadata`: SQLite's is a virtual table, and counts by itself what PostgreSQL has in `words_counted`.
words = table("words", column("rowid", Integer))


def among(column: ColumnElement[Any], values: Iterable[int | str] | str) -> ColumnElement[bool]:
    """column IN values, any number of them: as one JSON array, for SQLite limits the parameters of a statement.

    Args:
        values: or the name of the parameter that gives the array when the statement is executed.
    """
    given = bindparam(values, type_=String) if isinstance(values, str) else literal(json.dumps(list(values)))
    return _Among(column, given)


class _Among(FunctionElement[bool]):
    type = Boolean()
    inherit_cache = True


@compiles(_Among, "sqlite")
def _among_of_sqlite(element: _Among, compiler: SQLCompiler, **settings: Any) -> str:
    column, given = (compiler.process(clause, **settings) for clause in element.clauses)
    return f"{column} IN (SELECT value FROM json_each({given}))"


@compiles(_Among, "postgresql")
def _among_of_postgresql(element: _Among, compiler: SQLCompiler, **settings: Any) -> str:
    column, given = (compiler.process(clause, **settings) for clause in element.clauses)
    kind = compiler.dialect.type_compiler_instance.process(list(element.clauses)[0].type)
    return f"{column} IN (SELECT CAST(value AS {kind}) FROM json_array_elements_text(CAST({given} AS JSON)))"
