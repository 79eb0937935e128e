"""Jobs that a worker handed back because of what the worker lacks: a disk with room, a folder, GPUs, an entry point.

That is no fault of the job. It is kept off that worker for a while, longer each time, and a worker that hands back
several jobs in a row stops claiming for a while. See `jobs/retry.py` for the rules.
"""

from collections.abc import Sequence

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.documents import storable_text
from apt_jobs.db.jobs import finish
from apt_jobs.db.models import HandBack, WorkerRow
from apt_jobs.db.transitions import owned_job
from apt_jobs.events.kinds import StoredEvent
from apt_jobs.jobs.retry import RetryRules
from apt_jobs.jobs.states import JobState

MAX_REASON_CHARS = 1_000


def hand_back(
    session: Session, job_id: str, attempt: int, reason: str, rules: RetryRules | None = None
) -> list[StoredEvent]:
    """End an attempt whose worker lacks what the job needs. The job waits for another worker; no fault is counted.

    Raises:
        Fenced: the attempt no longer owns the job; nothing was changed.
    """
    rules = rules or RetryRules()
    job = owned_job(session, job_id, attempt)
    worker, reason = job.lease_owner or "", storable_text(reason)[:MAX_REASON_CHARS]
    known = session.get(HandBack, (job_id, worker))
    num_times = 1 if known is None else known.num_times + 1
    in_a_row = 1 + (session.scalar(select(WorkerRow.num_hand_backs).where(WorkerRow.name == worker)) or 0)
    why = f"handed back by {worker}: {reason}"
    events = finish(session, job_id, attempt, JobState.QUEUED, reason=why, is_hand_back=True)
    until_at = now_plus(rules.hand_back.wait_s(num_times))
    session.merge(HandBack(job_id=job_id, worker=worker, reason=reason, num_times=num_times, until_at=until_at))
    session.flush()
    _count_hand_back(session, worker, in_a_row, reason, rules)
    return events


def hand_backs_of(session: Session, job_ids: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return, of each of the jobs that any worker handed back, why each worker did: `{job_id: {worker: reason}}`."""
    found: dict[str, dict[str, str]] = {}
    query = select(HandBack.job_id, HandBack.worker, HandBack.reason).where(HandBack.job_id.in_(job_ids))
    for job_id, worker, reason in session.execute(query):
        found.setdefault(job_id, {})[worker] = reason
    return found


def forgive_worker(session: Session, worker: str) -> None:
    """Let a worker claim at once whatever it handed back: somebody says that it has what it lacked."""
    session.execute(delete(HandBack).where(HandBack.worker == worker).execution_options(synchronize_session=False))
    session.execute(
        update(WorkerRow)
        .where(WorkerRow.name == worker)
        .values(num_hand_backs=0, paused_until_at=None, paused_reason=None)
        .execution_options(synchronize_session=False)
    )


def _count_hand_back(session: Session, worker: str, in_a_row: int, reason: str, rules: RetryRules) -> None:
    values: dict[str, object] = {"num_hand_backs": in_a_row}
    if in_a_row >= rules.max_hand_backs:
        values["paused_until_at"] = now_plus(rules.worker_pause.wait_s(in_a_row - rules.max_hand_backs + 1))
        values["paused_reason"] = f"handed back {in_a_row} jobs in a row; the last one: {reason}"
    session.execute(
        update(WorkerRow).where(WorkerRow.name == worker).values(**values).execution_options(synchronize_session=False)
    )
