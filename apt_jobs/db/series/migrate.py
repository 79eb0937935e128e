"""Moves the series of old jobs from rows of the log into columns and levels, after the migration that made the tables.

One transaction a job, so it can break off anywhere and go on later, and several processes may do it at once.
"""

import logging
from itertools import groupby

from sqlalchemy import ColumnElement, and_, delete, exists, select
from sqlalchemy.orm import Session

from apt_jobs.db.engine import Database
from apt_jobs.db.models import EventChunk, EventRow, Job, SeriesSegment
from apt_jobs.db.series.store import WIDTHS, store_series
from apt_jobs.events.codec import decode_payload
from apt_jobs.events.columns import COLUMN_TYPES
from apt_jobs.events.kinds import StoredEvent

logger = logging.getLogger(__name__)

READ_EVENTS = 2_000
_KINDS = sorted(COLUMN_TYPES.keys() | WIDTHS.keys())


def move_old_series(database: Database) -> int:
    """Move what is left; returns the number of jobs."""
    num_moved = 0
    while True:
        with database.write() as session:
            job = session.scalar(select(Job).where(_is_old()).order_by(Job.id).limit(1).with_for_update())
            if job is None:
                return num_moved
            _move(session, job.id)
            num_moved += 1
        logger.info("an old history has its levels now", extra={"job_id": job.id})


def _is_old() -> ColumnElement[bool]:
    """Return the condition of a job that has series, none of them stored by this version."""
    return and_(
        exists().where(EventRow.job_id == Job.id, EventRow.kind.in_(_KINDS)),
        ~exists().where(EventChunk.job_id == Job.id),
        ~exists().where(SeriesSegment.job_id == Job.id),
    )


def _move(session: Session, job_id: str) -> None:
    after = 0
    query = select(EventRow).where(EventRow.job_id == job_id, EventRow.kind.in_(_KINDS))
    while rows := session.scalars(query.where(EventRow.seq > after).order_by(EventRow.seq).limit(READ_EVENTS)).all():
        events = [
            StoredEvent(job_id, row.seq, row.attempt, row.at, decode_payload(row.kind, row.payload)) for row in rows
        ]
        for _, of_attempt in groupby(events, key=lambda event: event.attempt):
            store_series(session, list(of_attempt))
        after = events[-1].seq
        session.expunge_all()
    moved = delete(EventRow).where(EventRow.job_id == job_id, EventRow.kind.in_(COLUMN_TYPES))
    session.execute(moved.execution_options(synchronize_session=False))
