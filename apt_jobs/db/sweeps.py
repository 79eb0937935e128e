"""Sweeps: their rows, how far their jobs are, and the next step of each.

A sweep and all of its jobs are inserted in one transaction. What happens then is written in the rows: which jobs are
held until others end, what users want of the whole, what halving decided. `next_step` reads from them what is to be
done now, `apply_step` of `operations/sweeps.py` does it with the sweep's row locked: any web process may do either at
any time, and die in between.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from apt_jobs.db import holds
from apt_jobs.db.clock import now_plus
from apt_jobs.db.job_groups import insert_jobs
from apt_jobs.db.jobs import new_job
from apt_jobs.db.models import Job
from apt_jobs.db.queues import require_place
from apt_jobs.db.series.metric_summary import goal_of
from apt_jobs.db.sweep_models import Sweep, SweepRung, SweepTrial
from apt_jobs.db.sweep_rungs import Decision, decide
from apt_jobs.errors import Conflict, NotFound
from apt_jobs.jobs.ids import new_sweep_id
from apt_jobs.jobs.states import TERMINAL_STATES, JobState
from apt_jobs.jobs.sweeps import PlannedJob, SweepSpec

STEERED_AT_ONCE = 50  # jobs of one transaction


@dataclass(frozen=True, slots=True)
class Step:
    """What is to be done now; empty: nothing."""

    cancel: list[str] = field(default_factory=list)  # ids of jobs
    pause: list[str] = field(default_factory=list)
    resume: list[str] = field(default_factory=list)
    release: list[str] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    finish: bool = False

    def __bool__(self) -> bool:
        return bool(self.cancel or self.pause or self.resume or self.release or self.decisions or self.finish)


def insert_sweep(session: Session, spec: SweepSpec, planned: Sequence[PlannedJob], max_queued_jobs: int) -> Sweep:
    """Add a sweep with all of its jobs, of which the first `max_running` may be claimed.

    Raises:
        Unavailable: there is no place for so many waiting jobs.
    """
    require_place(session, max_queued_jobs, len(planned))
    sweep = Sweep(
        id=new_sweep_id(),
        name=spec.name or planned[0].spec.name,
        request=spec.model_dump(mode="json"),
        metric=spec.metric,
        goal=spec.goal or ("minimize" if goal_of(spec.metric) == "min" else "maximize"),
        num_jobs=len(planned),
        max_running=spec.max_running,
    )
    session.add(sweep)
    session.flush()
    jobs, trials = [], []
    for index, one in enumerate(planned):
        job = new_job(one.spec)
        job.sweep_id = sweep.id
        job.holds = holds.SWEEP if spec.max_running is not None and index >= spec.max_running else 0
        jobs.append(job)
        trials.append(
            SweepTrial(sweep_id=sweep.id, number=one.number, repeat=one.repeat, job_id=job.id, setting=one.setting)
        )
    insert_jobs(session, jobs)
    session.add_all(trials)
    session.flush()
    return sweep


def get_sweep(session: Session, sweep_id: str, *, lock: bool = False) -> Sweep:
    """Return the row as it is now.

    Raises:
        NotFound: there is no such sweep.
    """
    sweep = session.get(Sweep, sweep_id, populate_existing=True, with_for_update=lock or None)
    if sweep is None:
        raise NotFound(f"no sweep {sweep_id!r}")
    return sweep


def list_sweeps(session: Session, *, after: str | None, limit: int) -> tuple[list[Sweep], bool]:
    """Return a page of sweeps, newest first, and whether there are more."""
    query = select(Sweep) if after is None else select(Sweep).where(Sweep.id < after)
    rows = list(session.scalars(query.order_by(Sweep.id.desc()).limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def open_sweeps(session: Session) -> list[str]:
    """Return the ids of the sweeps that have a job that has not ended."""
    return list(session.scalars(select(Sweep.id).where(Sweep.finished_at.is_(None)).order_by(Sweep.id)))


def count_states(session: Session, sweep_ids: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return the number of jobs in each state that there are, by sweep."""
    counts: dict[str, dict[str, int]] = {sweep_id: {} for sweep_id in sweep_ids}
    query = select(Job.sweep_id, Job.state, func.count()).where(Job.sweep_id.in_(sweep_ids))
    for sweep_id, state, count in session.execute(query.group_by(Job.sweep_id, Job.state)):
        counts[str(sweep_id)][state] = count
    return counts


def want_cancelled(session: Session, sweep_id: str) -> Sweep:
    """Note that a sweep is to be cancelled. Idempotent.

    Raises:
        NotFound: there is no such sweep.
        Conflict: it has ended.
    """
    sweep = _open_sweep(session, sweep_id, "cancelled")
    sweep.cancel_requested_at = sweep.cancel_requested_at or now_plus(0)
    session.flush()
    return sweep


