"""Jobs that come after others: what holds them, and what becomes of them when a parent ends.

`db/transitions.py` calls `outcomes_of_children` in the transaction in which a job ends, so that a claim only has to
look at `jobs.holds`. A parent is locked before its children, and there is no way round: a job can only name those that
were there before it, so that there is no cycle either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from apt_jobs.db import holds
from apt_jobs.db.checkpoints import best_of_job, newest_of_job
from apt_jobs.db.models import Job, JobParent
from apt_jobs.errors import Conflict, InvalidInput
from apt_jobs.jobs.parent_results import filled_in, references_in
from apt_jobs.jobs.spec import parse_spec
from apt_jobs.jobs.states import TERMINAL_STATES, JobState


@dataclass(frozen=True, slots=True)
class Outcome:
    """What becomes of a held job: it may be claimed (`why_not` is None), or it ends."""

    job: Job  # locked
    values: dict[str, Any]  # columns to set
    why_not: str | None


def attach_parents(session: Session, jobs: Sequence[Job]) -> None:
    """Note the parents of jobs that were just inserted, and hold those of which one has not ended.

    Raises:
        InvalidInput: a parent is not there, or ended so that the job can never run.
    """
    wanted = {after["job"] for job in jobs for after in job.spec.get("after") or ()}
    if not wanted:
        return
    query = select(Job).where(Job.id.in_(wanted)).order_by(Job.id).with_for_update(read=True)
    parents = {row.id: row for row in session.scalars(query.execution_options(populate_existing=True))}
    for job in jobs:
        named = job.spec.get("after") or ()
        for after in named:
            if after["job"] not in parents:
                raise InvalidInput(f"after: there is no job {after['job']!r}")
            session.add(JobParent(job_id=job.id, parent_id=after["job"], on_end=after["on"] == "end"))
        session.flush()
        mine = [(parents[after["job"]], after["on"] == "end") for after in named]
        if (why := _why_never(mine)) is not None:
            raise InvalidInput(f"after: {why}")
        if any(parent.state not in TERMINAL_STATES for parent, _ in mine):
            job.holds |= holds.PARENTS
        elif mine:
            outcome = _ready(session, job, [parent for parent, _ in mine])
            if outcome.why_not is not None:
                raise InvalidInput(f"after: {outcome.why_not}")
            for column, value in outcome.values.items():
                setattr(job, column, value)
        session.flush()


def outcomes_of_children(session: Session, parent_id: str) -> list[Outcome]:
    """Return what becomes of the jobs that come after one that just ended; those that wait for others are left out."""
    query = select(Job).join(JobParent, JobParent.job_id == Job.id).where(JobParent.parent_id == parent_id)
    query = query.where(Job.holds.bitwise_and(holds.PARENTS) != 0, Job.state.not_in(TERMINAL_STATES))
    rows = session.scalars(
        query.order_by(Job.id).with_for_update(of=Job).execution_options(populate_existing=True)
    ).all()
    outcomes = []
    for job in rows:
        parents = parents_of(session, job.id)
        if (why := _why_never(parents)) is not None:
            outcomes.append(Outcome(job, {}, why))
        elif all(parent.state in TERMINAL_STATES for parent, _ in parents):
            outcomes.append(_ready(session, job, [parent for parent, _ in parents]))
    return outcomes


def parents_of(session: Session, job_id: str) -> list[tuple[Job, bool]]:
    """Return the jobs that a job comes after, as they are now, and whether any end of theirs will do."""
    query = select(Job, JobParent.on_end).join(JobParent, JobParent.parent_id == Job.id)
    query = query.where(JobParent.job_id == job_id).order_by(Job.id).execution_options(populate_existing=True)
    return [(parent, on_end) for parent, on_end in session.execute(query)]


def has_children(session: Session, job_ids: Sequence[str]) -> list[str]:
    """Return those of the jobs that others come after."""
    query = select(JobParent.parent_id).where(JobParent.parent_id.in_(job_ids)).distinct()
    return list(session.scalars(query.order_by(JobParent.parent_id)))


def columns_of_retry(session: Session, job: Job) -> dict[str, Any]:
    """Return the columns of a job that a user retries: whether it is held, and what it names of its parents' results.

    Raises:
        Conflict: a parent ended so that it can never run.
    """
    parents = parents_of(session, job.id)
    if (why := _why_never(parents)) is not None:
        raise Conflict(f"job {job.id} is not retried: {why}; retry that one first")
    if any(parent.state not in TERMINAL_STATES for parent, _ in parents):
        return {"holds": holds.PARENTS}
    outcome = _ready(session, job, [parent for parent, _ in parents])
    if outcome.why_not is not None:
        raise Conflict(f"job {job.id} is not retried: {outcome.why_not}")
    return {"holds": 0, **outcome.values}


def _why_never(parents: Sequence[tuple[Job, bool]]) -> str | None:
    for parent, on_end in parents:
        if not on_end and parent.state in TERMINAL_STATES and parent.state != JobState.SUCCEEDED:
            reason = f": {parent.reason}" if parent.reason else ""
            return f"job {parent.id}, which it comes after, is {parent.state}{reason}"
    return None


def _ready(session: Session, job: Job, parents: Sequence[Job]) -> Outcome:
    """Return a job whose parents have all ended, with what it names of their results."""
    results: dict[tuple[str, str], Any] = {}
    for field, parent, result in references_in(job.spec):
        source = parents[0] if parent == "job" else next((one for one in parents if one.id == parent), None)
        value = None if source is None else _result_of(session, source, result)
        if value is None:
            named = parent if source is None else source.id
            return Outcome(job, {}, f"{field} names {result} of job {named}, which it does not have")
        results[parent, result] = value
    if not results:
        return Outcome(job, {}, None)
    spec = filled_in(job.spec, results)
    try:
        parse_spec(spec)
    except ValueError as exc:  # pydantic's; a text where a number has to be
        return Outcome(job, {}, f"with the results of its parents it is no job: {str(exc)[:500]}")
    return Outcome(job, {"spec": spec}, None)


def _result_of(session: Session, parent: Job, result: str) -> Any:
    if result == "id":
        return parent.id
    if result in ("best_checkpoint", "last_checkpoint"):
        row = (best_of_job if result == "best_checkpoint" else newest_of_job)(session, parent.id)
        return None if row is None else row.id
    if result == "step":
        return parent.step
    return (parent.result or {}).get(result)
