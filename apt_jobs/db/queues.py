"""Queues: how full they are, how many of their jobs may run at once, and whether they are paused."""

from dataclasses import dataclass

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.dispatch import send_hints_again
from apt_jobs.db.models import Job, QueueRow
from apt_jobs.jobs.states import OWNED_STATES, JobState


@dataclass(frozen=True, slots=True)
class Queue:
    """One queue as users see it."""

    name: str
    queued: int
    running: int
    max_running: int | None  # None: as many as there are workers
    is_paused: bool


def list_queues(session: Session) -> list[Queue]:
    """Every queue that has a job or a configuration, by name."""
    running = func.sum(case((Job.state.in_(OWNED_STATES), 1), else_=0))
    queued = func.sum(case((Job.state == JobState.QUEUED, 1), else_=0))
    grouped = session.execute(select(Job.queue, queued, running).group_by(Job.queue))
    counts = {name: (waiting, owned) for name, waiting, owned in grouped}
    rows = {row.name: row for row in session.scalars(select(QueueRow))}
    found = []
    for name in sorted(counts.keys() | rows.keys()):
        waiting, owned = counts.get(name, (0, 0))
        row = rows.get(name)
        is_paused = row is not None and row.paused_at is not None
        found.append(Queue(name, int(waiting), int(owned), None if row is None else row.max_running, is_paused))
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
    send_hints_again(session, [name])
    return next(queue for queue in list_queues(session) if queue.name == name)


def may_claim(session: Session, name: str) -> bool:
    """Whether another job of the queue may run now. Locks the queue's row: two claims cannot both be the last."""
    row = session.scalars(select(QueueRow).where(QueueRow.name == name).with_for_update()).one_or_none()
    if row is None:
        return True
    if row.paused_at is not None:
        return False
    if row.max_running is None:
        return True
    running = select(func.count()).select_from(Job).where(Job.queue == name, Job.state.in_(OWNED_STATES))
    return (session.scalar(running) or 0) < row.max_running
