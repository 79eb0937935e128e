"""Schedules: due times claimed in the database, so that several web processes never miss or double one.

A due time is fired in one transaction: the schedule's row is locked, the run is inserted under (schedule, due time) as
its primary key, the job is inserted, and `next_due_at` moves on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import takewhile
from typing import Any, Literal

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.jobs import insert_job
from apt_jobs.db.models import Job, Schedule, ScheduleRun
from apt_jobs.db.steering import request_cancel
from apt_jobs.db.webhook_outbox import enqueue_missed
from apt_jobs.errors import InvalidInput, NotFound, OutOfSpace, Unavailable
from apt_jobs.events.kinds import StoredEvent
from apt_jobs.jobs.cron import due_after, next_due, require_due
from apt_jobs.jobs.ids import new_schedule_id
from apt_jobs.jobs.spec import GenerateSpec, TrainSpec, parse_spec
from apt_jobs.jobs.states import TERMINAL_STATES

ON_TIME_S = 60.0  # a due time fired within so long is not a missed one
MAX_CAUGHT_UP = 100  # due times of one schedule that are fired or noted in one go: the newest
CATCH_UP_WINDOW = timedelta(days=7)  # of due times after the first missed one, older ones are not looked at
MAX_RUNS = 1_000  # kept for each schedule
MAX_SCHEDULES = 1_000
Check = Callable[[Session, TrainSpec | GenerateSpec], None]  # raises an `AptJobsError` when a job is not to be inserted


@dataclass(frozen=True, slots=True)
class ScheduleValues:
    """What users set of a schedule."""

    name: str
    cron: str
    time_zone: str
    spec: TrainSpec | GenerateSpec
    overlap: Literal["skip", "queue", "cancel"]
    catch_up: Literal["skip", "latest", "all"]
    paused: bool

    def columns(self, now: datetime) -> dict[str, Any]:
        """Raise `InvalidInput` for a schedule that never comes due."""
        return {
            "name": self.name,
            "cron": self.cron,
            "time_zone": self.time_zone,
            "spec": self.spec.model_dump(mode="json"),
            "overlap": self.overlap,
            "catch_up": self.catch_up,
            "next_due_at": require_due(self.cron, self.time_zone, now)[0],
        }


@dataclass(frozen=True, slots=True)
class Fired:
    """Jobs that `fire_due` made, and events of those that it cancelled for them."""

    jobs: list[Job]
    events: list[StoredEvent]


def database_now(session: Session) -> datetime:
    """Return the database's clock, which schedules go by."""
    now: datetime = session.scalars(select(now_plus(0))).one()
    return now


def create_schedule(session: Session, values: ScheduleValues) -> Schedule:
    """Add a schedule, due from now on.

    Raises:
        InvalidInput: its expression or zone is wrong, or there are too many schedules.
    """
    if len(session.scalars(select(Schedule.id).limit(MAX_SCHEDULES)).all()) >= MAX_SCHEDULES:
        raise InvalidInput(f"there are {MAX_SCHEDULES} schedules already; delete one")
    now = database_now(session)
    schedule = Schedule(id=new_schedule_id(), **values.columns(now), paused_at=now if values.paused else None)
    session.add(schedule)
    session.flush()
    return schedule


def get_schedule(session: Session, schedule_id: str, *, lock: bool = False) -> Schedule:
    """Return the row as it is now.

    Raises:
        NotFound: there is no such schedule.
    """
    schedule = session.get(Schedule, schedule_id, populate_existing=True, with_for_update=lock or None)
    if schedule is None:
        raise NotFound(f"no schedule {schedule_id!r}")
    return schedule


def list_schedules(session: Session) -> list[Schedule]:
    """Return all schedules, by name."""
    return list(session.scalars(select(Schedule).order_by(Schedule.name, Schedule.id)))


