"""The token tier: batches, events, memories, contains, vectors, words."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import TSVECTOR

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "batches",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("operation", sa.String, nullable=False),
        sa.Column("target", sa.Integer),
        sa.Column("active", sa.Boolean, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "events",
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("batch", sa.Integer, sa.ForeignKey("batches.number"), nullable=False, index=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("operation", sa.String, nullable=False),
        sa.Column("memory_id", sa.String, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("reason", sa.Text),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_events_memory", "events", ["memory_id", "version"])
    op.create_table(
        "memories",
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("batch", sa.Integer, sa.ForeignKey("batches.number"), nullable=False, index=True),
        sa.Column("memory_id", sa.String, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("text", sa.Text),
        sa.Column("user_id", sa.String),
        sa.Column("agent_id", sa.String, index=True),
        sa.Column("run_id", sa.String, index=True),
        sa.Column("role", sa.String),
        sa.Column("subject", sa.Text),
        sa.Column("relation", sa.Text),
        sa.Column("source", sa.Text),
        sa.Column("sha256", sa.String),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("conflict", sa.String, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("key", sa.Text, index=True),
        sa.Column("timeline", sa.Text, nullable=False, index=True),
        sa.Column("valid_at", sa.BigInteger, nullable=False),
        sa.Column("stated_until", sa.BigInteger),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("live", sa.Boolean, nullable=False),
        sa.Column("invalid_at", sa.BigInteger),
        sa.Column("expired_at", sa.BigInteger),
        sa.UniqueConstraint("memory_id", "version"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_memories_user", "memories", ["user_id", "live", "created_at"])
    op.create_table(
        "contains",
        sa.Column("derived_id", sa.String, primary_key=True),
        sa.Column("derived_version", sa.Integer, primary_key=True),
        sa.Column("member_id", sa.String, primary_key=True),
        sa.Column("member_version", sa.Integer, primary_key=True),
    )
    op.create_index("ix_contains_member", "contains", ["member_id", "member_version"])
    op.create_table(
        "vectors",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("embedder", sa.String, primary_key=True),
        sa.Column("vector", sa.LargeBinary, nullable=False),
    )
    if op.get_bind().dialect.name == "postgresql":
        _postgresql()
    else:
        _sqlite()


def _sqlite() -> None:
    # English words without their endings, letters without their accents; scope holds who may see it.
    op.execute("CREATE VIRTUAL TABLE words USING fts5(text, scope, tokenize='porter unicode61 remove_diacritics 2')")
    for change in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER events_{change.lower()} BEFORE {change} ON events "
            "BEGIN SELECT RAISE(ABORT, 'events are append-only'); END"
        )


def _postgresql() -> None:
    # length: words of the text. lexemes: its words without their endings, and who may see it.
    op.create_table(
        "words",
        sa.Column("rowid", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("length", sa.Integer, nullable=False),
        sa.Column("lexemes", TSVECTOR, nullable=False),
    )
    op.create_index("words_lexemes", "words", ["lexemes"], postgresql_using="gin")
    # FTS5's stemmer; unlike "english_stem" without words that are not searched.
    op.execute("CREATE TEXT SEARCH DICTIONARY words_stem (TEMPLATE = pg_catalog.snowball, LANGUAGE = porter)")
    op.execute(
        "CREATE FUNCTION events_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'events are append-only'; END $$"
    )
    op.execute(
        "CREATE TRIGGER events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON events "
        "FOR EACH STATEMENT EXECUTE FUNCTION events_append_only()"
    )
    # ANALYZE copies frequent values into the catalog, where a purge does not reach them.
    content = ("text", "user_id", "agent_id", "run_id", "role", "subject", "relation", "source", "sha256", "metadata")
    columns = {"memories": (*content, "key", "timeline"), "vectors": ("vector",), "words": ("lexemes",)}
    # pgvector's copy of `vector`, where the extension is there and in the search path.
    if op.get_bind().exec_driver_sql("SELECT to_regtype('vector')").scalar() is not None:
        op.execute("ALTER TABLE vectors ADD COLUMN embedding vector")
        columns["vectors"] = ("vector", "embedding")
    for table, names in columns.items():
        op.execute(f"ALTER TABLE {table} " + ", ".join(f"ALTER COLUMN {name} SET STATISTICS 0" for name in names))
