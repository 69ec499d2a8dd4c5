"""The adapter tier: slots and costs."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "slots",
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("memory_id", sa.String, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("generator", sa.String, nullable=False, index=True),
        sa.Column("base_model", sa.String, nullable=False),
        sa.Column("sha256", sa.String, nullable=False),
        sa.Column("entry", sa.String, nullable=False, index=True),
        sa.Column("chunks", sa.Integer, nullable=False),
        sa.Column("bytes", sa.Integer, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("change", sa.Integer, nullable=False, index=True),
        sa.UniqueConstraint("memory_id", "version"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "costs",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("user_id", sa.String),
        sa.Column("agent_id", sa.String),
        sa.Column("run_id", sa.String),
        sa.Column("tier", sa.String, nullable=False),
        sa.Column("generator", sa.String),
        sa.Column("base_model", sa.String, nullable=False),
        sa.Column("reference", sa.String, nullable=False),
        sa.Column("memories", sa.Integer, nullable=False),
        sa.Column("questions", sa.Integer, nullable=False),
        sa.Column("accuracy", sa.Float, nullable=False),
        sa.Column("oracle", sa.Float),
        sa.Column("question_tokens", sa.Float, nullable=False),
        sa.Column("question_s", sa.Float, nullable=False),
        sa.Column("prepare_s", sa.Float, nullable=False),
        sqlite_autoincrement=True,
    )
