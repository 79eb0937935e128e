"""Due times on both dialects: each fires once, whoever looks and however late; overlap and catch-up are the user's."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import delete, select, update

from apt_jobs.db import jobs, schedules
from apt_jobs.db.engine import Database
from apt_jobs.db.models import Job, Schedule, ScheduleRun
from apt_jobs.errors import InvalidInput, NotFound
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.jobs.states import JobState
from tests.integration.db.steps import claim, state_of

MINUTE = (datetime.now(UTC).minute + 30) % 60  # of hourly due times: far from now, however long the tests take
HOURLY = schedules.ScheduleValues(
    "nightly", f"{MINUTE} * * * *", "UTC", TrainSpec(kind="train"), "queue", "latest", paused=False
)
MAX_QUEUED = 100


def create(database: Database, **changes: object) -> str:
    with database.write() as session:
        return schedules.create_schedule(session, replace(HOURLY, **changes)).id  # type: ignore[arg-type]  # test values


def set_due(database: Database, schedule_id: str, ago: timedelta) -> datetime:
    """Let the next due time be the hourly one before `ago`."""
    latest = datetime.now(UTC) - ago
    due = latest.replace(minute=MINUTE, second=0, microsecond=0)
    due -= timedelta(hours=due > latest)
    with database.write() as session:
        session.execute(update(Schedule).where(Schedule.id == schedule_id).values(next_due_at=due))
    return due


def fire(database: Database, max_queued_jobs: int = MAX_QUEUED) -> list[str]:
    with database.write() as session:
        return [job.id for job in schedules.fire_due(session, max_queued_jobs).jobs]


def runs(database: Database, schedule_id: str) -> list[ScheduleRun]:
    with database.read() as session:
        return [run for run, _ in schedules.last_runs(session, schedule_id, 1000)]


def outcomes(database: Database, schedule_id: str) -> list[str]:
    return [run.outcome for run in runs(database, schedule_id)]


def test_a_due_time_makes_one_job_and_moves_on(database: Database) -> None:
    schedule_id = create(database)
    assert fire(database) == []
    due = set_due(database, schedule_id, timedelta(0))
    (job_id,) = fire(database)
    assert fire(database) == []
    (run,) = runs(database, schedule_id)
    assert (run.due_at, run.outcome, run.job_id) == (due, "submitted", job_id)
    with database.read() as session:
        assert schedules.get_schedule(session, schedule_id).next_due_at == due + timedelta(hours=1)
        assert jobs.get_job(session, job_id).schedule_id == schedule_id


def test_many_processes_fire_each_due_time_once(database: Database) -> None:
    ids = [create(database, name=str(number)) for number in range(5)]
    start = threading.Barrier(8)
    for _ in range(4):
        for schedule_id in ids:
            set_due(database, schedule_id, timedelta(0))
            with database.write() as session:
                session.execute(delete(ScheduleRun))

        def look(_: int) -> list[str]:
            start.wait()
            return fire(database)

        with ThreadPoolExecutor(8) as pool:
            fired = [job_id for found in pool.map(look, range(8)) for job_id in found]
        assert len(fired) == len(set(fired)) == 5


def test_a_clock_that_jumps_back_fires_nothing_twice(database: Database) -> None:
    schedule_id = create(database)
    due = set_due(database, schedule_id, timedelta(0))
    assert len(fire(database)) == 1
    with database.write() as session:  # as if the due time were computed again from an earlier now
        session.execute(update(Schedule).values(next_due_at=due))
    assert fire(database) == []
    assert outcomes(database, schedule_id) == ["submitted"]


@pytest.mark.parametrize(
    ("catch_up", "expected"),
    [
        ("latest", ["submitted", "missed", "missed", "missed"]),
        ("all", ["submitted"] * 4),
        ("skip", ["missed"] * 4),
    ],
)
def test_missed_due_times_are_the_policys(database: Database, catch_up: str, expected: list[str]) -> None:
    schedule_id = create(database, catch_up=catch_up)
    set_due(database, schedule_id, timedelta(hours=3))
    fire(database)
    assert outcomes(database, schedule_id) == expected


def test_a_due_time_of_a_moment_ago_is_not_a_missed_one(database: Database) -> None:
    schedule_id = create(database, catch_up="skip")
    with database.write() as session:
        session.execute(update(Schedule).values(next_due_at=datetime.now(UTC) - timedelta(seconds=5)))
    assert len(fire(database)) == 1
    assert outcomes(database, schedule_id) == ["submitted"]


def test_a_year_of_missed_minutes_is_bounded(database: Database) -> None:
    schedule_id = create(database, cron="* * * * *", catch_up="all")
    set_due(database, schedule_id, timedelta(days=365))
    assert len(fire(database, max_queued_jobs=20)) == 20
    found = outcomes(database, schedule_id)
    assert (len(found), found.count("refused")) == (schedules.MAX_CAUGHT_UP, 80)


def test_a_due_time_long_ago_is_still_caught_up(database: Database) -> None:
    schedule_id = create(database, cron="@monthly")
    due = (datetime.now(UTC) - timedelta(days=20)).replace(second=0, microsecond=0)
    with database.write() as session:
        session.execute(update(Schedule).values(next_due_at=due))
    assert len(fire(database)) == 1
    assert runs(database, schedule_id)[0].outcome == "submitted"


@pytest.mark.parametrize(
    ("overlap", "expected", "states"),
    [
        ("skip", "skipped", ["running"]),
        ("queue", "submitted", ["queued", "running"]),
        ("cancel", "submitted", ["queued", "running"]),
    ],
)
def test_overlap_with_a_running_job_is_the_policys(
    database: Database, overlap: str, expected: str, states: list[str]
) -> None:
    schedule_id = create(database, overlap=overlap)
    set_due(database, schedule_id, timedelta(0))
    fire(database)
    first = claim(database)
    set_due(database, schedule_id, timedelta(0))
    with database.write() as session:
        session.execute(update(ScheduleRun).values(due_at=datetime(2026, 1, 1, tzinfo=UTC)))
    fire(database)
    assert outcomes(database, schedule_id)[0] == expected
    with database.read() as session:
        assert sorted(session.scalars(select(Job.state))) == states
        cancelled = jobs.get_job(session, first.id).cancel_requested_at is not None
    assert cancelled == (overlap == "cancel")


def test_a_full_queue_refuses_in_words(database: Database) -> None:
    schedule_id = create(database)
    set_due(database, schedule_id, timedelta(0))
    assert fire(database, max_queued_jobs=0) == []
    (run,) = runs(database, schedule_id)
    assert (run.outcome, "jobs wait already" in (run.reason or "")) == ("refused", True)


def test_a_paused_schedule_catches_nothing_up(database: Database) -> None:
    schedule_id = create(database, paused=True)
    set_due(database, schedule_id, timedelta(hours=5))
    assert fire(database) == []
    with database.write() as session:
        schedules.pause_schedule(session, schedule_id, paused=True)
        resumed = schedules.pause_schedule(session, schedule_id, paused=False)
        assert resumed.next_due_at is not None
        assert resumed.next_due_at > datetime.now(UTC) - timedelta(seconds=1)
    assert fire(database) == []


def test_run_now_makes_a_job_whatever_runs(database: Database) -> None:
    schedule_id = create(database, overlap="skip")
    with database.write() as session:
        first = schedules.run_now(session, schedule_id, MAX_QUEUED)
    with database.write() as session:
        second = schedules.run_now(session, schedule_id, MAX_QUEUED)
    assert first.id != second.id
    assert outcomes(database, schedule_id) == ["submitted", "submitted"]


def test_a_changed_schedule_is_due_by_its_new_expression(database: Database) -> None:
    schedule_id = create(database)
    with database.write() as session:
        changed = schedules.change_schedule(session, schedule_id, replace(HOURLY, cron="30 3 * * *", name="new"))
    assert changed.next_due_at is not None
    assert (changed.name, changed.next_due_at.hour, changed.next_due_at.minute) == ("new", 3, 30)


def test_a_deleted_schedule_leaves_its_jobs(database: Database) -> None:
    schedule_id = create(database)
    set_due(database, schedule_id, timedelta(0))
    (job_id,) = fire(database)
    with database.write() as session:
        schedules.delete_schedule(session, schedule_id)
    assert state_of(database, job_id) == JobState.QUEUED
    with pytest.raises(NotFound, match=schedule_id), database.write() as session:
        schedules.delete_schedule(session, schedule_id)


def test_a_schedule_that_never_comes_due_is_refused(database: Database) -> None:
    for values in (replace(HOURLY, cron="0 0 30 2 *"), replace(HOURLY, time_zone="Mars/Olympus")):
        with pytest.raises(InvalidInput), database.write() as session:
            schedules.create_schedule(session, values)


def test_old_runs_are_forgotten(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "MAX_RUNS", 3)
    schedule_id = create(database, cron="* * * * *", catch_up="all")
    set_due(database, schedule_id, timedelta(hours=2))
    fire(database)
    assert len(runs(database, schedule_id)) == 3
