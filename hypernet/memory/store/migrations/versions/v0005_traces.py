"""Traces: which memories were in a prompt, and how they moved log p of the answer."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "traces",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("asked", sa.String, nullable=False, index=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("user_id", sa.String, index=True),
        sa.Column("agent_id", sa.String),
        sa.Column("run_id", sa.String),
        sa.Column("question", sa.Text, nullable=False),
        sa.Column("memory_id", sa.String, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("log_p", sa.Float, nullable=False),
        sa.Column("log_p_without", sa.Float, nullable=False),
        sa.Column("base_model", sa.String, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_traces_memory", "traces", ["memory_id", "version"])
