"""How many memories hold each word, for PostgreSQL, which has no such count by itself."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    # Each word of `words`, and '' for all of them: memories that hold it, and the length of these together.
    op.create_table(
        "words_counted",
        sa.Column("lexeme", sa.Text, primary_key=True),
        sa.Column("memories", sa.BigInteger, nullable=False),
        sa.Column("length", sa.BigInteger, nullable=False),
    )
    op.execute("ALTER TABLE words_counted ALTER COLUMN lexeme SET STATISTICS 0")  # see 0001
    # FTS5's length has the words of whose it is too.
    op.execute("UPDATE words SET length = length + (SELECT count(*) FROM unnest(lexemes) WHERE lexeme ^@ ':')")
    op.execute(
        "INSERT INTO words_counted SELECT held, count(*), sum(length) "
        "FROM words CROSS JOIN LATERAL unnest(array_append(tsvector_to_array(lexemes), '')) AS held GROUP BY held"
    )
