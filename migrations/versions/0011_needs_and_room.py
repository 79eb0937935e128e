"""Note what each job needs of a worker, what each worker has room for, and for whom room is kept"""

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

BATCH = 100  # jobs, whose specs may be large
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
    """Write what the jobs that are there need, as jobs/needs.py does for new ones. Reads `BATCH` jobs at a time."""
    connection = op.get_bind()
    jobs = sa.table("jobs", sa.column("id"), sa.column("kind"), sa.column("spec", sa.JSON()), sa.column("needs"))
    batch = sa.select(jobs.c.id, jobs.c.spec).where(jobs.c.kind == "train").order_by(jobs.c.id).limit(BATCH)
    note = sa.update(jobs).where(jobs.c.id == sa.bindparam("job_id")).values(needs=sa.bindparam("text"))
    last_id = ""
    while rows := connection.execute(batch.where(jobs.c.id > last_id)).all():
        connection.execute(note, [{"job_id": job_id, "text": _needs_of(spec)} for job_id, spec in rows])
        last_id = rows[-1].id


def _needs_of(spec: dict[str, Any]) -> str:
    num_nodes = spec.get("num_nodes", 1)
    needs = {"num_ranks": spec.get("num_ranks", 1) // num_nodes, "num_nodes": num_nodes}
    needs = {name: value for name, value in needs.items() if value != 1}
    if spec.get("device", "auto") != "auto":
        needs["device"] = spec["device"]
    return json.dumps(needs, separators=(",", ":"))
