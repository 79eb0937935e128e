"""Somebody beats for an attempt from its claim on: first its worker, then its supervisor."""

import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime

import pytest

from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import claim, get_job, insert_job
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.settings import Settings
from apt_jobs.supervision import lease
from apt_jobs.supervision.lease import LeaseKeeper, kept_until_first_beat

DEADLINE_S = 60.0
SETTINGS = Settings(lease_s=6.0, heartbeat_s=0.05)


class Attempt:
    def __init__(self, database: Database) -> None:
        self.database = database
        with database.write() as session:
            self.job_id = insert_job(session, TrainSpec(kind="train")).id
            claim(session, self.job_id, "test", SETTINGS.lease_s)

    def lease_until(self) -> datetime:
        with self.database.read() as session:
            until = get_job(session, self.job_id).lease_until
        assert until is not None
        return until

    def waits_for_beats(self, number: int) -> None:
        for _ in range(number):
            before = self.lease_until()
            eventually(lambda: self.lease_until() > before)  # noqa: B023

    def is_silent(self) -> bool:
        before = self.lease_until()
        time.sleep(6 * SETTINGS.heartbeat_s)  # nothing to wait for
        return self.lease_until() == before


def eventually(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def attempt(sqlite_url: str) -> Iterator[Attempt]:
    database = Database(sqlite_url)
    yield Attempt(database)
    database.dispose()


def test_the_worker_beats_until_the_supervisor_does(attempt: Attempt) -> None:
    with kept_until_first_beat(attempt.database, SETTINGS, attempt.job_id, 1) as fd:
        of_supervisor = os.dup(fd)  # as a started process has it
    attempt.waits_for_beats(5)
    keeper = LeaseKeeper(
        *(attempt.database, attempt.job_id, 1), lease_s=SETTINGS.lease_s, heartbeat_s=3600.0, beating_fd=of_supervisor
    )
    with keeper:  # beats at once, and then not for an hour
        eventually(attempt.is_silent)


def test_the_worker_stops_when_the_supervisor_ends_before_it_could_beat(attempt: Attempt) -> None:
    with kept_until_first_beat(attempt.database, SETTINGS, attempt.job_id, 1) as fd:
        of_supervisor = os.dup(fd)
    attempt.waits_for_beats(2)
    os.close(of_supervisor)
    eventually(attempt.is_silent)


def test_the_worker_does_not_keep_an_attempt_whose_supervisor_never_starts(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "MAX_START_LEASES", 0.1)
    with kept_until_first_beat(attempt.database, SETTINGS, attempt.job_id, 1) as fd:
        of_supervisor = os.dup(fd)
    eventually(attempt.is_silent)
    os.close(of_supervisor)


def test_the_worker_stops_when_the_attempt_is_fenced(attempt: Attempt) -> None:
    with kept_until_first_beat(attempt.database, SETTINGS, attempt.job_id, 2) as fd:  # not the attempt that runs
        of_supervisor = os.dup(fd)
    assert attempt.is_silent()
    os.close(of_supervisor)
