"""Files, batches and fine-tunings of the /v1 dialect"""

import sqlalchemy as sa
from alembic import op

INSTANT = sa.String(23).with_variant(sa.DateTime(timezone=True), "postgresql")

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

STATES = ["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]


def upgrade() -> None:
    op.create_table(
        "files",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("filename", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(length=40), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("expires_at", INSTANT, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_files")),
    )
    op.create_index("ix_files_owner", "files", ["owner", "id"])
    op.create_index("ix_files_expires_at", "files", ["expires_at"])
    op.create_table(
        "batches",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("endpoint", sa.String(length=40), nullable=False),
        sa.Column("input_file_id", sa.String(length=40), nullable=False),
        sa.Column("output_file_id", sa.String(length=40), nullable=True),
        sa.Column("error_file_id", sa.String(length=40), nullable=True),
        sa.Column("completion_window", sa.String(length=20), nullable=False),
        sa.Column("output_lifetime_s", sa.Integer(), nullable=True),
        sa.Column("notes", sa.JSON(), nullable=True),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("errors", sa.JSON(), nullable=True),
        *(
            sa.Column(name, sa.Integer(), nullable=False)
            for name in ("num_requests", "num_completed", "num_failed", "num_lines_read")
        ),
        *(
            sa.Column(name, sa.BigInteger(), nullable=False)
            for name in ("num_prompt_tokens", "num_completion_tokens", "num_bytes_read")
        ),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("expires_at", INSTANT, nullable=False),
        *(
            sa.Column(f"{name}_at", INSTANT, nullable=True)
            for name in ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        ),
        sa.CheckConstraint(f"state IN ({', '.join(map(repr, STATES))})", name=op.f("ck_batches_state")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
    )
    op.create_index("ix_batches_owner", "batches", ["owner", "id"])
    op.create_index("ix_batches_state", "batches", ["state", "id"])
    op.create_table(
        "batch_requests",
        sa.Column("batch_id", sa.String(length=40), nullable=False),
        sa.Column("line", sa.Integer(), nullable=False),
        sa.Column("custom_id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=True),
        sa.Column("is_failed", sa.Boolean(), nullable=True),
        sa.Column("answer", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batches.id"], name=op.f("fk_batch_requests_batch_id_batches"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("batch_id", "line", name=op.f("pk_batch_requests")),
    )
    op.create_index("ix_batch_requests_open", "batch_requests", ["batch_id", "is_failed"])
    op.create_table(
        "fine_tunings",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("model", sa.String(length=100), nullable=False),
        sa.Column("training_file_id", sa.String(length=40), nullable=False),
        sa.Column("suffix", sa.String(length=64), nullable=True),
        sa.Column("hyperparameters", sa.JSON(), nullable=False),
        sa.Column("notes", sa.JSON(), nullable=True),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_fine_tunings_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_fine_tunings")),
        sa.UniqueConstraint("job_id", name=op.f("uq_fine_tunings_job_id")),
    )
    op.create_index("ix_fine_tunings_owner", "fine_tunings", ["owner", "id"])


def downgrade() -> None:
    for table in ("fine_tunings", "batch_requests", "batches", "files"):
        op.drop_table(table)
