"""The life cycle of a job as compare-and-set on its row: insert, claim, heartbeat, finish, reap.

Whoever owns an attempt proves it with every write: `fence` updates the row only while the attempt is current and its
lease runs, by the database's clock. A state and its `state` event change in one transaction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.models import Attempt, Job
from apt_jobs.db.queues import may_claim
from apt_jobs.db.transitions import (
    back_in_queue,
    change_state,
    end_broken,
    owned_job,
    record_state,
)
from apt_jobs.db.workers import is_drained
from apt_jobs.errors import IdempotencyMismatch, NotFound, Unavailable
from apt_jobs.events.kinds import StoredEvent
from apt_jobs.jobs.ids import new_job_id
from apt_jobs.jobs.spec import GenerateSpec, TrainSpec, queue_of
from apt_jobs.jobs.states import OWNED_STATES, JobState, sources_of


def insert_job(
    session: Session,
    spec: TrainSpec | GenerateSpec,
    *,
    idempotency_key: str | None = None,
    request_sha256: str | None = None,
    max_queued_jobs: int | None = None,
    schedule_id: str | None = None,
) -> Job:
    """Add a queued job and its first event; with a known key return the job that the key made.

    Raises:
        IdempotencyMismatch: the key was used with another body.
        Unavailable: `max_queued_jobs` already wait.
    """
    if idempotency_key is not None and (known := _job_of_key(session, idempotency_key, request_sha256)):
        return known
    if max_queued_jobs is not None:
        waiting = session.scalar(select(func.count()).select_from(Job).where(Job.state == JobState.QUEUED)) or 0
        if waiting >= max_queued_jobs:
            raise Unavailable(f"{waiting} jobs wait already; at most {max_queued_jobs}: try again later")
    job = Job(
        id=new_job_id(),
        kind=spec.kind,
        name=spec.name,
        queue=queue_of(spec),
        priority=spec.priority,
        labels=dict(spec.labels),
        spec=spec.model_dump(mode="json"),
        state=JobState.QUEUED,
        last_seq=1,
        max_attempts=spec.max_attempts,
        idempotency_key=idempotency_key,
        request_sha256=request_sha256,
        schedule_id=schedule_id,
    )
    if idempotency_key is None:
        session.add(job)
        session.flush()
    elif known := _insert_or_known(session, job, idempotency_key, request_sha256):
        return known
    record_state(session, job, None, None)
    return job


def get_job(session: Session, job_id: str) -> Job:
    """The row as it is now.

    Raises:
        NotFound: there is no such job.
    """
    job = session.get(Job, job_id, populate_existing=True)
    if job is None:
        raise NotFound(f"no job {job_id!r}")
    return job


def list_attempts(session: Session, job_id: str) -> list[Attempt]:
    """All attempts of a job, first to last."""
    return list(session.scalars(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.attempt)))


def list_jobs(
    session: Session,
    *,
    states: Sequence[str] = (),
    kinds: Sequence[str] = (),
    queue: str | None = None,
    label: tuple[str, str] | None = None,
    text: str | None = None,
    after: str | None = None,
    limit: int = 50,
) -> tuple[list[Job], bool]:
    """Newest first; `after` is the last id seen. Returns the page and whether there is more."""
    query = select(Job).order_by(Job.id.desc()).limit(limit + 1)
    if states:
        query = query.where(Job.state.in_(states))
    if kinds:
        query = query.where(Job.kind.in_(kinds))
    if queue is not None:
        query = query.where(Job.queue == queue)
    if label is not None:
        query = query.where(Job.labels[label[0]].as_string() == label[1])
    if text:
        query = query.where(or_(Job.name.icontains(text, autoescape=True), Job.id.icontains(text, autoescape=True)))
    if after is not None:
        query = query.where(Job.id < after)
    rows = list(session.scalars(query))
    return rows[:limit], len(rows) > limit


@dataclass(frozen=True, slots=True)
class Orders:
    """What users want of a running attempt."""

    cancel: bool
    pause: bool


def orders_of(job: Job) -> Orders:
    return Orders(cancel=job.cancel_requested_at is not None, pause=job.state == JobState.PAUSING)


@dataclass(frozen=True, slots=True)
class Claimed:
    """A job that now belongs to the claimer's attempt, and the event that says so."""

    job: Job
    event: StoredEvent


def claim_next(session: Session, queue: str, worker: str, lease_s: float) -> Claimed | None:
    """Claim the first waiting job of the queue: highest priority, then oldest.

    None: nothing is due, or the queue is paused or has as many running jobs as it may, or the worker is drained (it
    hears of that with its next heartbeat, but from the claim on nothing is given to it).
    """
    if not may_claim(session, queue) or is_drained(session, worker):
        return None
    candidates = (
        select(Job.id)
        .where(Job.queue == queue, Job.state == JobState.QUEUED, Job.not_before_at <= now_plus(0))
        .order_by(Job.priority.desc(), Job.created_at, Job.id)
        .limit(1)
    )
    job_id = session.scalar(candidates.with_for_update(skip_locked=True))
    if job_id is None:  # a row may be locked by who notes that its hint was sent, and then this is that hint: wait
        job_id = session.scalar(candidates.with_for_update())
    return None if job_id is None else claim(session, job_id, worker, lease_s)


