"""Attempts that end by a fault, on real databases: what is counted, tried again, given up, and reaped once."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import update

from apt_jobs.db import jobs
from apt_jobs.db.clock import now_plus
from apt_jobs.db.engine import Database
from apt_jobs.db.models import Job
from apt_jobs.db.queues import queues_with_due_jobs
from apt_jobs.jobs.retry import Fault
from apt_jobs.jobs.states import JobState
from tests.integration.db.steps import (
    LEASE_S,
    claim,
    due_now,
    job_of,
    lose_worker,
    running,
    saved,
    state_of,
    store,
    submit,
)


def test_the_reaper_leaves_the_living_alone(database: Database) -> None:
    job_id = submit(database)
    claim(database)
    with database.write() as session:
        assert jobs.reap_expired(session, 0) == []
    assert state_of(database, job_id) == "running"


def break_attempt(database: Database, job_id: str) -> None:
    """End the current attempt by the job's own fault; the back-off passes."""
    with database.write() as session:
        jobs.finish_faulted(session, job_id, jobs.get_job(session, job_id).attempt, "a rank died", fault=Fault.JOB)
        due_now(session, job_id)


def test_a_poison_job_is_given_up_after_three_attempts_without_a_checkpoint(database: Database) -> None:
    job_id = submit(database, max_attempts=50)
    for _ in range(3):
        claim(database)
        break_attempt(database, job_id)
    job = job_of(database, job_id)
    assert job.state == "dead"
    assert job.reason is not None
    assert "3 in a row without a new checkpoint" in job.reason


def test_lost_workers_do_not_use_up_the_attempts_of_a_job(database: Database) -> None:
    job_id = submit(database, max_attempts=1)
    for _ in range(9):
        claim(database)
        lose_worker(database, job_id)
        assert state_of(database, job_id) == "queued"
    counts = job_of(database, job_id)
    assert (counts.num_infrastructure_faults, counts.num_job_faults) == (9, 0)
    claim(database)
    lose_worker(database, job_id)
    ended = job_of(database, job_id)
    assert (ended.state, "10 infrastructure faults in a row" in (ended.reason or "")) == ("dead", True)


def test_a_checkpoint_begins_the_count_of_infrastructure_faults_again(database: Database) -> None:
    job_id = submit(database)
    for number in range(12):
        job = claim(database)
        if number % 6 == 5:
            store(database, job, saved(f"c{number}", step=number))
        lose_worker(database, job_id)
        assert state_of(database, job_id) == "queued"


def test_a_requeued_job_waits_out_its_pause(database: Database) -> None:
    job_id = submit(database)
    job = claim(database)
    with database.write() as session:
        jobs.finish(session, job_id, job.attempt, JobState.QUEUED, reason="drained", retry_in_s=0.3)
    with database.write() as session:
        assert jobs.claim(session, job_id, "worker-b", LEASE_S) is None
        assert queues_with_due_jobs(session) == []
    deadline = time.monotonic() + 10
    again = None
    while again is None and time.monotonic() < deadline:
        with database.write() as session:
            again = jobs.claim(session, job_id, "worker-b", LEASE_S)
    assert again is not None
    assert again.job.attempt == 2


def test_drained_attempts_do_not_count_as_failures(database: Database) -> None:
    job_id = submit(database, max_attempts=2)
    for _ in range(4):
        job = claim(database)
        with database.write() as session:
            jobs.finish(session, job_id, job.attempt, JobState.QUEUED, reason="drained")
    claim(database)
    break_attempt(database, job_id)
    assert state_of(database, job_id) == "queued"
    claim(database)
    break_attempt(database, job_id)
    ended = job_of(database, job_id)
    assert (ended.state, ended.attempt, ended.num_job_faults) == ("dead", 6, 2)


def test_progress_between_faults_keeps_a_job_alive_up_to_max_attempts(database: Database) -> None:
    job_id = submit(database, max_attempts=5)
    for number in range(5):
        job = claim(database)
        store(database, job, saved(f"c{number}", step=number))
        break_attempt(database, job_id)
        assert state_of(database, job_id) == ("queued" if number < 4 else "dead")


def test_a_broken_attempt_is_tried_again_after_a_pause_with_its_error_shown(database: Database) -> None:
    job = running(database)
    with database.write() as session:
        jobs.finish_faulted(session, job.id, 1, "torchrun was killed", {"message": "killed", "traceback": "tail"})
        assert jobs.claim(session, job.id, "worker-b", LEASE_S) is None
    again = job_of(database, job.id)
    assert again.reason == "torchrun was killed; trying again in 5 s"
    assert again.error == {"message": "killed", "traceback": "tail", "rank": None}
    assert again.lease_owner is None
    pause_s = (again.not_before_at - again.created_at).total_seconds()
    assert 4.9 < pause_s < 60


def test_the_reaper_takes_a_lost_job_once_however_many_reap(database: Database) -> None:
    wanted = {running(database).id for _ in range(6)}
    with database.write() as session:
        session.execute(update(Job).values(lease_until=now_plus(-3600)))
    start = threading.Barrier(4)

    def reap(_: int) -> list[str]:
        start.wait()
        with database.write() as session:
            return [event.job_id for event in jobs.reap_expired(session, 0)]

    with ThreadPoolExecutor(4) as pool:
        reaped = [job_id for part in pool.map(reap, range(4)) for job_id in part]
    assert sorted(reaped) == sorted(wanted)


def test_the_reaper_waits_for_the_grace(database: Database) -> None:
    job = running(database)
    with database.write() as session:
        assert not jobs.has_expired(session)
        session.execute(update(Job).values(lease_until=now_plus(-20)))
        assert jobs.has_expired(session)
        assert jobs.reap_expired(session, grace_s=30) == []
        assert [event.job_id for event in jobs.reap_expired(session, grace_s=10)] == [job.id]
