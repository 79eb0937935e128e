"""Limits and pauses of queues, drained workers and their names, on both dialects."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from apt_jobs.db import dispatch, jobs
from apt_jobs.db.engine import Database
from apt_jobs.db.queues import configure_queue, list_queues
from apt_jobs.db.workers import record_worker, require_free_name, set_drained
from apt_jobs.errors import AlreadyRunning, NotFound
from apt_jobs.jobs.states import JobState
from tests.integration.db.steps import LEASE_S, claim, submit

WORKER: dict[str, Any] = {"name": "a", "kind": "train", "queues": ["train"], "hostname": "here", "version": "1"}


def record(database: Database, pid: int = 1, name: str = "a") -> bool:
    with database.write() as session:
        return record_worker(session, **{**WORKER, "name": name}, pid=pid, gpus=[], current_job_id=None)


def test_a_job_whose_hint_is_being_noted_is_claimed(database: Database) -> None:
    """The hint may be faster than the row that says that it was sent; it comes once."""
    job_id = submit(database)
    is_locked = threading.Event()

    def note() -> None:
        with database.write() as session:
            dispatch.mark_dispatched(session, [job_id])
            session.flush()
            is_locked.set()
            time.sleep(0.5)

    with ThreadPoolExecutor(1) as pool:
        noting = pool.submit(note)
        is_locked.wait()
        assert claim(database).id == job_id
        noting.result()


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


def test_a_paused_queue_hands_out_nothing_and_then_its_hints_again(database: Database) -> None:
    job_id = submit(database)
    with database.write() as session:
        dispatch.mark_dispatched(session, [job_id])
        assert configure_queue(session, "train", max_running=None, paused=True).is_paused
        assert jobs.claim_next(session, "train", "worker", LEASE_S) is None
    with database.write() as session:
        dispatch.mark_dispatched(session, [job_id])
    with database.write() as session:
        assert not configure_queue(session, "train", max_running=None, paused=False).is_paused
        assert dispatch.jobs_to_dispatch(session) == [(job_id, "train")]
    assert claim(database).id == job_id


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
