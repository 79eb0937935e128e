"""Counts of jobs by queue and state, which triggers keep (apt_jobs/db/job_counts.py makes them)"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TRIGGERS = ("job_counts_of_insert", "job_counts_of_update", "job_counts_of_delete")


def upgrade() -> None:
    op.create_table(
        "job_counts",
        sa.Column("id", NUMBER, sa.Identity(), nullable=False),
        sa.Column("queue", sa.String(length=100), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("num", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_counts")),
    )
    op.create_index("ix_jobs_finished_at", "jobs", ["finished_at", "id"])


def downgrade() -> None:
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    for name in TRIGGERS:
        op.execute(f"DROP TRIGGER IF EXISTS {name}" + ("" if is_sqlite else " ON jobs"))
    if not is_sqlite:
        op.execute("DROP FUNCTION IF EXISTS count_jobs()")
    op.drop_index("ix_jobs_finished_at", "jobs")
    op.drop_table("job_counts")
