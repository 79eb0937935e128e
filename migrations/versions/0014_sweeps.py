"""Sweeps, jobs that are held until something else has happened, and notes of jobs"""

import sqlalchemy as sa
from alembic import op

INSTANT = sa.String(23).with_variant(sa.DateTime(timezone=True), "postgresql")
PRIORITY = sa.text("priority DESC")

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("sweep_id", sa.String(length=40), nullable=True))
    op.add_column("jobs", sa.Column("holds", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("notes", sa.String(), nullable=True))
    op.create_index("ix_jobs_sweep_id", "jobs", ["sweep_id", "state"])
    _index_claims("holds")
    _create_sweeps()
    op.create_table(
        "job_parents",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("parent_id", sa.String(length=40), nullable=False),
        sa.Column("on_end", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_parents_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "parent_id", name=op.f("pk_job_parents")),
    )
    op.create_index("ix_job_parents_parent_id", "job_parents", ["parent_id"])


def downgrade() -> None:
    op.drop_table("job_parents")
    for table in ("sweep_rungs", "sweep_trials", "sweeps"):
        op.drop_table(table)
    _index_claims()
    op.drop_index("ix_jobs_sweep_id", "jobs")
    op.drop_column("jobs", "notes")
    op.drop_column("jobs", "holds")
    op.drop_column("jobs", "sweep_id")


def _index_claims(*further: str) -> None:
    """Make the two indexes of claims again."""
    for name, needs in (("ix_jobs_waiting", []), ("ix_jobs_needs", ["needs"])):
        op.drop_index(name, "jobs")
        op.create_index(name, "jobs", ["queue", "state", *further, *needs, PRIORITY, "created_at", "id"])


def _create_sweeps() -> None:
    op.create_table(
        "sweeps",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=True),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("metric", sa.String(length=200), nullable=False),
        sa.Column("goal", sa.String(length=20), nullable=False),
        sa.Column("num_jobs", sa.Integer(), nullable=False),
        sa.Column("max_running", sa.Integer(), nullable=True),
        sa.Column("created_at", INSTANT, nullable=False),
        *(sa.Column(name, INSTANT, nullable=True) for name in ("paused_at", "cancel_requested_at", "finished_at")),
        sa.CheckConstraint("max_running > 0 AND num_jobs > 0", name=op.f("ck_sweeps_counts")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sweeps")),
    )
    op.create_index("ix_sweeps_finished_at", "sweeps", ["finished_at"])
    op.create_table(
        "sweep_trials",
        sa.Column("sweep_id", sa.String(length=40), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("repeat", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("setting", sa.JSON(), nullable=False),
        sa.Column("is_paused", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["sweep_id"], ["sweeps.id"], name=op.f("fk_sweep_trials_sweep_id_sweeps"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("sweep_id", "number", "repeat", name=op.f("pk_sweep_trials")),
    )
    op.create_index("ix_sweep_trials_job_id", "sweep_trials", ["job_id"], unique=True)
    op.create_table(
        "sweep_rungs",
        sa.Column("sweep_id", sa.String(length=40), nullable=False),
        sa.Column("rung", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("value", sa.Double(), nullable=True),
        sa.Column("is_promoted", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["sweep_id"], ["sweeps.id"], name=op.f("fk_sweep_rungs_sweep_id_sweeps"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("sweep_id", "rung", "number", name=op.f("pk_sweep_rungs")),
    )
