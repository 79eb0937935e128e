"""Note what each job needs of a worker, what each worker has room for, and for whom room is kept"""

import json

import sqlalchemy as sa
from alembic import op

INSTANT = sa.String(23).with_variant(sa.DateTime(timezone=True), "postgresql")

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("needs", sa.String(length=300), nullable=False, server_default=""))
    op.add_column("jobs", sa.Column("reserved_by", sa.String(length=200), nullable=True))
    op.add_column("jobs", sa.Column("reserved_until", INSTANT, nullable=True))
    op.add_column("workers", sa.Column("room", sa.JSON(), nullable=True))
    _note_needs()
    op.create_index("ix_jobs_needs", "jobs", ["queue", "state", "needs", sa.text("priority DESC"), "created_at", "id"])


def downgrade() -> None:
    op.drop_index("ix_jobs_needs", "jobs")
    op.drop_column("workers", "room")
    op.drop_column("jobs", "reserved_until")
    op.drop_column("jobs", "reserved_by")
    op.drop_column("jobs", "needs")


def _note_needs() -> None:
    """Write what the jobs that are there need, as jobs/needs.py does for new ones."""
    connection = op.get_bind()
    jobs = sa.table("jobs", sa.column("id"), sa.column("kind"), sa.column("spec", sa.JSON()), sa.column("needs"))
    for job_id, spec in connection.execute(sa.select(jobs.c.id, jobs.c.spec).where(jobs.c.kind == "train")).all():
        num_nodes = spec.get("num_nodes", 1)
        needs = {"num_ranks": spec.get("num_ranks", 1) // num_nodes, "num_nodes": num_nodes}
        needs = {name: value for name, value in needs.items() if value != 1}
        if spec.get("device", "auto") != "auto":
            needs["device"] = spec["device"]
        text = json.dumps(needs, separators=(",", ":"))
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(needs=text))
