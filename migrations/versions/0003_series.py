"""Keep the series of a training as columns, with levels for reading them from afar

Upgrading makes empty tables; `db/series_move.py` fills them from the log afterwards, job by job. Downgrading puts every
event back into the log.
"""

from datetime import datetime

import sqlalchemy as sa
from alembic import op

from apt_jobs.events.columns import decode_columns

INSTANT = sa.String(23).with_variant(sa.DateTime(timezone=True), "postgresql")

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "event_chunks",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("last_seq", sa.BigInteger(), nullable=False),
        sa.Column("first_seq", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_event_chunks_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "kind", "last_seq", name=op.f("pk_event_chunks")),
    )
    op.create_table(
        "series_segments",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("segment", sa.Integer(), nullable=False),
        sa.Column("num_columns", sa.Integer(), nullable=False),
        sa.Column("num_steps", sa.BigInteger(), nullable=False),
        sa.Column("first_step", sa.BigInteger(), nullable=False),
        sa.Column("last_step", sa.BigInteger(), nullable=False),
        sa.Column("first_seq", sa.BigInteger(), nullable=False),
        sa.Column("last_seq", sa.BigInteger(), nullable=False),
        sa.Column("open_seq", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_series_segments_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "kind", "attempt", "segment", name=op.f("pk_series_segments")),
    )
    op.create_table(
        "series_levels",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("segment", sa.Integer(), nullable=False),
        sa.Column("level", sa.Integer(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("first_step", sa.BigInteger(), nullable=False),
        sa.Column("last_step", sa.BigInteger(), nullable=False),
        sa.Column("first_seq", sa.BigInteger(), nullable=False),
        sa.Column("last_seq", sa.BigInteger(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_series_levels_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint(
            "job_id", "kind", "attempt", "segment", "level", "number", name=op.f("pk_series_levels")
        ),
    )


def downgrade() -> None:
    _put_events_back(op.get_bind())
    op.drop_table("series_levels")
    op.drop_table("series_segments")
    op.drop_table("event_chunks")


def _put_events_back(connection: sa.Connection) -> None:
    chunks = sa.table("event_chunks", *map(sa.column, ("job_id", "kind", "last_seq", "attempt", "body")))
    names = ("job_id", "seq", "attempt", "kind", "step", "payload")
    events = sa.table("events", *map(sa.column, names), sa.column("at", INSTANT))
    places = sa.select(chunks.c.job_id, chunks.c.kind, chunks.c.last_seq)
    one = sa.select(chunks.c.kind, chunks.c.attempt, chunks.c.body)
    for job_id, kind, last_seq in connection.execute(places).all():
        found = connection.execute(
            one.where(chunks.c.job_id == job_id, chunks.c.kind == kind, chunks.c.last_seq == last_seq)
        ).one()
        logged = decode_columns(kind, found.body).logged(found.attempt)
        connection.execute(
            sa.insert(events),
            [
                {
                    "job_id": job_id,
                    "seq": event.seq,
                    "attempt": event.attempt,
                    "kind": event.kind,
                    "step": event.step,
                    "at": _instant(event.at, connection),
                    "payload": event.payload,
                }
                for event in logged
            ],
        )


def _instant(at: datetime, connection: sa.Connection) -> datetime | str:
    return at.replace(tzinfo=None).isoformat(" ", "milliseconds") if connection.dialect.name == "sqlite" else at
