"""Gangs on both dialects: all nodes or none, whoever claims at once; bad and unfit nodes are left out."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import func, select, update

from apt_jobs.db import jobs
from apt_jobs.db.clock import now_plus
from apt_jobs.db.engine import Database
from apt_jobs.db.gangs import Pool, gang_of, share_of
from apt_jobs.db.models import GangShare, Job, WorkerRow
from apt_jobs.db.placements import Packing, choose, claim_fitting
from apt_jobs.db.preemptions import plan_preemptions
from apt_jobs.db.workers import pause_worker, record_worker, set_drained
from apt_jobs.jobs.needs import Needs
from apt_jobs.jobs.packing import Held, Offer, Room, RoomReport
from apt_jobs.jobs.preemption import PreemptionRules
from apt_jobs.jobs.states import JobState
from apt_jobs.operations.waiting import waiting_of
from tests.integration.db.steps import LEASE_S, lose_worker, submit

POOL = Pool("gpu", alive_within_s=30.0)


def record(database: Database, *names: str, kind: str = "node", pool: str = "gpu", cpus: int = 4) -> None:
    row: dict[str, Any] = {"hostname": "host", "pid": 1, "version": "1", "gpus": [], "current_job_id": None}
    room = RoomReport(cpus, 8.0, 1, 4, 9 if kind == "train" else 1, ()).as_document()
    with database.write() as session:
        for name in names:
            queues = ["train"] if kind == "train" else []
            record_worker(session, name=name, kind=kind, queues=queues, pool=pool, room=room, **row)


def lead(worker: str) -> Packing:
    offer = Offer(cpus=4, memory_gb=8.0, max_jobs=16, num_nodes=9)
    return Packing(worker, "train", Room(offer), now_s=0.0, reserve_after_s=300.0, pool=POOL)


def claim(database: Database, worker: str = "lead") -> str | None:
    with database.write() as session:
        claimed = claim_fitting(session, ["train"], lead(worker), LEASE_S)
    return None if claimed is None else claimed.job.id


def gang(database: Database, job_id: str, attempt: int = 1) -> list[str]:
    with database.read() as session:
        return gang_of(session, job_id, attempt)


def num_shares(database: Database) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(GangShare)) or 0


def test_a_gang_takes_any_free_nodes_with_the_claim(database: Database) -> None:
    record(database, "n1", "n2", "n3")
    first, second = (submit(database, num_ranks=2, num_nodes=2) for _ in range(2))
    assert [claim(database, "lead-a"), claim(database, "lead-b")] == [first, second]
    assert (gang(database, first), gang(database, second)) == (["n1"], ["n2"])
    with database.read() as session:
        share = share_of(session, "n2")
        assert share is not None
        assert (share.job_id, share.attempt, share.node_rank) == (second, 1, 1)
        assert share_of(session, "n3") is None


def test_too_few_nodes_are_left_to_others_and_the_job_says_why(database: Database) -> None:
    record(database, "n1", "n2")
    record(database, "lead", kind="train")
    large = submit(database, num_ranks=4, num_nodes=4, priority=5)
    small = submit(database, num_ranks=3, num_nodes=3)
    assert claim(database) == small
    with database.read() as session:
        assert choose(session, ["train"], lead("lead")).startable == []
        found = waiting_of(session, jobs.get_job(session, large), 30.0)
    assert found is not None
    assert "lead: 0 nodes of the pool 'gpu' are free and suit, the job takes 3 of them" in found.reason


def test_workers_that_claim_gangs_at_once_never_hold_half_of_one(database: Database) -> None:
    record(database, *(f"node-{number:02d}" for number in range(11)))
    submitted = [submit(database, num_ranks=size, num_nodes=size) for size in (3, 4, 5, 3, 4, 5, 3, 4)]
    start = threading.Barrier(6)

    def take(number: int) -> list[str]:
        start.wait()
        taken = [claim(database, f"lead-{number}-{turn}") for turn in range(3)]
        return [job_id for job_id in taken if job_id is not None]

    with ThreadPoolExecutor(6) as pool:
        taken = [job_id for part in pool.map(take, range(6)) for job_id in part]
    assert len(taken) == len(set(taken)) >= 3
    with database.read() as session:
        sizes = {job_id: jobs.get_job(session, job_id).spec["num_nodes"] for job_id in submitted}
        members = [name for job_id in taken for name in gang_of(session, job_id, 1)]
        free = POOL.free_nodes(session, Needs(num_nodes=2))
    assert all(len(gang(database, job_id)) == sizes[job_id] - 1 for job_id in taken)
    assert len(members) == len(set(members)) == num_shares(database)
    waiting = [sizes[job_id] - 1 for job_id in submitted if job_id not in taken]
    assert all(size > len(free) for size in waiting)  # what could start has


def dead(database: Database) -> None:
    with database.write() as session:
        session.execute(update(WorkerRow).where(WorkerRow.name == "n1").values(heartbeat_at=now_plus(-60)))


def failed_lately(database: Database) -> None:
    with database.write() as session:
        pause_worker(session, "n1", "n1 ended early", 60.0)


def drained(database: Database) -> None:
    with database.write() as session:
        set_drained(session, "n1", drained=True)


def too_small(database: Database) -> None:
    record(database, "n1", cpus=1)


def of_another_pool(database: Database) -> None:
    record(database, "n1", pool="other")


@pytest.mark.parametrize("situation", [dead, failed_lately, drained, too_small, of_another_pool])
def test_a_node_that_cannot_is_left_out(sqlite_database: Database, situation: Callable[[Database], None]) -> None:
    record(sqlite_database, "n1", "n2")
    situation(sqlite_database)
    job_id = submit(sqlite_database, num_ranks=2, num_nodes=2, resources={"cpus": 2})
    assert claim(sqlite_database) == job_id
    assert gang(sqlite_database, job_id) == ["n2"]
    assert submit(sqlite_database, num_ranks=2, num_nodes=2, resources={"cpus": 2})
    assert claim(sqlite_database, "lead-b") is None


@pytest.mark.parametrize("outcome", [JobState.SUCCEEDED, JobState.FAILED, JobState.QUEUED, None])
def test_nodes_are_free_when_the_attempt_ends_however_it_does(
    sqlite_database: Database, outcome: JobState | None
) -> None:
    record(sqlite_database, "n1")
    job_id = submit(sqlite_database, num_ranks=2, num_nodes=2)
    assert claim(sqlite_database) == job_id
    if outcome is None:
        lose_worker(sqlite_database, job_id)
    else:
        with sqlite_database.write() as session:
            jobs.finish(session, job_id, 1, outcome)
    assert num_shares(sqlite_database) == 0
    with sqlite_database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(state="queued", not_before_at=now_plus(-1)))
    assert claim(sqlite_database, "lead-b") == job_id
    assert gang(sqlite_database, job_id, 2) == ["n1"]


def test_a_job_of_one_node_needs_none_of_the_pool(sqlite_database: Database) -> None:
    record(sqlite_database, "n1")
    job_id = submit(sqlite_database)
    assert claim(sqlite_database) == job_id
    assert (gang(sqlite_database, job_id), num_shares(sqlite_database)) == ([], 0)


def test_nothing_yields_to_a_gang_that_lacks_nodes(sqlite_database: Database) -> None:
    record(sqlite_database, "n1")
    victim = submit(sqlite_database, num_ranks=4)
    assert claim(sqlite_database) == victim
    report = RoomReport(4, 8.0, 16, 4, 9, ((victim, Held(cpus=4)),))
    urgent = submit(sqlite_database, num_ranks=3, num_nodes=3, priority=5)
    with sqlite_database.write() as session:
        session.execute(update(Job).where(Job.id == urgent).values(not_before_at=now_plus(-5)))
    record(sqlite_database, "lead", kind="train")
    with sqlite_database.write() as session:
        session.execute(update(WorkerRow).where(WorkerRow.name == "lead").values(room=report.as_document()))
    rules = PreemptionRules(exempt_s=0.0)
    with sqlite_database.read() as session:
        assert plan_preemptions(session, rules, 30.0) == []
    record(sqlite_database, "n2")
    with sqlite_database.read() as session:
        assert [plan.job_id for plan in plan_preemptions(session, rules, 30.0)] == [urgent]
