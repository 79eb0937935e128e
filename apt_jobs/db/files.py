"""Rows of `/v1/files`. Whoever is named as owner sees their own rows only; no owner is named for those who see all."""

from collections.abc import Collection

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.dataset_pins import unfinished_job_with
from apt_jobs.db.dialect_models import ACTIVE_BATCH_STATES, Batch, FileRow
from apt_jobs.errors import Conflict, NotFound


def get_file(session: Session, file_id: str, owner: str | None) -> FileRow:
    """Return one row.

    Raises:
        NotFound: there is no such file of this owner, or it has expired.
    """
    query = select(FileRow).where(
        FileRow.id == file_id, FileRow.expires_at.is_(None) | (FileRow.expires_at > now_plus(0))
    )
    row = session.scalar(query if owner is None else query.where(FileRow.owner == owner))
    if row is None:
        raise NotFound(f"there is no file {file_id[:100]!r}; GET /v1/files lists those that you have")
    return row


def list_files(
    session: Session, owner: str | None, *, purpose: str | None, after: str | None, limit: int, is_descending: bool
) -> tuple[list[FileRow], bool]:
    """Return a page of files by time, and whether there are more."""
    query = select(FileRow).where(FileRow.expires_at.is_(None) | (FileRow.expires_at > now_plus(0)))
    if owner is not None:
        query = query.where(FileRow.owner == owner)
    if purpose is not None:
        query = query.where(FileRow.purpose == purpose)
    if after is not None:
        query = query.where(FileRow.id < after if is_descending else FileRow.id > after)
    order = FileRow.id.desc() if is_descending else FileRow.id
    rows = list(session.scalars(query.order_by(order).limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def delete_file_row(session: Session, file_id: str, owner: str | None) -> FileRow:
    """Remove the row; `artifacts/files.py` removes the content after the commit.

    Raises:
        NotFound: there is no such file of this owner.
        Conflict: a batch or a training that has not ended reads it.
    """
    row = get_file(session, file_id, owner)
    needed = select(Batch.id).where(Batch.input_file_id == row.id, Batch.state.in_(ACTIVE_BATCH_STATES)).limit(1)
    if (batch_id := session.scalar(needed)) is not None:
        raise Conflict(f"file {row.id} is read by {batch_id}, which has not ended; cancel it first, or wait")
    if (job_id := unfinished_job_with(session, row.id)) is not None:
        raise Conflict(f"file {row.id} is needed by job {job_id}, which has not ended; cancel it first, or wait")
    session.delete(row)
    session.flush()
    return row


def delete_expired_files(session: Session) -> list[str]:
    """Remove expired rows, but those that a batch reads; their ids."""
    needed = select(Batch.input_file_id).where(Batch.state.in_(ACTIVE_BATCH_STATES))
    return list(
        session.scalars(
            delete(FileRow)
            .where(FileRow.expires_at <= now_plus(0), FileRow.id.not_in(needed))
            .returning(FileRow.id)
            .execution_options(synchronize_session=False)
        )
    )


def without_row(session: Session, names: Collection[str]) -> set[str]:
    """Return those of the names that are no id of a row."""
    return set(names) - set(session.scalars(select(FileRow.id).where(FileRow.id.in_(names))))
