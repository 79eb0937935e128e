"""Compare-and-set on one row of `jobs`: proof of ownership, changes of state and their events.

Everything that changes a job's state ends here, so that the row, its attempt and its `state` event are one transaction
and the table of `jobs/states.py` is asked each time. `db/jobs.py` has the verbs that callers use.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

from apt_jobs.db import holds
from apt_jobs.db.clock import now_plus
from apt_jobs.db.documents import storable_text
from apt_jobs.db.gangs import release_gang
from apt_jobs.db.models import Attempt, EventRow, HandBack, Job, WorkerRow
from apt_jobs.db.parents import outcomes_of_children
from apt_jobs.db.webhook_outbox import enqueue_ended
from apt_jobs.errors import Fenced, NotFound, TransitionRefused
from apt_jobs.events.codec import encode_payload
from apt_jobs.events.kinds import StateChanged, StoredEvent
from apt_jobs.jobs.messages import without_server_paths
from apt_jobs.jobs.retry import Fault, FaultCounts, RetryRules, retry_wait_s, why_give_up
from apt_jobs.jobs.states import OWNED_STATES, TERMINAL_STATES, JobState, require_transition, sources_of


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
    """Return the row, locked until the transaction ends.

    Raises:
        NotFound: there is no such job.
    """
    query = select(Job).where(Job.id == job_id).with_for_update()
    job = session.scalars(query.execution_options(populate_existing=True)).one_or_none()
    if job is None:
        raise NotFound(f"no job {job_id!r}")
    return job


def change_state(
    session: Session, job: Job, target: JobState, reason: str | None, *, is_hand_back: bool = False, **values: Any
) -> tuple[Job, list[StoredEvent]]:
    """Move a locked row to a state that no attempt owns, and record it. Ends the attempt if there is one.

    Raises:
        TransitionRefused: the table does not allow it; nothing was changed.
    """
    changed, event = _change(session, job, target, reason, is_hand_back=is_hand_back, **values)
    if target in TERMINAL_STATES:
        end_parent(session, changed.id)
    return changed, [event]


def end_parent(session: Session, job_id: str) -> None:
    """Let the jobs that come after an ended one be claimed, or end them, and those after them.

    Those who watch them learn of it as of any event that was not published: heads are checked.
    """
    ended = [job_id]
    while ended:
        for outcome in outcomes_of_children(session, ended.pop()):
            child = outcome.job
            if outcome.why_not is not None:
                _change(session, child, JobState.CANCELLED, outcome.why_not, holds=0)
                ended.append(child.id)
                continue
            values = {**outcome.values, **back_in_queue(0), "holds": Job.holds - holds.PARENTS}
            session.execute(
                update(Job).where(Job.id == child.id).values(**values).execution_options(synchronize_session=False)
            )


def _change(
    session: Session, job: Job, target: JobState, reason: str | None, *, is_hand_back: bool = False, **values: Any
) -> tuple[Job, StoredEvent]:
    previous, owner = JobState(job.state), job.lease_owner
    require_transition(previous, target)
    reason = None if reason is None else storable_text(without_server_paths(reason))
    if (error := values.get("error")) is not None and isinstance(error.get("message"), str):
        values["error"] = {**error, "message": without_server_paths(error["message"])}
    values["preempted_by"] = None  # whoever wanted its room has it now
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
        release_gang(session, job.id)
        session.execute(
            update(Attempt)
            .where(Attempt.job_id == job.id, Attempt.attempt == job.attempt)
            .values(ended_at=now_plus(0), outcome=target, reason=reason)
            .execution_options(synchronize_session=False)
        )
        if not is_hand_back:
            _forget_hand_backs(session, owner, job.id)
    if target in TERMINAL_STATES:
        enqueue_ended(session, [changed])
    return changed, record_state(session, changed, previous, reason)


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


def fail_attempt(
    session: Session,
    job: Job,
    why: str,
    error: dict[str, Any] | None = None,
    *,
    fault: Fault,
    rules: RetryRules,
) -> list[StoredEvent]:
    """End the attempt of a locked row through a fault.

    The job is cancelled if that was asked for, dead when `rules` give it up, paused if that was asked for, else queued
    after a back-off.
    """
    if job.cancel_requested_at is not None:
        return change_state(session, job, JobState.CANCELLED, job.reason)[1]
    counts = FaultCounts(job.num_job_faults, job.num_job_faults_without_checkpoint, job.num_infrastructure_faults).plus(
        fault
    )
    values: dict[str, Any] = {
        "num_job_faults": counts.num_job_faults,
        "num_job_faults_without_checkpoint": counts.num_job_faults_without_checkpoint,
        "num_infrastructure_faults": counts.num_infrastructure_faults,
        "error": {"message": why, "traceback": None, "rank": None, **(error or {})},
    }
    if (verdict := why_give_up(counts, fault, job.max_attempts, rules)) is not None:
        reason = f"{why}; given up after attempt {job.attempt}, {verdict}"
        return change_state(session, job, JobState.DEAD, reason, **values)[1]
    if job.state == JobState.PAUSING:
        reason = f"{why}; paused, and resumed from its last checkpoint"
        return change_state(session, job, JobState.PAUSED, reason, **values)[1]
    wait_s = retry_wait_s(counts, fault, rules)
    reason = f"{why}; trying again in {wait_s:.0f} s"
    return change_state(session, job, JobState.QUEUED, reason, **values, **back_in_queue(wait_s))[1]


def back_in_queue(wait_s: float) -> dict[str, Any]:
    """Return the columns of a job that waits again, not to be claimed before `wait_s` seconds from now."""
    return {"not_before_at": now_plus(wait_s)}


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


def _forget_hand_backs(session: Session, worker: str | None, job_id: str) -> None:
    """Forget what held up job and worker: an attempt got further than to find out what its worker lacks."""
    session.execute(delete(HandBack).where(HandBack.job_id == job_id).execution_options(synchronize_session=False))
    session.execute(
        update(WorkerRow)
        .where(WorkerRow.name == worker, WorkerRow.num_hand_backs > 0)
        .values(num_hand_backs=0, paused_until_at=None, paused_reason=None)
        .execution_options(synchronize_session=False)
    )
