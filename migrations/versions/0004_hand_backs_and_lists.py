"""Count faults of the infrastructure apart, note what workers lack, and index every filter of the list of jobs"""

import sqlalchemy as sa
from alembic import op

INSTANT = sa.String(23).with_variant(sa.DateTime(timezone=True), "postgresql")

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


RENAMED = {
    "num_broken_attempts": "num_job_faults",
    "num_fruitless_attempts": "num_job_faults_without_checkpoint",
}


def upgrade() -> None:
    for old, new in RENAMED.items():
        op.execute(f"ALTER TABLE jobs RENAME COLUMN {old} TO {new}")
    op.add_column("jobs", sa.Column("num_infrastructure_faults", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("workers", sa.Column("entry_points", sa.JSON(), nullable=True))
    op.add_column("workers", sa.Column("num_hand_backs", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("workers", sa.Column("paused_until_at", INSTANT, nullable=True))
    op.add_column("workers", sa.Column("paused_reason", sa.String(), nullable=True))
    op.create_table(
        "hand_backs",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("worker", sa.String(length=200), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("num_times", sa.Integer(), nullable=False),
        sa.Column("until_at", INSTANT, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_hand_backs_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "worker", name=op.f("pk_hand_backs")),
    )
    op.drop_index("ix_jobs_state", "jobs")
    op.create_index("ix_jobs_by_kind", "jobs", ["state", "kind", "id"])
    op.create_index("ix_jobs_by_queue", "jobs", ["state", "queue", "kind", "id"])
    if op.get_bind().dialect.name == "sqlite":
        op.create_index("ix_jobs_search", "jobs", ["id", "name", "labels", "state", "kind", "queue"])
    else:
        ops = {"labels": "jsonb_path_ops"}
        op.create_index("ix_jobs_labels", "jobs", ["labels"], postgresql_using="gin", postgresql_ops=ops)


def downgrade() -> None:
    op.drop_index("ix_jobs_search" if op.get_bind().dialect.name == "sqlite" else "ix_jobs_labels", "jobs")
    op.drop_index("ix_jobs_by_queue", "jobs")
    op.drop_index("ix_jobs_by_kind", "jobs")
    op.create_index("ix_jobs_state", "jobs", ["state"])
    op.drop_table("hand_backs")
    op.drop_column("workers", "paused_reason")
    op.drop_column("workers", "paused_until_at")
    op.drop_column("workers", "num_hand_backs")
    op.drop_column("workers", "entry_points")
    op.drop_column("jobs", "num_infrastructure_faults")
    for old, new in RENAMED.items():
        op.execute(f"ALTER TABLE jobs RENAME COLUMN {new} TO {old}")
