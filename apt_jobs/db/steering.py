"""What users ask of a job: cancel, pause, resume, retry, delete. What no attempt owns changes at once.

An attempt that owns the job learns of it with its next heartbeat, or sooner.
"""

from typing import Any

from sqlalchemy import delete, update
from sqlalchemy.orm import Session

from apt_jobs.db.checkpoints import needed_by
from apt_jobs.db.clock import now_plus
from apt_jobs.db.jobs import get_job
from apt_jobs.db.models import Job
from apt_jobs.db.parents import columns_of_retry
from apt_jobs.db.transitions import back_in_queue, begin_pausing, change_state, locked_job
from apt_jobs.errors import Conflict
from apt_jobs.events.kinds import StoredEvent
from apt_jobs.jobs.states import OWNED_STATES, TERMINAL_STATES, JobState, sources_of


def request_cancel(session: Session, job_id: str, reason: str = "cancelled by a user") -> tuple[Job, list[StoredEvent]]:
    """Cancel at once what no attempt owns; flag what one does. Idempotent.

    Raises:
        NotFound: there is no such job.
        Conflict: it has already ended otherwise.
    """
    job = locked_job(session, job_id)
    if job.state == JobState.CANCELLED:
        return job, []
    if job.state in TERMINAL_STATES:
        raise Conflict(f"job {job_id} is {job.state} already and cannot be cancelled")
    if job.state in OWNED_STATES:
        if job.cancel_requested_at is None:
            flag = update(Job).where(Job.id == job_id).values(cancel_requested_at=now_plus(0), reason=reason)
            session.execute(flag.execution_options(synchronize_session=False))
        return get_job(session, job_id), []
    return change_state(session, job, JobState.CANCELLED, reason, cancel_requested_at=now_plus(0))


def request_pause(session: Session, job_id: str, reason: str = "paused by a user") -> tuple[Job, list[StoredEvent]]:
    """Pause at once what no attempt owns; tell the attempt of a training to save and stop. Idempotent.

    Raises:
        NotFound: there is no such job.
        Conflict: it has ended, is being cancelled, or is of a kind that cannot stop in the middle.
    """
    job = locked_job(session, job_id)
    if job.state in (JobState.PAUSED, JobState.PAUSING):
        return job, []
    if job.state in TERMINAL_STATES:
        raise Conflict(f"job {job_id} is {job.state} already and cannot be paused")
    if job.state == JobState.QUEUED:
        return change_state(session, job, JobState.PAUSED, reason)
    if job.cancel_requested_at is not None:
        raise Conflict(f"job {job_id} is being cancelled and cannot be paused")
    if job.kind != "train":
        raise Conflict(f"job {job_id} generates, which cannot stop in the middle; wait for it, or cancel it")
    return begin_pausing(session, job, reason)


def request_resume(session: Session, job_id: str) -> tuple[Job, list[StoredEvent]]:
    """Let a paused job wait for a worker again. Idempotent while it waits.

    Raises:
        NotFound: there is no such job.
        Conflict: it is not paused.
    """
    job = locked_job(session, job_id)
    if job.state == JobState.QUEUED:
        return job, []
    if job.state != JobState.PAUSED:
        how = {JobState.PAUSING: "it is still saving: wait until it is paused", JobState.RUNNING: "it runs already"}
        raise Conflict(f"job {job_id} is {job.state}: {how.get(JobState(job.state), 'only a paused job is resumed')}")
    return change_state(session, job, JobState.QUEUED, "resumed by a user", **back_in_queue(0))


def request_retry(session: Session, job_id: str) -> tuple[Job, list[StoredEvent]]:
    """Queue a failed, cancelled or dead job again, from its last checkpoint, with all its attempts. Idempotent.

    Raises:
        NotFound: there is no such job.
        Conflict: it succeeded, or has not ended.
    """
    job = locked_job(session, job_id)
    if job.state == JobState.QUEUED:
        return job, []
    if job.state not in sources_of(JobState.QUEUED) & TERMINAL_STATES:
        raise Conflict(f"job {job_id} is {job.state}; only a failed, cancelled or dead job is retried")
    fresh: dict[str, Any] = {
        "num_job_faults": 0,
        "num_job_faults_without_checkpoint": 0,
        "num_infrastructure_faults": 0,
    }
    fresh |= {"error": None, "result": None, "cancel_requested_at": None, "finished_at": None}
    fresh |= columns_of_retry(session, job)  # its sweep holds it no more: that may have ended
    return change_state(session, job, JobState.QUEUED, "retried by a user", **fresh, **back_in_queue(0))


def delete_job(session: Session, job_id: str) -> None:
    """Remove an ended job with its events, attempts and checkpoint rows. Its files are the caller's.

    Raises:
        NotFound: there is no such job.
        Conflict: it has not ended, or another job needs a checkpoint of it.
    """
    job = locked_job(session, job_id)
    if job.state not in TERMINAL_STATES:
        raise Conflict(f"job {job_id} is {job.state}; cancel it first, then delete it")
    if (other := needed_by(session, job_id)) is not None:
        raise Conflict(f"a checkpoint of job {job_id} is needed by job {other[0]}, which is {other[1]}: it stays")
    session.execute(delete(Job).where(Job.id == job_id).execution_options(synchronize_session=False))
