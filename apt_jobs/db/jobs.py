"""The life cycle of a job as compare-and-set on its row: insert, claim, heartbeat, finish, reap.

Whoever owns an attempt proves it with every write: `fence` updates the row only while the attempt is current and its
lease runs, by the database's clock. A state and its `state` event change in one transaction.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, exists, func, literal, select, tuple_, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from apt_jobs.db.clock import UtcDateTime, now_plus
from apt_jobs.db.models import Attempt, HandBack, Job
from apt_jobs.db.parents import attach_parents
from apt_jobs.db.queues import may_claim, require_place
from apt_jobs.db.transitions import (
    back_in_queue,
    change_state,
    fail_attempt,
    owned_job,
    record_state,
)
from apt_jobs.db.workers import has_handed_back, is_held_back
from apt_jobs.errors import NotFound
from apt_jobs.events.kinds import StoredEvent
from apt_jobs.jobs.ids import new_job_id
from apt_jobs.jobs.needs import needs_of
from apt_jobs.jobs.retry import Fault, RetryRules, fault_of_lost_worker
from apt_jobs.jobs.spec import GenerateSpec, TrainSpec, queue_of
from apt_jobs.jobs.states import OWNED_STATES, JobState, sources_of

DEFAULT_RULES = RetryRules()


def insert_job(
    session: Session,
    spec: TrainSpec | GenerateSpec,
    *,
    import_key: str | None = None,
    max_queued_jobs: int | None = None,
    schedule_id: str | None = None,
) -> Job:
    """Add a queued job and its first event.

    Doors (REST, schedules) submit through `operations/submit.py`, which also checks what the job refers to.

    Args:
        session: of the transaction.
        spec: what was submitted.
        import_key: of a run that is imported: one job for each key, which is returned if it is there already.
        max_queued_jobs: None: as many jobs may wait as come.
        schedule_id: of the schedule that submits.

    Raises:
        Unavailable: `max_queued_jobs` already wait.
    """
    if import_key is not None and (known := _imported_job(session, import_key)):
        return known
    if max_queued_jobs is not None:
        require_place(session, max_queued_jobs)
    job = new_job(spec, import_key=import_key, schedule_id=schedule_id)
    if import_key is None:
        session.add(job)
        session.flush()
    elif known := _insert_or_known(session, job, import_key):
        return known
    attach_parents(session, [job])
    record_state(session, job, None, None)
    return job


def new_job(
    spec: TrainSpec | GenerateSpec,
    *,
    job_id: str | None = None,
    import_key: str | None = None,
    schedule_id: str | None = None,
) -> Job:
    """Return the row of a queued job, not stored yet."""
    return Job(
        id=job_id or new_job_id(),
        kind=spec.kind,
        name=spec.name,
        queue=queue_of(spec),
        priority=spec.priority,
        labels=dict(spec.labels),
        spec=spec.model_dump(mode="json"),
        state=JobState.QUEUED,
        last_seq=1,
        max_attempts=spec.max_attempts,
        idempotency_key=import_key,
        schedule_id=schedule_id,
        code_sha256=spec.code.sha256 if isinstance(spec, TrainSpec) and spec.code is not None else None,
        needs=needs_of(spec),
        is_preemptible=isinstance(spec, TrainSpec) and spec.is_preemptible,
    )


def get_job(session: Session, job_id: str) -> Job:
    """Return the row as it is now.

    Raises:
        NotFound: there is no such job.
    """
    job = session.get(Job, job_id, populate_existing=True)
    if job is None:
        raise NotFound(f"no job {job_id!r}")
    return job


def list_attempts(session: Session, job_id: str) -> list[Attempt]:
    """Return all attempts of a job, first to last."""
    return list(session.scalars(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.attempt)))


@dataclass(frozen=True, slots=True)
class StopRequests:
    """What users, or a job of higher priority, want of a running attempt."""

    cancel: bool
    pause: bool
    preempted_by: str | None = None  # job that it yields to


def stop_requests_of(job: Job) -> StopRequests:
    return StopRequests(
        cancel=job.cancel_requested_at is not None,
        pause=job.state == JobState.PAUSING,
        preempted_by=job.preempted_by,
    )


@dataclass(frozen=True, slots=True)
class Claimed:
    """A job that now belongs to the claimer's attempt, and the event that says so."""

    job: Job
    event: StoredEvent


