"""When a waiting job will probably start: by the progress and time limits of what runs, and of what is before it."""

from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import Any

from sqlalchemy import and_, select
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.models import Attempt, Job, WorkerRow
from apt_jobs.jobs.expected_start import Plan, starts_in_s
from apt_jobs.jobs.needs import decode_needs
from apt_jobs.jobs.packing import RoomReport
from apt_jobs.jobs.states import OWNED_STATES, JobState

MAX_POSITION = 20  # of a job whose start is estimated
MAX_WORKERS = 32  # that are looked at


def expected_start_in_s(session: Session, job: Job, position: int, workers: Sequence[WorkerRow]) -> float | None:
    """Return in how many seconds a job at this place of its queue starts; None: nobody knows, or it is far behind."""
    packing = [row for row in workers if row.room is not None][:MAX_WORKERS]
    if position > MAX_POSITION or not packing:
        return None
    reports = [(RoomReport.of_document(row.room or {}), row.gpus) for row in packing]
    ends_in_s = _ends_in_s(session, [job_id for report, _ in reports for job_id, _ in report.jobs])
    plans = [
        Plan(report.room(gpus).offer, [(ends_in_s.get(job_id, inf), held) for job_id, held in report.jobs])
        for report, gpus in reports
    ]
    first = (
        select(Job.needs)
        .where(Job.queue == job.queue, Job.state == JobState.QUEUED, Job.holds == 0)
        .order_by(Job.priority.desc(), Job.created_at, Job.id)
        .limit(position - 1)
    )
    return starts_in_s(plans, [decode_needs(text) for text in [*session.scalars(first), job.needs]])


def _ends_in_s(session: Session, job_ids: Sequence[str]) -> Mapping[str, float]:
    """Return in how many seconds running jobs end, by their progress or at their time limit."""
    query = (
        select(Job, Attempt.resumed_from_step, now_plus(0))
        .join(Attempt, and_(Attempt.job_id == Job.id, Attempt.attempt == Job.attempt))
        .where(Job.id.in_(job_ids), Job.state.in_(OWNED_STATES))
    )
    found = {}
    for job, resumed_from_step, now in session.execute(query):
        assert job.claimed_at is not None  # an attempt owns it
        ran_s = max(0.0, (now - job.claimed_at).total_seconds())
        limit_s = decode_needs(job.needs).time_limit_s
        left_s = inf if limit_s is None else max(0.0, limit_s - ran_s)
        found[job.id] = min(left_s, _left_s(job, resumed_from_step or 0, ran_s))
    return found


def _left_s(job: Job, resumed_from_step: int, ran_s: float) -> float:
    """Return how long a job runs on, as its trainer says, or else at the pace of its steps so far."""
    eta_s: Any = (job.progress or {}).get("eta_s")
    if isinstance(eta_s, int | float) and isfinite(eta_s):
        return max(0.0, eta_s)
    if not job.step or not job.num_steps or job.step <= resumed_from_step:
        return inf
    return max(0.0, job.num_steps - job.step) * ran_s / (job.step - resumed_from_step)