def change_schedule(session: Session, schedule_id: str, values: ScheduleValues) -> Schedule:
    """Replace what users set; due times are counted from now.

    Raises:
        NotFound, InvalidInput: as above.
    """
    schedule = get_schedule(session, schedule_id, lock=True)
    now = database_now(session)
    for name, value in values.columns(now).items():
        setattr(schedule, name, value)
    schedule.paused_at = (schedule.paused_at or now) if values.paused else None
    session.flush()
    return schedule


def pause_schedule(session: Session, schedule_id: str, *, paused: bool) -> Schedule:
    """Stop or go on firing. What was due while it was paused is not caught up. Idempotent.

    Raises:
        NotFound: there is no such schedule.
    """
    schedule = get_schedule(session, schedule_id, lock=True)
    now = database_now(session)
    if paused:
        schedule.paused_at = schedule.paused_at or now
    elif schedule.paused_at is not None:
        schedule.paused_at = None
        schedule.next_due_at = next_due(schedule.cron, schedule.time_zone, now)
    session.flush()
    return schedule


def delete_schedule(session: Session, schedule_id: str) -> None:
    """Remove a schedule and its history; its jobs stay.

    Raises:
        NotFound: there is no such schedule.
    """
    get_schedule(session, schedule_id, lock=True)
    session.execute(delete(Schedule).where(Schedule.id == schedule_id).execution_options(synchronize_session=False))


def last_runs(session: Session, schedule_id: str, limit: int) -> list[tuple[ScheduleRun, str | None]]:
    """Return the newest `limit` runs of a schedule with the states of their jobs, newest first."""
    query = (
        select(ScheduleRun, Job.state)
        .outerjoin(Job, Job.id == ScheduleRun.job_id)
        .where(ScheduleRun.schedule_id == schedule_id)
        .order_by(ScheduleRun.due_at.desc())
        .limit(limit)
    )
    return [(run, state) for run, state in session.execute(query)]


def run_now(session: Session, schedule_id: str, max_queued_jobs: int, check: Check | None = None) -> Job:
    """Submit the schedule's job at once, whatever its overlap policy says: somebody asked for it.

    Raises:
        NotFound: there is no such schedule.
        Unavailable: too many jobs wait.
        AptJobsError: what `check` says against the job.
    """
    schedule = get_schedule(session, schedule_id, lock=True)
    spec = parse_spec(schedule.spec)
    if check is not None:
        check(session, spec)
    job = insert_job(session, spec, max_queued_jobs=max_queued_jobs, schedule_id=schedule.id)
    now = database_now(session)
    session.add(ScheduleRun(schedule_id=schedule.id, due_at=now, outcome="submitted", job_id=job.id, reason="run now"))
    session.flush()
    return job


def has_due(session: Session) -> bool:
    """Return whether any schedule is due: a cheap look before `fire_due`."""
    query = select(Schedule.id).where(Schedule.paused_at.is_(None), Schedule.next_due_at <= now_plus(0)).limit(1)
    return session.scalar(query) is not None


def fire_due(session: Session, max_queued_jobs: int, check: Check | None = None) -> Fired:
    """Fire every due time that has come. Any process may call it at any time. What `check` is against is refused."""
    due = session.scalars(
        select(Schedule)
        .where(Schedule.paused_at.is_(None), Schedule.next_due_at <= now_plus(0))
        .order_by(Schedule.next_due_at, Schedule.id)
        .limit(100)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    ).all()
    fired = Fired([], [])
    for schedule in due:
        _fire(session, schedule, max_queued_jobs, check, fired)
    return fired