def claim_next(session: Session, queue: str, worker: str, lease_s: float, kind: str | None = None) -> Claimed | None:
    """Claim the first waiting job of the queue, of `kind` if given: highest priority, then oldest.

    None: nothing is due that this worker did not hand back lately, or the queue is paused or has as many running jobs
    as it may, or the worker is drained or paused (it hears of that with its next heartbeat, but from the claim on
    nothing is given to it).
    """
    if not may_claim(session, queue) or is_held_back(session, worker):
        return None
    candidates = due_jobs(queue, worker, kind).order_by(Job.priority.desc(), Job.created_at, Job.id).limit(1)
    job_id = None
    if has_handed_back(session, worker):  # a job that it may be able to run comes first, whatever the priority
        tried = exists().where(HandBack.job_id == Job.id, HandBack.worker == worker)
        job_id = session.scalar(candidates.where(~tried).with_for_update(skip_locked=True))
    if job_id is None:
        job_id = session.scalar(candidates.with_for_update(skip_locked=True))
    if job_id is None:  # who steers a job locks its row for a moment: wait
        job_id = session.scalar(candidates.with_for_update())
    return None if job_id is None else claim(session, job_id, worker, lease_s)


def due_jobs(queue: str, worker: str, kind: str | None = None) -> Select[str]:
    """Select the ids of jobs that `worker` may claim from the queue now."""
    kept_off = exists().where(HandBack.job_id == Job.id, HandBack.worker == worker, HandBack.until_at > now_plus(0))
    query = select(Job.id).where(
        Job.queue == queue,
        Job.state == JobState.QUEUED,
        Job.holds == 0,
        Job.not_before_at <= now_plus(0),
        ~kept_off,
    )
    return query if kind is None else query.where(Job.kind == kind)


def claim_values(worker: str, lease_s: float) -> dict[str, Any]:
    """Return what a claim writes to the row of a job, by column."""
    return {
        "state": JobState.RUNNING,
        "reason": None,
        "attempt": Job.attempt + 1,
        "lease_owner": worker,
        "lease_until": now_plus(lease_s),
        "claimed_at": now_plus(0),
        "last_seq": Job.last_seq + 1,
        "reserved_by": None,
        "reserved_until": None,
        "preempted_by": None,
    }


def claim(session: Session, job_id: str, worker: str, lease_s: float) -> Claimed | None:
    """Claim one job if it waits and is due. The row carries the new `attempt`, which is the fencing token."""
    job = session.scalars(
        update(Job)
        .where(
            Job.id == job_id,
            Job.state.in_(sources_of(JobState.RUNNING)),
            Job.holds == 0,
            Job.not_before_at <= now_plus(0),
        )
        .values(claim_values(worker, lease_s))
        .returning(Job)
        .execution_options(synchronize_session=False, populate_existing=True)
    ).one_or_none()
    if job is None:
        return None
    session.add(Attempt(job_id=job_id, attempt=job.attempt, worker=worker))
    return Claimed(job, record_state(session, job, JobState.QUEUED, f"attempt {job.attempt} on {worker}"))


def heartbeat(session: Session, job_id: str, attempt: int, lease_s: float) -> StopRequests:
    """Extend the lease, and learn what users want of the attempt.

    Raises:
        Fenced: the attempt no longer owns the job.
    """
    return stop_requests_of(fence(session, job_id, attempt, lease_s))


def finish(
    session: Session,
    job_id: str,
    attempt: int,
    outcome: JobState,
    *,
    reason: str | None = None,
    error: dict[str, Any] | None = None,
    result: dict[str, Any] | None = None,
    retry_in_s: float = 0.0,
    is_hand_back: bool = False,
) -> list[StoredEvent]:
    """End an attempt: the job becomes `outcome`. QUEUED hands it back, to be claimed after `retry_in_s` seconds.

    A job that somebody asked to cancel never waits again: handed back or paused, it becomes cancelled, and keeps the
    reason of who asked. One that somebody asked to pause becomes paused when it is handed back.

    Raises:
        Fenced: the attempt no longer owns the job; nothing was changed.
        TransitionRefused: the table does not allow it.
    """
    job = owned_job(session, job_id, attempt)
    if job.cancel_requested_at is not None and outcome in (JobState.QUEUED, JobState.PAUSED, JobState.CANCELLED):
        outcome, reason = JobState.CANCELLED, job.reason or reason
    elif job.state == JobState.PAUSING and outcome is JobState.QUEUED:
        outcome = JobState.PAUSED
    values: dict[str, Any] = {"error": error, "result": result}
    if outcome is JobState.QUEUED:
        values |= back_in_queue(retry_in_s)
    return change_state(session, job, outcome, reason, is_hand_back=is_hand_back, **values)[1]


