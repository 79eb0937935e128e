"""Rows of `/v1/fine_tuning/jobs`: which training job each is, and what was asked for."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from apt_jobs.db.dialect_models import FineTuning
from apt_jobs.db.models import Job
from apt_jobs.errors import NotFound


def get_fine_tuning(session: Session, fine_tuning_id: str, owner: str | None) -> tuple[FineTuning, Job]:
    """Return one row with its job. No owner is named for those who see all.

    Raises:
        NotFound: there is no such fine-tuning of this owner.
    """
    query = select(FineTuning, Job).join(Job, Job.id == FineTuning.job_id).where(FineTuning.id == fine_tuning_id)
    if owner is not None:
        query = query.where(FineTuning.owner == owner)
    found = session.execute(query.execution_options(populate_existing=True)).one_or_none()
    if found is None:
        raise NotFound(
            f"there is no fine-tuning job {fine_tuning_id[:100]!r}; GET /v1/fine_tuning/jobs lists those that you have"
        )
    return found[0], found[1]


def list_fine_tunings(
    session: Session, owner: str | None, *, after: str | None, limit: int
) -> tuple[list[tuple[FineTuning, Job]], bool]:
    """Return a page of rows with their jobs, the newest first, and whether there are more."""
    query = select(FineTuning, Job).join(Job, Job.id == FineTuning.job_id)
    if owner is not None:
        query = query.where(FineTuning.owner == owner)
    if after is not None:
        query = query.where(FineTuning.id < after)
    rows = [(row[0], row[1]) for row in session.execute(query.order_by(FineTuning.id.desc()).limit(limit + 1))]
    return rows[:limit], len(rows) > limit
