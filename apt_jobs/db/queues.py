"""Queues: how full they are, how many of their jobs may run at once, and whether they are paused."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from sqlalchemy import Engine, func, literal, select, text, union_all
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.job_counts import JobCount, job_counts, num_in_states
from apt_jobs.db.models import Job, QueueRow
from apt_jobs.errors import Unavailable
from apt_jobs.jobs.states import OWNED_STATES, JobState

MAX_SUBMISSIONS_PER_S = 2_000  # of all processes together, on one database: what decides when to count again
RECOUNT_MAX_S = 10.0
MAX_WOKEN_QUEUES = 1_000
MAX_ROOM = 1 << 30  # of a queue without a limit
_uncounted_until_s: WeakKeyDictionary[Engine, dict[int, float]] = WeakKeyDictionary()  # by limit, CLOCK_MONOTONIC


@dataclass(frozen=True, slots=True)
class Queue:
    """One queue as users see it."""

    name: str
    queued: int
    running: int
    max_running: int | None  # None: as many as there are workers
    is_paused: bool


def list_queues(session: Session) -> list[Queue]:
    """Return every queue that has a job or a configuration, by name."""
    rows = {row.name: row for row in session.scalars(select(QueueRow))}
    counts = job_counts(session)
    found = []
    for name in sorted({*counts, *rows}):
        row, by_state = rows.get(name), counts.get(name, {})
        running = sum(by_state.get(state, 0) for state in OWNED_STATES)
        is_paused = row is not None and row.paused_at is not None
        max_running = None if row is None else row.max_running
        found.append(Queue(name, by_state.get(JobState.QUEUED, 0), running, max_running, is_paused))
    return found


def configure_queue(session: Session, name: str, *, max_running: int | None, paused: bool) -> Queue:
    """Set how many jobs of a queue may run at once, and whether it hands out any. What runs goes on."""
    row = session.get(QueueRow, name, with_for_update=True) or QueueRow(name=name)
    row.max_running = max_running
    if not paused:
        row.paused_at = None
    elif row.paused_at is None:
        row.paused_at = now_plus(0)
    session.add(row)
    session.flush()
    return next(queue for queue in list_queues(session) if queue.name == name)


def may_claim(session: Session, name: str) -> bool:
    """Return whether another job of the queue may run, with its row locked: two claims cannot both be the last."""
    return room_to_run(session, name) > 0


def room_to_run(session: Session, name: str) -> int:
    """Return how many more jobs of the queue may run now. Locks the queue's row as `may_claim` says."""
    row = session.scalars(select(QueueRow).where(QueueRow.name == name).with_for_update()).one_or_none()
    if row is None:
        return MAX_ROOM
    if row.paused_at is not None:
        return 0
    if row.max_running is None:
        return MAX_ROOM
    return max(0, row.max_running - num_running(session, name))


def num_running(session: Session, name: str) -> int:
    """Return how many jobs of the queue an attempt owns."""
    running = select(func.count()).select_from(Job).where(Job.queue == name, Job.state.in_(OWNED_STATES))
    return session.scalar(running) or 0


def first_waiting(session: Session, names: Sequence[str], limit: int) -> dict[str, int]:
    """Return the places, from 1, of the first `limit` waiting jobs of each queue: `{job_id: place}`. One statement."""
    firsts = [
        select(
            select(Job.id, literal(name).label("queue"), Job.priority, Job.created_at)
            .where(Job.queue == name, Job.state == JobState.QUEUED, Job.holds == 0)
            .order_by(Job.priority.desc(), Job.created_at, Job.id)
            .limit(limit)
            .subquery()
        )
        for name in sorted(set(names))
    ]
    places: dict[str, int] = {}
    num_seen: dict[str, int] = {}
    merged = union_all(*firsts).subquery().c
    ordered = select(merged.id, merged.queue).order_by(
        merged.queue, merged.priority.desc(), merged.created_at, merged.id
    )
    for job_id, queue in session.execute(ordered):
        num_seen[queue] = num_seen.get(queue, 0) + 1
        places[job_id] = num_seen[queue]
    return places