def claim(session: Session, job_id: str, worker: str, lease_s: float) -> Claimed | None:
    """Claim one job if it waits and is due. The row carries the new `attempt`, which is the fencing token."""
    job = session.scalars(
        update(Job)
        .where(
            Job.id == job_id,
            Job.state.in_(sources_of(JobState.RUNNING)),
            Job.not_before_at <= now_plus(0),
        )
        .values(
            state=JobState.RUNNING,
            reason=None,
            attempt=Job.attempt + 1,
            lease_owner=worker,
            lease_until=now_plus(lease_s),
            claimed_at=now_plus(0),
            last_seq=Job.last_seq + 1,
        )
        .returning(Job)
        .execution_options(synchronize_session=False, populate_existing=True)
    ).one_or_none()
    if job is None:
        return None
    session.add(Attempt(job_id=job_id, attempt=job.attempt, worker=worker))
    return Claimed(job, record_state(session, job, JobState.QUEUED, f"attempt {job.attempt} on {worker}"))


def heartbeat(session: Session, job_id: str, attempt: int, lease_s: float) -> Orders:
    """Extend the lease, and learn what users want of the attempt.

    Raises:
        Fenced: the attempt no longer owns the job.
    """
    return orders_of(fence(session, job_id, attempt, lease_s))


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
    return change_state(session, job, outcome, reason, **values)[1]


def finish_broken(
    session: Session, job_id: str, attempt: int, why: str, error: dict[str, Any] | None = None
) -> list[StoredEvent]:
    """End an attempt that broke through no fault of the job: try again after a pause, or give the job up.

    Raises:
        Fenced: the attempt no longer owns the job; nothing was changed.
    """
    return end_broken(session, owned_job(session, job_id, attempt), why, error)


def reap_expired(session: Session, grace_s: float) -> list[StoredEvent]:
    """End the attempts whose lease ran out more than `grace_s` seconds ago. Any process may call it at any time."""
    lost = session.scalars(
        select(Job)
        .where(Job.state.in_(OWNED_STATES), Job.lease_until < now_plus(-grace_s))
        .order_by(Job.id)
        .limit(100)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    ).all()
    return [event for job in lost for event in end_broken(session, job, f"worker {job.lease_owner} was lost")]


def has_expired(session: Session) -> bool:
    """Whether any lease is over: a cheap look before `reap_expired`."""
    query = select(Job.id).where(Job.state.in_(OWNED_STATES), Job.lease_until < now_plus(0)).limit(1)
    return session.scalar(query) is not None


def attempt_of_owner(session: Session, owner: str) -> tuple[str, int] | None:
    """`(job_id, attempt)` that the worker `owner` has now."""
    query = select(Job.id, Job.attempt).where(
        Job.lease_owner == owner, Job.state.in_(OWNED_STATES), Job.lease_until > now_plus(0)
    )
    row = session.execute(query.order_by(Job.claimed_at.desc()).limit(1)).one_or_none()
    return None if row is None else (row.id, row.attempt)


def owns(session: Session, job_id: str, attempt: int) -> bool:
    """Whether the attempt owns its job now. Only a look: writes need `fence`."""
    query = select(Job.id).where(
        Job.id == job_id, Job.attempt == attempt, Job.state.in_(OWNED_STATES), Job.lease_until > now_plus(0)
    )
    return session.scalar(query) is not None


def queue_position(session: Session, job: Job) -> int | None:
    """1: the next one of its queue. None: it does not wait."""
    if job.state != JobState.QUEUED:
        return None
    ahead = or_(
        Job.priority > job.priority,
        and_(Job.priority == job.priority, Job.created_at < job.created_at),
        and_(Job.priority == job.priority, Job.created_at == job.created_at, Job.id < job.id),
    )
    waiting = select(func.count()).select_from(Job).where(Job.queue == job.queue, Job.state == JobState.QUEUED, ahead)
    return 1 + (session.scalar(waiting) or 0)


def count_by_state(session: Session) -> dict[str, int]:
    """Jobs in each state, zeros included."""
    counts = dict.fromkeys((state.value for state in JobState), 0)
    counts.update(
        (state, count) for state, count in session.execute(select(Job.state, func.count()).group_by(Job.state))
    )
    return counts


def fence(session: Session, job_id: str, attempt: int, lease_s: float) -> Job:
    """The first statement of every transaction of an attempt: extend the lease and lock the row.

    Raises:
        Fenced: the attempt no longer owns the job; roll back, write nothing.
    """
    return owned_job(session, job_id, attempt, lease_until=now_plus(lease_s))


def _insert_or_known(session: Session, job: Job, key: str, request_sha256: str | None) -> Job | None:
    """Insert the row; or the row of another request with this key, which was quicker."""
    try:
        with session.begin_nested():
            session.add(job)
    except IntegrityError:
        known = _job_of_key(session, key, request_sha256)
        if known is None:
            raise
        return known
    return None


def _job_of_key(session: Session, key: str, request_sha256: str | None) -> Job | None:
    job = session.scalar(select(Job).where(Job.idempotency_key == key))
    if job is not None and job.request_sha256 != request_sha256:
        raise IdempotencyMismatch(f"Idempotency-Key {key!r} was used with another body, for job {job.id}")
    return job
