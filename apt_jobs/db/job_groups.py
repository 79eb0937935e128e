"""Many jobs in one transaction with few statements: inserted, claimed and finished together.

The rules are those of `db/jobs.py`, one job at a time; here a group of short generation jobs costs about what one does.
"""

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import bindparam, delete, insert, select, update
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.jobs import Claimed, claim_values, due_jobs
from apt_jobs.db.models import Attempt, EventRow, HandBack, Job, WorkerRow
from apt_jobs.db.parents import attach_parents, has_children
from apt_jobs.db.queues import room_to_run
from apt_jobs.db.transitions import end_parent
from apt_jobs.db.webhook_outbox import enqueue_ended
from apt_jobs.db.workers import has_handed_back, is_held_back
from apt_jobs.events.codec import encode_payload
from apt_jobs.events.kinds import StateChanged, StoredEvent
from apt_jobs.jobs.states import OWNED_STATES, JobState, sources_of


def insert_jobs(session: Session, jobs: Sequence[Job]) -> list[StoredEvent]:
    """Add queued jobs of `new_job` and their first events."""
    session.add_all(jobs)
    session.flush()
    attach_parents(session, jobs)
    return _record_states(session, [(job, None, None) for job in jobs])


def claim_due(session: Session, queue: str, worker: str, lease_s: float, kind: str, limit: int) -> list[Claimed]:
    """Claim up to `limit` waiting jobs of the queue, of `kind`: highest priority first, then oldest.

    None of a worker that has handed jobs back lately: it claims one by one.
    """
    room = min(limit, room_to_run(session, queue))
    if room <= 0 or is_held_back(session, worker) or has_handed_back(session, worker):
        return []
    candidates = due_jobs(queue, worker, kind).order_by(Job.priority.desc(), Job.created_at, Job.id).limit(room)
    job_ids = list(session.scalars(candidates.with_for_update(skip_locked=True)))
    if not job_ids:
        return []
    rows = session.scalars(
        update(Job)
        .where(
            Job.id.in_(job_ids),
            Job.state.in_(sources_of(JobState.RUNNING)),
            Job.holds == 0,
            Job.not_before_at <= now_plus(0),
        )
        .values(claim_values(worker, lease_s))
        .returning(Job)
        .execution_options(synchronize_session=False, populate_existing=True)
    ).all()
    place = {job_id: index for index, job_id in enumerate(job_ids)}
    jobs = sorted(rows, key=lambda job: place[job.id])
    session.add_all(Attempt(job_id=job.id, attempt=job.attempt, worker=worker) for job in jobs)
    session.flush()
    events = _record_states(session, [(job, JobState.QUEUED, f"attempt {job.attempt} on {worker}") for job in jobs])
    return [Claimed(job, event) for job, event in zip(jobs, events, strict=True)]


def finish_succeeded(session: Session, results: Mapping[tuple[str, int], dict[str, Any]]) -> list[StoredEvent]:
    """End the attempts `(job_id, attempt)` that have a result.

    One that owns nothing any more has no event: its job is not changed.
    """
    rows = session.scalars(
        select(Job)
        .where(
            Job.id.in_([job_id for job_id, _ in results]),
            Job.state.in_(OWNED_STATES),
            Job.lease_until > now_plus(0),
        )
        .order_by(Job.id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    owned = [job for job in rows if (job.id, job.attempt) in results and job.state in sources_of(JobState.SUCCEEDED)]
    if not owned:
        return []
    previous = {job.id: JobState(job.state) for job in owned}
    owners = {job.lease_owner for job in owned}
    jobs, attempts = Job.__table__, Attempt.__table__
    session.connection().execute(
        jobs.update()  # type: ignore[attr-defined]  # a Table, typed as any FromClause
        .where(jobs.c.id == bindparam("job_id"))
        .values(
            state=JobState.SUCCEEDED,
            reason=None,
            lease_owner=None,
            lease_until=None,
            error=None,
            result=bindparam("job_result"),
            finished_at=now_plus(0),
            last_seq=jobs.c.last_seq + 1,
        ),
        [{"job_id": job.id, "job_result": results[job.id, job.attempt]} for job in owned],
    )
    session.connection().execute(
        attempts.update()  # type: ignore[attr-defined]  # as above
        .where(attempts.c.job_id == bindparam("ended_job_id"), attempts.c.attempt == bindparam("ended_attempt"))
        .values(ended_at=now_plus(0), outcome=JobState.SUCCEEDED, reason=None),
        [{"ended_job_id": job.id, "ended_attempt": job.attempt} for job in owned],
    )
    _forget_hand_backs(session, list(previous), owners)
    rows = session.scalars(select(Job).where(Job.id.in_(previous)).execution_options(populate_existing=True))
    ended = rows.all()
    for parent_id in has_children(session, [*previous]):
        end_parent(session, parent_id)
    enqueue_ended(session, ended)
    return _record_states(session, [(job, previous[job.id], None) for job in ended])


def _forget_hand_backs(session: Session, job_ids: Sequence[str], owners: Collection[str | None]) -> None:
    unsynchronized = {"synchronize_session": False}
    session.execute(delete(HandBack).where(HandBack.job_id.in_(job_ids)).execution_options(**unsynchronized))
    session.execute(
        update(WorkerRow)
        .where(WorkerRow.name.in_(owners), WorkerRow.num_hand_backs > 0)
        .values(num_hand_backs=0, paused_until_at=None, paused_reason=None)
        .execution_options(**unsynchronized)
    )


def cancel_requests(session: Session, job_ids: Sequence[str]) -> set[str]:
    """Return those of the jobs that somebody asked to cancel."""
    return set(session.scalars(select(Job.id).where(Job.id.in_(job_ids), Job.cancel_requested_at.is_not(None))))


def _record_states(session: Session, changes: Sequence[tuple[Job, JobState | None, str | None]]) -> list[StoredEvent]:
    """Store the `state` events, of (job, previous state, reason), whose `seq` the rows carry already."""
    if not changes:
        return []
    at = datetime.now(UTC)
    stored = [
        StoredEvent(job.id, job.last_seq, job.attempt, at, StateChanged(job.state, previous, reason))
        for job, previous, reason in changes
    ]
    session.execute(
        insert(EventRow),
        [
            {
                "job_id": event.job_id,
                "seq": event.seq,
                "attempt": event.attempt,
                "kind": event.event.kind,
                "at": at,
                "payload": encode_payload(event.event),
            }
            for event in stored
        ],
    )
    return stored
