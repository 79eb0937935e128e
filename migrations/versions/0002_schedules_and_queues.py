"""Add schedules, configured queues and the draining of workers"""

import sqlalchemy as sa
from alembic import op

INSTANT = sa.String(23).with_variant(sa.DateTime(timezone=True), "postgresql")
DOCUMENT = sa.JSON()

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "queues",
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("max_running", sa.Integer(), nullable=True),
        sa.Column("paused_at", INSTANT, nullable=True),
        sa.CheckConstraint("max_running > 0", name=op.f("ck_queues_max_running")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_queues")),
    )
    op.create_table(
        "schedules",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("cron", sa.String(length=200), nullable=False),
        sa.Column("time_zone", sa.String(length=100), nullable=False),
        sa.Column("spec", DOCUMENT, nullable=False),
        sa.Column("overlap", sa.String(length=20), nullable=False),
        sa.Column("catch_up", sa.String(length=20), nullable=False),
        sa.Column("paused_at", INSTANT, nullable=True),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("next_due_at", INSTANT, nullable=True),
        sa.CheckConstraint("overlap IN ('skip', 'queue', 'cancel')", name=op.f("ck_schedules_overlap")),
        sa.CheckConstraint("catch_up IN ('skip', 'latest', 'all')", name=op.f("ck_schedules_catch_up")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_schedules")),
    )
    op.create_index("ix_schedules_next_due_at", "schedules", ["next_due_at"])
    op.add_column("jobs", sa.Column("schedule_id", sa.String(length=40), nullable=True))
    op.create_index("ix_jobs_schedule_id", "jobs", ["schedule_id", "state"])
    op.create_table(
        "schedule_runs",
        sa.Column("schedule_id", sa.String(length=40), nullable=False),
        sa.Column("due_at", INSTANT, nullable=False),
        sa.Column("fired_at", INSTANT, nullable=False),
        sa.Column("outcome", sa.String(length=20), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=True),
        sa.Column("reason", sa.String(), nullable=True),
        sa.CheckConstraint(
            "outcome IN ('submitted', 'skipped', 'missed', 'refused')", name=op.f("ck_schedule_runs_outcome")
        ),
        sa.ForeignKeyConstraint(
            ["schedule_id"], ["schedules.id"], name=op.f("fk_schedule_runs_schedule_id_schedules"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_schedule_runs_job_id_jobs"), ondelete="SET NULL"
        ),
        sa.PrimaryKeyConstraint("schedule_id", "due_at", name=op.f("pk_schedule_runs")),
    )
    op.add_column("workers", sa.Column("drain_requested_at", INSTANT, nullable=True))


def downgrade() -> None:
    op.drop_column("workers", "drain_requested_at")
    op.drop_table("schedule_runs")
    op.drop_index("ix_jobs_schedule_id", "jobs")
    op.drop_column("jobs", "schedule_id")
    op.drop_index("ix_schedules_next_due_at", "schedules")
    op.drop_table("schedules")
    op.drop_table("queues")