def finish_faulted(
    session: Session,
    job_id: str,
    attempt: int,
    why: str,
    error: dict[str, Any] | None = None,
    *,
    fault: Fault = Fault.JOB,
    rules: RetryRules = DEFAULT_RULES,
) -> list[StoredEvent]:
    """End an attempt through a fault: try again after a back-off, or give the job up.

    Raises:
        Fenced: the attempt no longer owns the job; nothing was changed.
    """
    return fail_attempt(session, owned_job(session, job_id, attempt), why, error, fault=fault, rules=rules)


def reap_expired(session: Session, grace_s: float, rules: RetryRules = DEFAULT_RULES) -> list[StoredEvent]:
    """End the attempts whose lease ran out more than `grace_s` seconds ago. Any process may call it at any time."""
    lost = session.scalars(
        select(Job)
        .where(Job.state.in_(OWNED_STATES), Job.lease_until < now_plus(-grace_s))
        .order_by(Job.id)
        .limit(100)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    ).all()
    return [
        event
        for job in lost
        for event in fail_attempt(
            session, job, f"worker {job.lease_owner} was lost", fault=fault_of_lost_worker(job.lease_owner), rules=rules
        )
    ]


def has_expired(session: Session) -> bool:
    """Return whether any lease is over: a cheap look before `reap_expired`."""
    query = select(Job.id).where(Job.state.in_(OWNED_STATES), Job.lease_until < now_plus(0)).limit(1)
    return session.scalar(query) is not None


def attempts_of_owner(session: Session, owner: str) -> list[tuple[str, int]]:
    """Return `(job_id, attempt)` of all that the worker `owner` has now, the newest first."""
    query = select(Job.id, Job.attempt).where(
        Job.lease_owner == owner, Job.state.in_(OWNED_STATES), Job.lease_until > now_plus(0)
    )
    return [(row.id, row.attempt) for row in session.execute(query.order_by(Job.claimed_at.desc()))]


def owns(session: Session, job_id: str, attempt: int) -> bool:
    """Return whether the attempt owns its job now. Only a look: writes need `fence`."""
    query = select(Job.id).where(
        Job.id == job_id, Job.attempt == attempt, Job.state.in_(OWNED_STATES), Job.lease_until > now_plus(0)
    )
    return session.scalar(query) is not None


def queue_position(session: Session, job: Job) -> int | None:
    """Return 1 for the next one of its queue; None: it does not wait, or is held.

    Two ranges of the index of claims, no rows.
    """
    if job.state != JobState.QUEUED or job.holds:
        return None
    waiting = select(func.count()).select_from(Job)
    waiting = waiting.where(Job.queue == job.queue, Job.state == JobState.QUEUED, Job.holds == 0)
    higher = session.scalar(waiting.where(Job.priority > job.priority)) or 0
    older = tuple_(Job.created_at, Job.id) < tuple_(literal(job.created_at, UtcDateTime()), job.id)
    return 1 + higher + (session.scalar(waiting.where(Job.priority == job.priority, older)) or 0)


def count_by_state(session: Session) -> dict[str, int]:
    """Return jobs in each state, zeros included."""
    counts = dict.fromkeys((state.value for state in JobState), 0)
    counts.update(
        (state, count) for state, count in session.execute(select(Job.state, func.count()).group_by(Job.state))
    )
    return counts


def fence(session: Session, job_id: str, attempt: int, lease_s: float) -> Job:
    """Extend the lease and lock the row: the first statement of every transaction of an attempt.

    Raises:
        Fenced: the attempt no longer owns the job; roll back, write nothing.
    """
    return owned_job(session, job_id, attempt, lease_until=now_plus(lease_s))


def _insert_or_known(session: Session, job: Job, import_key: str) -> Job | None:
    """Insert the row; or return the row of another import with this key, which was quicker."""
    try:
        with session.begin_nested():
            session.add(job)
    except IntegrityError:
        known = _imported_job(session, import_key)
        if known is None:
            raise
        return known
    return None


def _imported_job(session: Session, import_key: str) -> Job | None:
    return session.scalar(select(Job).where(Job.idempotency_key == import_key))