def want_paused(session: Session, sweep_id: str, *, paused: bool) -> Sweep:
    """Note that a sweep is to be paused, or to go on. Idempotent.

    Raises:
        NotFound: there is no such sweep.
        Conflict: it has ended, or is being cancelled.
    """
    sweep = _open_sweep(session, sweep_id, "paused" if paused else "resumed")
    if sweep.cancel_requested_at is not None:
        raise Conflict(f"sweep {sweep_id} is being cancelled")
    sweep.paused_at = (sweep.paused_at or now_plus(0)) if paused else None
    session.flush()
    return sweep


def next_step(session: Session, sweep: Sweep) -> Step:
    """Return what is to be done for a sweep now. Reads only."""
    if sweep.finished_at is not None:
        return Step()
    columns = (Job.id, Job.state, Job.holds, Job.cancel_requested_at)
    query = select(*columns, SweepTrial.is_paused).join(SweepTrial, SweepTrial.job_id == Job.id)
    query = query.where(Job.sweep_id == sweep.id, Job.state.not_in(TERMINAL_STATES))
    rows = session.execute(query.order_by(SweepTrial.number, SweepTrial.repeat)).all()
    if not rows:
        return Step(finish=True)
    if sweep.cancel_requested_at is not None:
        return Step(cancel=[row.id for row in rows if row.cancel_requested_at is None][:STEERED_AT_ONCE])
    if sweep.paused_at is not None:
        going = [row for row in rows if row.state in (JobState.QUEUED, JobState.RUNNING)]
        return Step(pause=[row.id for row in going if row.cancel_requested_at is None][:STEERED_AT_ONCE])
    paused = [row.id for row in rows if row.state == JobState.PAUSED and row.is_paused]
    return Step(
        resume=paused[:STEERED_AT_ONCE],
        release=_to_release(rows, sweep.max_running)[:STEERED_AT_ONCE],
        decisions=decide(session, sweep),
    )


def lock_jobs(session: Session, step: Step) -> None:
    """Lock the jobs of a step in one order, before any of them changes: two steps never wait for each other."""
    wanted = [*step.cancel, *step.pause, *step.resume, *step.release, *(one.job_id for one in step.decisions)]
    session.execute(select(Job.id).where(Job.id.in_(wanted)).order_by(Job.id).with_for_update())


def release(session: Session, job_ids: Sequence[str]) -> None:
    """Let jobs be claimed that their sweep holds."""
    session.execute(
        update(Job)
        .where(Job.id.in_(job_ids), Job.holds.bitwise_and(holds.SWEEP) != 0)
        .values(holds=Job.holds - holds.SWEEP)
        .execution_options(synchronize_session=False)
    )


def mark_paused(session: Session, job_ids: Sequence[str], *, is_paused: bool) -> None:
    """Note which jobs are paused with their sweep, so that they go on with it."""
    mark = update(SweepTrial).where(SweepTrial.job_id.in_(job_ids)).values(is_paused=is_paused)
    session.execute(mark.execution_options(synchronize_session=False))


def finish_sweep(session: Session, sweep: Sweep) -> None:
    """Note that all jobs of a locked sweep have ended."""
    sweep.finished_at = now_plus(0)
    session.flush()


def trials_of(session: Session, sweep_id: str) -> list[tuple[SweepTrial, Job | None]]:
    """Return every planned job with its row, in order; None: it was deleted."""
    query = select(SweepTrial, Job).outerjoin(Job, Job.id == SweepTrial.job_id).where(SweepTrial.sweep_id == sweep_id)
    return [(trial, job) for trial, job in session.execute(query.order_by(SweepTrial.number, SweepTrial.repeat))]


def rungs_of(session: Session, sweep_id: str) -> list[SweepRung]:
    """Return what halving decided, in order of rungs."""
    query = select(SweepRung).where(SweepRung.sweep_id == sweep_id)
    return list(session.scalars(query.order_by(SweepRung.rung, SweepRung.number)))


def _to_release(rows: Sequence[Any], max_running: int | None) -> list[str]:
    """Return the held jobs that may be claimed now, in the order of the plan. A paused job leaves its place."""
    held = [row.id for row in rows if row.holds & holds.SWEEP and row.state == JobState.QUEUED]
    if max_running is None:
        return held
    num_going = sum(not row.holds & holds.SWEEP and (row.state != JobState.PAUSED or row.is_paused) for row in rows)
    return held[: max(0, max_running - num_going)]


def _open_sweep(session: Session, sweep_id: str, verb: str) -> Sweep:
    sweep = get_sweep(session, sweep_id, lock=True)
    if sweep.finished_at is not None:
        raise Conflict(f"sweep {sweep_id} has ended and cannot be {verb}")
    return sweep
