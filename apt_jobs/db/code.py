"""Which packed code jobs and schedules still name."""

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from apt_jobs.db.models import Job, Schedule


def is_code_named(session: Session, sha256: str) -> bool:
    """Return whether a job or a schedule names the code: a retry or a copy would run it."""
    if session.scalar(select(exists().where(Job.code_sha256 == sha256))):
        return True
    specs = session.scalars(select(Schedule.spec))  # there are few
    return any((spec.get("code") or {}).get("sha256") == sha256 for spec in specs)