def paused_queues(session: Session) -> dict[str, bool]:
    """Return of each queue that somebody configured whether it hands out no job."""
    return {name: at is not None for name, at in session.execute(select(QueueRow.name, QueueRow.paused_at))}


def waits_of_first(session: Session) -> dict[str, float]:
    """Return for how many seconds the waiting job that is next of each queue has been due; 0: it is not due yet.

    One read of `ix_jobs_waiting` a queue with waiting jobs, whatever waits behind.
    """
    waiting = select(JobCount.queue).where(JobCount.state == JobState.QUEUED).distinct().subquery().c
    first = (
        select(Job.not_before_at)
        .where(Job.queue == waiting.queue, Job.state == JobState.QUEUED, Job.holds == 0)
        .order_by(Job.priority.desc(), Job.created_at, Job.id)
        .limit(1)
        .scalar_subquery()
    )
    waits: dict[str, float] = {}
    for queue, due_at, now in session.execute(select(waiting.queue, first, now_plus(0))):
        if due_at is not None:
            waits[queue] = max(0.0, (now - due_at).total_seconds())
    return waits


def require_place(session: Session, max_queued_jobs: int, num_jobs: int = 1) -> None:
    """Return if another job may wait, or `num_jobs` of them.

    The jobs that wait are counted only when the limit can have been reached since the last count, so that a submission
    costs the same however many wait. Near the limit every submission counts, as do those of many jobs.

    Raises:
        Unavailable: `max_queued_jobs` wait already.
    """
    engine = session.connection().engine
    limits = _uncounted_until_s.setdefault(engine, {})
    if num_jobs == 1 and time.monotonic() < limits.get(max_queued_jobs, 0.0):
        return
    waiting = num_in_states(session, [JobState.QUEUED])
    if waiting + num_jobs > max_queued_jobs:
        more = f", and {num_jobs} more are to" if num_jobs > 1 else ""
        raise Unavailable(f"{waiting} jobs wait already{more}; at most {max_queued_jobs}: try again later")
    free_s = (max_queued_jobs - waiting - num_jobs) / MAX_SUBMISSIONS_PER_S
    if free_s >= 1.0:
        limits[max_queued_jobs] = time.monotonic() + min(free_s, RECOUNT_MAX_S)


def queues_with_due_jobs(session: Session) -> list[str]:
    """Return the queues of which a job is due and that hand out jobs, by name; at most `MAX_WOKEN_QUEUES`.

    Steps from queue to queue in the index: what it costs grows with the number of queues, not of jobs.
    """
    now = now_plus(0).compile(dialect=session.get_bind().dialect, compile_kwargs={"literal_binds": True})
    found = session.execute(
        text(
            f"""
            WITH RECURSIVE waiting(queue) AS (
              SELECT min(queue) FROM jobs WHERE state = 'queued'
              UNION ALL
              SELECT (SELECT min(jobs.queue) FROM jobs WHERE jobs.state = 'queued' AND jobs.queue > waiting.queue)
              FROM waiting WHERE waiting.queue IS NOT NULL
            )
            SELECT waiting.queue FROM waiting
            WHERE waiting.queue IS NOT NULL
              AND NOT EXISTS (
                SELECT 1 FROM queues WHERE queues.name = waiting.queue AND queues.paused_at IS NOT NULL
              )
              AND EXISTS (
                SELECT 1 FROM jobs
                WHERE jobs.queue = waiting.queue AND jobs.state = 'queued' AND jobs.holds = 0
                  AND jobs.not_before_at <= {now}
              )
            LIMIT {MAX_WOKEN_QUEUES}
            """  # noqa: S608  # nothing of it comes from outside
        )
    )
    return list(found.scalars())
