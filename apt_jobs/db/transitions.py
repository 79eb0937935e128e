"""Compare-and-set on one row of `jobs`: proof of ownership, changes of state and their events.

Everything that changes a job's state ends here, so that the row, its attempt and its `state` event are one transaction
and the table of `jobs/states.py` is asked each time. `db/jobs.py` has the verbs that callers use.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.documents import storable_text
from apt_jobs.db.models import Attempt, EventRow, Job
from apt_jobs.errors import Fenced, NotFound, TransitionRefused
from apt_jobs.events.codec import encode_payload
from apt_jobs.events.kinds import StateChanged, StoredEvent
from apt_jobs.jobs.messages import without_server_paths
from apt_jobs.jobs.states import OWNED_STATES, TERMINAL_STATES, JobState, require_transition, sources_of

MAX_FRUITLESS_ATTEMPTS = 3  # in a row without a new checkpoint: the job is poison
RETRY_PAUSE_S = 5.0  # before the second attempt; doubles
RETRY_PAUSE_MAX_S = 300.0


def owned_job(session: Session, job_id: str, attempt: int, **values: Any) -> Job:
    """Lock the row of an attempt that owns its job and set `values`; the row as it is then.

    Raises:
        Fenced: the attempt is not the current one, or its lease is over by the database's clock.
    """
    owned = session.scalars(
        update(Job)
        .where(Job.id == job_id, Job.attempt == attempt, Job.state.in_(OWNED_STATES), Job.lease_until > now_plus(0))
        .values(**(values or {"lease_until": Job.lease_until}))
        .returning(Job)
        .execution_options(synchronize_session=False, populate_existing=True)
    ).one_or_none()
    if owned is None:
        raise Fenced(f"attempt {attempt} no longer owns job {job_id}")
    return owned


def locked_job(session: Session, job_id: str) -> Job:
    """The row, locked until the transaction ends.

    Raises:
        NotFound: there is no such job.
    """
    query = select(Job).where(Job.id == job_id).with_for_update()
    job = session.scalars(query.execution_options(populate_existing=True)).one_or_none()
    if job is None:
        raise NotFound(f"no job {job_id!r}")
    return job


def change_state(
    session: Session, job: Job, target: JobState, reason: str | None, **values: Any
) -> tuple[Job, list[StoredEvent]]:
    """Move a locked row to a state that no attempt owns, and record it. Ends the attempt if there is one.

    Raises:
        TransitionRefused: the table does not allow it; nothing was changed.
    """
    previous = JobState(job.state)
    require_transition(previous, target)
    reason = None if reason is None else storable_text(without_server_paths(reason))
    if (error := values.get("error")) is not None and isinstance(error.get("message"), str):
        values["error"] = {**error, "message": without_server_paths(error["message"])}
    if target in TERMINAL_STATES:
        values["finished_at"] = now_plus(0)
    changed = session.scalars(
        update(Job)
        .where(Job.id == job.id, Job.attempt == job.attempt, Job.state.in_(sources_of(target)))
        .values(state=target, reason=reason, lease_owner=None, lease_until=None, last_seq=Job.last_seq + 1, **values)
        .returning(Job)
        .execution_options(synchronize_session=False, populate_existing=True)
    ).one_or_none()
    if changed is None:
        raise TransitionRefused(f"job {job.id} changed meanwhile; it could not become {target}")
    if previous in OWNED_STATES:
        session.execute(
            update(Attempt)
            .where(Attempt.job_id == job.id, Attempt.attempt == job.attempt)
            .values(ended_at=now_plus(0), outcome=target, reason=reason)
            .execution_options(synchronize_session=False)
        )
    return changed, [record_state(session, changed, previous, reason)]


def begin_pausing(session: Session, job: Job, reason: str) -> tuple[Job, list[StoredEvent]]:
    """Tell the attempt of a locked, running row to save and stop. It keeps its lease until it has."""
    require_transition(JobState(job.state), JobState.PAUSING)
    changed = session.scalars(
        update(Job)
        .where(Job.id == job.id, Job.attempt == job.attempt, Job.state == JobState.RUNNING)
        .values(state=JobState.PAUSING, reason=storable_text(reason), last_seq=Job.last_seq + 1)
        .returning(Job)
        .execution_options(synchronize_session=False, populate_existing=True)
    ).one()
    return changed, [record_state(session, changed, JobState.RUNNING, reason)]


def end_broken(session: Session, job: Job, why: str, error: dict[str, Any] | None = None) -> list[StoredEvent]:
    """End the attempt of a locked row that broke through no fault of the job: cancelled if that was asked for, dead
    when its attempts are used up, paused if that was asked for, else queued after a pause that doubles.
    """
    if job.cancel_requested_at is not None:
        return change_state(session, job, JobState.CANCELLED, job.reason)[1]
    broken, fruitless = job.num_broken_attempts + 1, job.num_fruitless_attempts + 1
    values: dict[str, Any] = {
        "num_broken_attempts": broken,
        "num_fruitless_attempts": fruitless,
        "error": {"message": why, "traceback": None, "rank": None, **(error or {})},
    }
    if broken >= job.max_attempts or fruitless >= MAX_FRUITLESS_ATTEMPTS:
        reason = f"{why}; given up after attempt {job.attempt}, {fruitless} in a row without a new checkpoint"
        return change_state(session, job, JobState.DEAD, reason, **values)[1]
    if job.state == JobState.PAUSING:
        reason = f"{why}; paused, and resumed from its last checkpoint"
        return change_state(session, job, JobState.PAUSED, reason, **values)[1]
    pause_s = retry_pause_s(fruitless)
    reason = f"{why}; trying again in {pause_s:.0f} s"
    return change_state(session, job, JobState.QUEUED, reason, **values, **back_in_queue(pause_s))[1]


def back_in_queue(pause_s: float) -> dict[str, Any]:
    """Columns of a job that waits again: not to be claimed before `pause_s` seconds from now, its hint not yet sent."""
    return {"not_before_at": now_plus(pause_s), "dispatched_at": None, "num_dispatches": 0}


def retry_pause_s(num_fruitless_attempts: int) -> float:
    """Seconds to wait before the next attempt."""
    doublings = min(max(num_fruitless_attempts - 1, 0), 30)  # beyond that the pause is at its maximum anyway
    return min(RETRY_PAUSE_S * 2.0**doublings, RETRY_PAUSE_MAX_S)


def record_state(session: Session, job: Job, previous: JobState | None, reason: str | None) -> StoredEvent:
    """Store the `state` event whose `seq` the row already carries as `last_seq`."""
    event = StateChanged(job.state, previous, reason)
    at = datetime.now(UTC)
    session.execute(
        insert(EventRow).values(
            job_id=job.id, seq=job.last_seq, attempt=job.attempt, kind=event.kind, at=at, payload=encode_payload(event)
        )
    )
    return StoredEvent(job.id, job.last_seq, job.attempt, at, event)
