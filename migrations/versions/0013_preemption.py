"""Note which jobs yield to others, and which nodes of a pool take part in which attempt"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("is_preemptible", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("jobs", sa.Column("preempted_by", sa.String(length=40), nullable=True))
    op.add_column("jobs", sa.Column("num_preemptions", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("workers", sa.Column("pool", sa.String(length=100), nullable=True))
    op.create_table(
        "gang_shares",
        sa.Column("worker", sa.String(length=200), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("node_rank", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_gang_shares_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("worker", name=op.f("pk_gang_shares")),
    )
    op.create_index("ix_gang_shares_job_id", "gang_shares", ["job_id"])


def downgrade() -> None:
    op.drop_table("gang_shares")
    op.drop_column("workers", "pool")
    op.drop_column("jobs", "num_preemptions")
    op.drop_column("jobs", "preempted_by")
    op.drop_column("jobs", "is_preemptible")
