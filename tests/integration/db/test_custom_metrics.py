"""Custom metrics as they are read in columns and read on, against the plainest way to read them."""

import math
import random
from datetime import UTC, datetime

import numpy as np

from apt_jobs.db.engine import Database
from apt_jobs.db.events import append_events
from apt_jobs.db.jobs import claim, finish, insert_job
from apt_jobs.db.series.custom_metrics import MetricLogs, custom_metrics
from apt_jobs.events.kinds import MetricsLogged
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.jobs.states import JobState

LEASE_S = 3600.0
Logged = tuple[int, MetricsLogged]  # attempt and event


def plainly(logged: list[Logged]) -> dict[str, dict[int, float]]:
    """Values by name and step: of the lowest rank, without what a later attempt does again."""
    found: dict[str, dict[int, float]] = {}
    for name in dict.fromkeys(name for _, event in logged for name in event.values):
        rank = min(event.rank for _, event in logged if name in event.values)
        attempt_of_last, by_step = 0, dict[int, float]()
        for attempt, event in logged:
            if name not in event.values or event.rank != rank:
                continue
            if attempt > attempt_of_last:
                by_step = {step: value for step, value in by_step.items() if step < event.step}
                attempt_of_last = attempt
            by_step[event.step] = float(event.values[name])
        found[name] = dict(sorted(by_step.items()))
    return found


def test_columns_say_the_same_as_the_events_while_they_are_appended(sqlite_url: str) -> None:
    database, chance, logs = Database(sqlite_url), random.Random(3), MetricLogs(1)
    with database.write() as session:
        job_id = insert_job(session, TrainSpec(kind="train", max_attempts=50)).id
    logged: list[Logged] = []
    for attempt in range(1, 8):
        first = chance.randrange(0, 30)
        events = []
        for step in range(first, first + 40):
            names = chance.sample(["a", "b", "c/d", "e"], chance.randint(1, 4))
            values = {name: chance.choice([1, 2.5, math.nan, math.inf, chance.random()]) for name in names}
            events.append(MetricsLogged(max(step - chance.choice([0, 0, 0, 3]), 0), chance.choice([0, 0, 1]), values))
        with database.write() as session:
            claim(session, job_id, "test", LEASE_S)
            append_events(session, job_id, attempt, [(datetime.now(UTC), event) for event in events], LEASE_S)
            finish(session, job_id, attempt, JobState.QUEUED, reason="again")
        logged += [(attempt, event) for event in events]
        expected = plainly(logged)
        with database.read() as session:
            whole, read_on = custom_metrics(session, job_id), logs.series(session, job_id, 0, 2**53)
            part = logs.series(session, job_id, 10, 20)
        for series in (whole, read_on):
            assert list(series) == list(expected)
            for name, points in expected.items():
                assert series[name].steps_N.tolist() == list(points)
                np.testing.assert_array_equal(series[name].values_N, list(points.values()))
        for name, metric in part.items():
            assert metric.steps_N.tolist() == [step for step in expected[name] if 10 <= step <= 20]
    database.dispose()


def test_only_the_jobs_that_were_asked_for_last_are_kept(sqlite_url: str) -> None:
    database, logs = Database(sqlite_url), MetricLogs(0)
    job_ids = []
    for value in (1.0, 2.0):
        with database.write() as session:
            job_id = insert_job(session, TrainSpec(kind="train")).id
            claim(session, job_id, "test", LEASE_S)
            append_events(session, job_id, 1, [(datetime.now(UTC), MetricsLogged(1, 0, {"a": value}))], LEASE_S)
        job_ids.append(job_id)
    with database.read() as session:
        for job_id, value in zip(job_ids * 2, (1.0, 2.0) * 2, strict=True):
            assert logs.series(session, job_id, 0, 9)["a"].last == value
            assert list(logs._logs) == [job_id]
    database.dispose()
