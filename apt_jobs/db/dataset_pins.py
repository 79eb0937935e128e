"""Which content of a data set a job trains on, and which jobs still need a data set."""

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from apt_jobs.db.models import Job
from apt_jobs.jobs.states import TERMINAL_STATES, JobState

_UNFINISHED = tuple(state.value for state in JobState if state not in TERMINAL_STATES)


def pin_dataset(session: Session, job_id: str, sha256: str) -> str:
    """Note the content that the first attempt of a job found; returns what is noted, of this attempt or an earlier."""
    session.execute(
        update(Job).where(Job.id == job_id, Job.dataset_sha256.is_(None)).values(dataset_sha256=sha256),
        execution_options={"synchronize_session": False},
    )
    pinned = session.scalar(select(Job.dataset_sha256).where(Job.id == job_id))
    return pinned or sha256


def unfinished_job_with(session: Session, dataset: str) -> str | None:
    """Return the oldest job that waits, runs or is paused and trains on this data set."""
    names = [Job.spec[field].as_string() for field in ("dataset", "validation_dataset")]
    return session.scalar(
        select(Job.id)
        .where(Job.state.in_(_UNFINISHED), Job.kind == "train", or_(*(name == dataset for name in names)))
        .order_by(Job.created_at, Job.id)
        .limit(1)
    )