def _fire(session: Session, schedule: Schedule, max_queued_jobs: int, check: Check | None, fired: Fired) -> None:
    now = database_now(session)
    assert schedule.next_due_at is not None  # the query asks for it
    since = max(schedule.next_due_at, now - CATCH_UP_WINDOW)
    later = due_after(schedule.cron, schedule.time_zone, since)
    times = [schedule.next_due_at, *takewhile(lambda time: time <= now, later)][-MAX_CAUGHT_UP:]
    chosen = set(_chosen(times, now, schedule.catch_up))
    missed = list[datetime]()
    for time in times:
        if time in chosen:
            _submit(session, schedule, time, max_queued_jobs, check, fired)
        elif _record(session, schedule, time, "missed", reason=_why_missed(schedule, now, time)):
            missed.append(time)
    if missed:
        enqueue_missed(session, schedule, "missed", missed, _why_missed(schedule, now, missed[0]))
    schedule.next_due_at = next_due(schedule.cron, schedule.time_zone, now)
    session.flush()
    _forget_old_runs(session, schedule.id)


def _why_missed(schedule: Schedule, now: datetime, time: datetime) -> str:
    return f"noticed {(now - time).total_seconds():,.0f} s late; catch_up={schedule.catch_up}"


def _chosen(times: Sequence[datetime], now: datetime, catch_up: str) -> Sequence[datetime]:
    """Return the due times to submit a job for; the others were missed."""
    if catch_up == "all":
        return times
    if catch_up == "latest":
        return times[-1:]
    return [time for time in times if now - time <= timedelta(seconds=ON_TIME_S)]


def _submit(
    session: Session,
    schedule: Schedule,
    due_at: datetime,
    max_queued_jobs: int,
    check: Check | None,
    fired: Fired,
) -> None:
    if (known := session.get(ScheduleRun, (schedule.id, due_at))) is not None:
        assert known.outcome  # fired before the schedule was changed: once is enough
        return
    open_jobs = _open_jobs(session, schedule.id)
    if open_jobs and schedule.overlap == "skip":
        _record(session, schedule, due_at, "skipped", reason=f"job {open_jobs[0]} of an earlier run has not ended")
        return
    try:
        spec = parse_spec(schedule.spec)
        if check is not None:
            check(session, spec)
    except (InvalidInput, OutOfSpace) as exc:
        _refuse(session, schedule, due_at, str(exc))
        return
    if schedule.overlap == "cancel":
        for job_id in open_jobs:
            fired.events.extend(request_cancel(session, job_id, f"replaced by the run due at {due_at:%F %H:%M} UTC")[1])
    try:
        job = insert_job(session, spec, max_queued_jobs=max_queued_jobs, schedule_id=schedule.id)
    except Unavailable as exc:
        _refuse(session, schedule, due_at, str(exc))
        return
    _record(session, schedule, due_at, "submitted", job_id=job.id)
    fired.jobs.append(job)


def _open_jobs(session: Session, schedule_id: str) -> list[str]:
    query = select(Job.id).where(Job.schedule_id == schedule_id, Job.state.not_in(TERMINAL_STATES))
    return list(session.scalars(query.order_by(Job.id)))


def _refuse(session: Session, schedule: Schedule, due_at: datetime, reason: str) -> None:
    if _record(session, schedule, due_at, "refused", reason=reason):
        enqueue_missed(session, schedule, "refused", [due_at], reason)


def _record(session: Session, schedule: Schedule, due_at: datetime, outcome: str, **fields: str) -> bool:
    """Note what became of a due time; False: it was noted before."""
    if session.get(ScheduleRun, (schedule.id, due_at)) is not None:
        return False
    session.add(ScheduleRun(schedule_id=schedule.id, due_at=due_at, outcome=outcome, **fields))
    session.flush()
    return True


def _forget_old_runs(session: Session, schedule_id: str) -> None:
    oldest = (
        select(ScheduleRun.due_at)
        .where(ScheduleRun.schedule_id == schedule_id)
        .order_by(ScheduleRun.due_at.desc())
        .offset(MAX_RUNS)
        .limit(1)
    )
    limit = session.scalar(oldest)
    if limit is not None:
        old = delete(ScheduleRun).where(ScheduleRun.schedule_id == schedule_id, ScheduleRun.due_at <= limit)
        session.execute(old.execution_options(synchronize_session=False))
