"""Limits and pauses of queues, drained workers and their names, on both dialects."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import event, update

from apt_jobs.db import jobs
from apt_jobs.db.clock import now_plus
from apt_jobs.db.engine import Database
from apt_jobs.db.models import Job
from apt_jobs.db.queues import configure_queue, list_queues, queues_with_due_jobs, require_place
from apt_jobs.db.transitions import locked_job
from apt_jobs.db.workers import record_worker, require_free_name, set_drained
from apt_jobs.errors import AlreadyRunning, NotFound, Unavailable
from apt_jobs.jobs.states import JobState
from tests.integration.db.steps import LEASE_S, claim, submit

WORKER: dict[str, Any] = {"name": "a", "kind": "train", "queues": ["train"], "hostname": "here", "version": "1"}


def record(database: Database, pid: int = 1, name: str = "a") -> bool:
    with database.write() as session:
        return record_worker(session, **{**WORKER, "name": name}, pid=pid, gpus=[], current_job_id=None)


def test_a_job_whose_row_is_locked_for_a_moment_is_claimed(database: Database) -> None:
    job_id = submit(database)
    is_locked = threading.Event()

    def steer() -> None:
        with database.write() as session:
            locked_job(session, job_id)
            is_locked.set()
            time.sleep(0.5)

    with ThreadPoolExecutor(1) as pool:
        steering = pool.submit(steer)
        is_locked.wait()
        assert claim(database).id == job_id
        steering.result()


def test_a_queue_runs_no_more_than_it_may(database: Database) -> None:
    with database.write() as session:
        configure_queue(session, "train", max_running=2, paused=False)
    for _ in range(10):
        submit(database)
    start = threading.Barrier(6)

    def take() -> int:
        start.wait()
        taken = 0
        for _ in range(5):
            with database.write() as session:
                taken += jobs.claim_next(session, "train", "worker", LEASE_S) is not None
        return taken

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(lambda _: take(), range(6))) == 2
    with database.read() as session:
        (queue,) = list_queues(session)
    assert (queue.queued, queue.running, queue.max_running) == (8, 2, 2)


def test_a_place_that_becomes_free_is_taken(database: Database) -> None:
    with database.write() as session:
        configure_queue(session, "train", max_running=1, paused=False)
    first, second = submit(database), submit(database)
    claim(database)
    with database.write() as session:
        assert jobs.claim_next(session, "train", "worker", LEASE_S) is None
        jobs.finish(session, first, 1, JobState.SUCCEEDED)
    assert claim(database).id == second


def test_a_paused_queue_hands_out_nothing_and_wakes_nobody(database: Database) -> None:
    job_id = submit(database)
    with database.write() as session:
        assert queues_with_due_jobs(session) == ["train"]
        assert configure_queue(session, "train", max_running=None, paused=True).is_paused
        assert queues_with_due_jobs(session) == []
        assert jobs.claim_next(session, "train", "worker", LEASE_S) is None
        assert not configure_queue(session, "train", max_running=None, paused=False).is_paused
        assert queues_with_due_jobs(session) == ["train"]
    assert claim(database).id == job_id


def test_only_queues_with_due_jobs_are_woken_each_once(database: Database) -> None:
    for queue in ("b", "a", "b", "c", "a"):
        submit(database, queue=queue)
    later = submit(database, queue="later")
    with database.write() as session:
        session.execute(update(Job).where(Job.id == later).values(not_before_at=now_plus(60)))
    claim(database, "c")
    with database.read() as session:
        assert queues_with_due_jobs(session) == ["a", "b"]


def test_the_limit_of_waiting_jobs_is_exact_near_it_and_not_counted_far_from_it(database: Database) -> None:
    submit(database)
    for _ in range(2):
        with database.write() as session:
            require_place(session, 2)
        with database.write() as session, pytest.raises(Unavailable, match="1 jobs wait already; at most 1"):
            require_place(session, 1)
    statements: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    for _ in range(3):
        with database.write() as session:
            require_place(session, 1_000_000)
    assert sum("count" in statement for statement in statements) == 1


def test_a_worker_hears_of_its_draining_until_somebody_ends_it(database: Database) -> None:
    assert not record(database)
    with database.write() as session:
        first = set_drained(session, "a", drained=True).drain_requested_at
        assert set_drained(session, "a", drained=True).drain_requested_at == first
    assert record(database)
    with database.write() as session:
        set_drained(session, "a", drained=False)
    assert not record(database)


def test_a_drained_worker_is_given_nothing_before_it_has_heard_of_it(database: Database) -> None:
    job_id = submit(database)
    record(database)
    record(database, name="b")
    with database.write() as session:
        set_drained(session, "a", drained=True)
        assert jobs.claim_next(session, "train", "a", LEASE_S) is None
        claimed = jobs.claim_next(session, "train", "b", LEASE_S)
    assert claimed is not None
    assert claimed.job.id == job_id


def test_a_worker_that_was_started_again_is_not_drained(database: Database) -> None:
    record(database)
    with database.write() as session:
        set_drained(session, "a", drained=True)
    assert not record(database, pid=2)


def test_nobody_drains_a_worker_that_is_not_known(database: Database) -> None:
    with pytest.raises(NotFound, match="no worker 'b'"), database.write() as session:
        set_drained(session, "b", drained=True)


def test_two_living_workers_do_not_share_a_name(database: Database) -> None:
    record(database, pid=os.getppid())
    with database.write() as session:
        with pytest.raises(AlreadyRunning, match=f"runs on here \\(process {os.getppid()}\\)"):
            require_free_name(session, "a", "here", 30.0)
        with pytest.raises(AlreadyRunning, match="wait 30 s"):
            require_free_name(session, "a", "elsewhere", 30.0)
        require_free_name(session, "b", "here", 30.0)


def test_of_workers_that_start_at_once_with_one_name_one_gets_it(database: Database) -> None:
    record(database, pid=2**22 + 1)  # of a process that died: two may think that its name is theirs
    for name in ("a", *(f"new {number}" for number in range(20))):  # known, and new
        together = threading.Barrier(4)

        def start(number: int, name: str = name, together: threading.Barrier = together) -> bool:
            together.wait()
            try:
                with database.write() as session:
                    require_free_name(session, name, "here" if name == "a" else f"host-{number}", 30.0)
                    values = {**WORKER, "name": name, "hostname": f"host-{number}"}
                    record_worker(session, **values, pid=number, gpus=[], current_job_id=None)
            except AlreadyRunning:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(start, range(1, 5))) == 1


def test_the_name_of_a_dead_process_of_this_machine_is_free(database: Database) -> None:
    record(database, pid=2**22 + 1)  # above the largest pid of Linux
    with database.write() as session:
        require_free_name(session, "a", "here", 30.0)
