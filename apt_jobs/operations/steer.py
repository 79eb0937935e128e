"""Steer a job: cancel, pause, resume, retry. Every door goes through here: REST, schedules, policies of a job.

The transactions are in `db/steering.py`. Each function returns the job and the events to publish after the commit; a
job that is queued again is the caller's to wake a worker for.
"""

from sqlalchemy.orm import Session

from apt_jobs.db.jobs import get_job
from apt_jobs.db.models import Job
from apt_jobs.db.steering import request_cancel, request_pause, request_resume, request_retry
from apt_jobs.errors import Conflict
from apt_jobs.events.kinds import StoredEvent
from apt_jobs.jobs.monitor_options import PolicyAction
from apt_jobs.operations.submit import require_retriable
from apt_jobs.settings import Settings

Steered = tuple[Job, list[StoredEvent]]


def cancel_job(session: Session, job_id: str, reason: str = "cancelled by a user") -> Steered:
    """Cancel a job: at once if no attempt owns it, else with the attempt's next heartbeat. Idempotent.

    Raises:
        NotFound: there is no such job.
        Conflict: it has already ended otherwise.
    """
    return request_cancel(session, job_id, reason)


def pause_job(session: Session, job_id: str, reason: str = "paused by a user") -> Steered:
    """Pause a job: at once if it waits; a training saves its step first. Idempotent.

    Raises:
        NotFound: there is no such job.
        Conflict: it has ended, is being cancelled, or is of a kind that cannot stop in the middle.
    """
    return request_pause(session, job_id, reason)


def resume_job(session: Session, job_id: str) -> Steered:
    """Let a paused job wait for a worker again. Idempotent.

    Raises:
        NotFound: there is no such job.
        Conflict: it is not paused.
    """
    return request_resume(session, job_id)


def retry_job(session: Session, settings: Settings, job_id: str) -> Steered:
    """Queue a failed, cancelled or dead job again, from its last checkpoint. Idempotent.

    Raises:
        NotFound: there is no such job.
        Conflict: it succeeded, or has not ended.
        InvalidReferences: it names what does not exist any more.
        OutOfSpace: the disk has no room for it.
    """
    job, events = request_retry(session, job_id)
    if events:
        require_retriable(session, settings, job_id)
    return job, events


def is_asked_to_stop(session: Session, job_id: str) -> bool:
    """Return whether somebody asked to cancel a job.

    Raises:
        NotFound: there is no such job.
    """
    return get_job(session, job_id).cancel_requested_at is not None


def apply_policy(session: Session, job_id: str, action: PolicyAction, reason: str) -> list[StoredEvent]:
    """Cancel or pause a job because a policy of its own asks for it; other actions concern its ranks.

    A job that has ended or is being cancelled keeps its state: a user was quicker.
    """
    try:
        if action == "cancel":
            return cancel_job(session, job_id, reason)[1]
        if action == "pause":
            return pause_job(session, job_id, reason)[1]
    except Conflict:
        return []
    return []
