"""Rows of `/v1/batches` and of the lines that were read of their files; the loop that moves them on is the web's.

Every transition locks the batch's row first, so that any number of web processes may run the loop.
"""

from typing import Any

from sqlalchemy import Select, delete, func, select, update
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.dialect_models import ACTIVE_BATCH_STATES, Batch, BatchRequest, FileRow
from apt_jobs.db.job_counts import num_in_states
from apt_jobs.db.models import Job
from apt_jobs.errors import Conflict, NotFound
from apt_jobs.jobs.states import TERMINAL_STATES, JobState


def get_batch(session: Session, batch_id: str, owner: str | None) -> Batch:
    """Return one row.

    Raises:
        NotFound: there is no such batch of this owner.
    """
    return _one(session, _owned(select(Batch).where(Batch.id == batch_id), owner), batch_id)


def list_batches(session: Session, owner: str | None, *, after: str | None, limit: int) -> tuple[list[Batch], bool]:
    """Return a page of batches, the newest first, and whether there are more."""
    query = _owned(select(Batch), owner)
    if after is not None:
        query = query.where(Batch.id < after)
    rows = list(session.scalars(query.order_by(Batch.id.desc()).limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def num_active(session: Session, owner: str) -> int:
    """Return how many batches of an owner have not ended."""
    query = select(func.count()).select_from(Batch).where(Batch.owner == owner, Batch.state.in_(ACTIVE_BATCH_STATES))
    return session.scalar(query) or 0


def active_batches(session: Session, limit: int) -> list[str]:
    """Return the ids of batches that have not ended, the oldest first."""
    query = select(Batch.id).where(Batch.state.in_(ACTIVE_BATCH_STATES)).order_by(Batch.id).limit(limit)
    return list(session.scalars(query))


def locked_batch(session: Session, batch_id: str, owner: str | None = None) -> Batch:
    """Return the row, locked until the transaction ends.

    Raises:
        NotFound: there is no such batch of this owner.
    """
    query = _owned(select(Batch).where(Batch.id == batch_id), owner).with_for_update()
    return _one(session, query.execution_options(populate_existing=True), batch_id)


def request_batch_cancel(session: Session, batch_id: str, owner: str | None) -> Batch:
    """Ask a batch to stop. Repeating it changes nothing.

    Raises:
        NotFound: there is no such batch of this owner.
        Conflict: it has ended, or writes its files already.
    """
    batch = locked_batch(session, batch_id, owner)
    if batch.state in ("validating", "in_progress"):
        batch.state, batch.cancelling_at = "cancelling", now_plus(0)
        session.flush()
    elif batch.state not in ("cancelling", "cancelled"):
        raise Conflict(f"{batch.id} is {batch.state}; only one that is in progress can be cancelled")
    session.refresh(batch)
    return batch


def note_if_expired(session: Session, batch: Batch) -> None:
    """Note that a locked batch that is in progress has reached the end of its window."""
    session.execute(
        update(Batch)
        .where(
            Batch.id == batch.id,
            Batch.state == "in_progress",
            Batch.expired_at.is_(None),
            Batch.expires_at <= now_plus(0),
        )
        .values(expired_at=now_plus(0))
        .execution_options(synchronize_session=False)
    )
    session.refresh(batch)


def set_state(session: Session, batch: Batch, state: str, **values: Any) -> None:
    """Move a locked batch to a state, and note when."""
    values[f"{state}_at"] = now_plus(0)
    for name, value in {"state": state, **values}.items():
        setattr(batch, name, value)
    session.flush()


def num_open(session: Session, batch_id: str) -> int:
    """Return how many requests of a batch have no answer yet."""
    query = select(func.count()).select_from(BatchRequest)
    return session.scalar(query.where(BatchRequest.batch_id == batch_id, BatchRequest.is_failed.is_(None))) or 0


def num_waiting_jobs(session: Session) -> int:
    """Return how many jobs wait, of all queues."""
    return num_in_states(session, [JobState.QUEUED])


def ended_requests(session: Session, batch_id: str, limit: int) -> list[tuple[BatchRequest, Job | None]]:
    """Return requests whose job has ended, or was deleted, with it."""
    query = (
        select(BatchRequest, Job)
        .outerjoin(Job, Job.id == BatchRequest.job_id)
        .where(
            BatchRequest.batch_id == batch_id,
            BatchRequest.is_failed.is_(None),
            Job.id.is_(None) | Job.state.in_(TERMINAL_STATES),
        )
        .order_by(BatchRequest.line)
        .limit(limit)
    )
    return [(request, job) for request, job in session.execute(query)]


def open_job_ids(session: Session, batch_id: str, limit: int) -> list[str]:
    """Return jobs of open requests that nobody asked to cancel yet."""
    query = (
        select(Job.id)
        .join(BatchRequest, Job.id == BatchRequest.job_id)
        .where(
            BatchRequest.batch_id == batch_id,
            BatchRequest.is_failed.is_(None),
            Job.state.not_in(TERMINAL_STATES),
            Job.cancel_requested_at.is_(None),
        )
        .limit(limit)
    )
    return list(session.scalars(query))


def answered_requests(session: Session, batch_id: str, after_line: int, limit: int) -> list[BatchRequest]:
    """Return requests after a line, in order."""
    query = select(BatchRequest).where(BatchRequest.batch_id == batch_id, BatchRequest.line > after_line)
    return list(session.scalars(query.order_by(BatchRequest.line).limit(limit)))


def end_batch(
    session: Session, batch: Batch, *, output: FileRow | None, errors: FileRow | None, num_not_made: int
) -> None:
    """Store the files of a locked batch that is finalizing, and its end. Its requests are in the files now.

    Args:
        session: of the transaction.
        batch: the locked row.
        output: the file of the answers; None: there is none.
        errors: the file of what failed; None: nothing did.
        num_not_made: lines of which no request was made; they are in `errors`.
    """
    session.add_all([row for row in (output, errors) if row is not None])
    batch.output_file_id = None if output is None else output.id
    batch.error_file_id = None if errors is None else errors.id
    batch.num_failed += num_not_made
    if batch.cancelling_at is not None:
        set_state(session, batch, "cancelled")
    elif batch.expired_at is not None:
        batch.state = "expired"
    else:
        set_state(session, batch, "completed")
    session.execute(
        delete(BatchRequest).where(BatchRequest.batch_id == batch.id).execution_options(synchronize_session=False)
    )
    session.flush()


def _owned(query: Select[Batch], owner: str | None) -> Select[Batch]:
    return query if owner is None else query.where(Batch.owner == owner)


def _one(session: Session, query: Select[Batch], batch_id: str) -> Batch:
    row = session.scalar(query)
    if row is None:
        raise NotFound(f"there is no batch {batch_id[:100]!r}; GET /v1/batches lists those that you have")
    return row
