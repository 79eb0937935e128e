"""Which hints to send: the job row is the outbox, and a hint is sent again until somebody claims the job."""

from collections.abc import Sequence

from sqlalchemy import case, or_, select, update
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.models import Job
from apt_jobs.jobs.states import JobState

DISPATCH_PAUSE_S = 30.0  # before a hint is sent again; doubles
DISPATCH_PAUSE_MAX_S = 600.0


def jobs_to_dispatch(session: Session, limit: int = 100) -> list[tuple[str, str]]:
    """`(job_id, queue)` of waiting jobs whose hint was never sent, or so long ago that it must be lost."""
    oldest_allowed = case(
        *[
            (Job.num_dispatches == sent, now_plus(-min(DISPATCH_PAUSE_S * 2 ** (sent - 1), DISPATCH_PAUSE_MAX_S)))
            for sent in range(1, 6)
        ],
        else_=now_plus(-DISPATCH_PAUSE_MAX_S),
    )
    due = (
        select(Job.id, Job.queue)
        .where(Job.state == JobState.QUEUED, Job.not_before_at <= now_plus(0))
        .where(or_(Job.dispatched_at.is_(None), Job.dispatched_at < oldest_allowed))
        .order_by(Job.priority.desc(), Job.created_at, Job.id)
        .limit(limit)
    )
    return [(job_id, queue) for job_id, queue in session.execute(due)]


def mark_dispatched(session: Session, job_ids: Sequence[str]) -> None:
    """Note that hints for these jobs were sent now."""
    in_one_order = select(Job.id).where(Job.id.in_(job_ids)).order_by(Job.id).with_for_update()  # else two may deadlock
    session.execute(
        update(Job)
        .where(Job.id.in_(in_one_order))
        .values(dispatched_at=now_plus(0), num_dispatches=Job.num_dispatches + 1)
        .execution_options(synchronize_session=False)
    )


def send_hints_again(session: Session, queues: Sequence[str]) -> None:
    """Forget that hints of waiting jobs were sent: whoever took them might not claim then, and may now."""
    session.execute(
        update(Job)
        .where(Job.queue.in_(queues), Job.state == JobState.QUEUED)
        .values(dispatched_at=None)
        .execution_options(synchronize_session=False)
    )
