"""Claims of jobs that fit beside others, on both dialects: order, room that is kept, back-fill, races."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sqlalchemy import update

from apt_jobs.db import jobs
from apt_jobs.db.clock import now_plus
from apt_jobs.db.engine import Database
from apt_jobs.db.hand_backs import hand_back
from apt_jobs.db.models import Job
from apt_jobs.db.placements import MAX_DIFFERENT_NEEDS, Choice, Packing, choose, claim_fitting, different_needs
from apt_jobs.db.queues import configure_queue
from apt_jobs.jobs.packing import Gpu, Held, Offer, Room
from apt_jobs.jobs.spec import TrainSpec
from tests.integration.db.steps import LEASE_S, job_of, submit

OFFER = Offer(gpus=tuple(Gpu(index, "NVIDIA H100", 85.0) for index in range(8)), cpus=64, memory_gb=512.0, max_jobs=16)


def holding(*num_gpus: int, ends_by_s: float | None = None) -> Room:
    """A worker whose jobs hold so many GPUs each."""
    first, held = 0, []
    for number in num_gpus:
        held.append(Held(gpus=tuple(range(first, first + number)), ends_by_s=ends_by_s))
        first += number
    return Room(OFFER, tuple(held))


def packing(room: Room, worker: str = "worker-a", reserve_after_s: float = 300.0) -> Packing:
    return Packing(worker, "train", room, now_s=0.0, reserve_after_s=reserve_after_s)


def claim(database: Database, chosen: Packing, *queues: str) -> str | None:
    with database.write() as session:
        claimed = claim_fitting(session, queues or ["train"], chosen, LEASE_S)
    return None if claimed is None else claimed.job.id


def look(database: Database, chosen: Packing, *queues: str) -> Choice:
    with database.read() as session:
        return choose(session, queues or ["train"], chosen)


def waited_long(database: Database, job_id: str) -> None:
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(not_before_at=now_plus(-1_000)))


def test_the_first_that_fits_is_claimed_by_priority_then_age(database: Database) -> None:
    large = submit(database, num_ranks=8, priority=9)
    older, newer = submit(database), submit(database)
    urgent = submit(database, num_ranks=2, priority=1)
    assert [claim(database, packing(holding(2))) for _ in range(4)] == [urgent, older, newer, None]
    assert claim(database, packing(Room(OFFER))) == large
    assert job_of(database, large).lease_owner == "worker-a"


def test_what_a_worker_can_never_run_is_left_to_others(database: Database) -> None:
    for fields in ({"num_ranks": 9}, {"resources": {"gpu_type": "A100"}}, {"num_ranks": 2, "num_nodes": 2}):
        submit(database, **fields)
    small = submit(database, priority=-5)
    assert claim(database, packing(Room(OFFER), reserve_after_s=0.0)) == small
    assert claim(database, packing(Room(OFFER))) is None
    assert look(database, packing(Room(OFFER), reserve_after_s=0.0)) == Choice([])


def test_a_job_that_waited_long_is_kept_room_and_smaller_ones_wait_behind_it(database: Database) -> None:
    large, small = submit(database, num_ranks=8), submit(database)
    assert claim(database, packing(holding(4))) == small
    smaller = submit(database)
    waited_long(database, large)
    assert claim(database, packing(holding(4))) is None
    row = job_of(database, large)
    assert (row.state, row.reserved_by) == ("queued", "worker-a")
    assert look(database, packing(holding(4))) == Choice([], kept_for=large)  # it is noted: nothing to write
    assert claim(database, packing(Room(OFFER))) == large
    assert job_of(database, large).reserved_by is None
    assert claim(database, packing(Room(OFFER))) == smaller


def test_room_is_kept_on_one_worker_and_in_all_its_queues(database: Database) -> None:
    large = submit(database, num_ranks=8)
    waited_long(database, large)
    small, other = submit(database), submit(database, queue="second")
    assert claim(database, packing(holding(4)), "train", "second") is None
    assert claim(database, packing(holding(4), "worker-b")) == small
    assert claim(database, packing(holding(4), "worker-b"), "train", "second") == other
    assert claim(database, packing(Room(OFFER), "worker-b")) == large  # wherever it fits first


def test_a_worker_that_is_gone_keeps_nothing(database: Database) -> None:
    large = submit(database, num_ranks=8)
    waited_long(database, large)
    assert claim(database, packing(holding(4))) is None
    submit(database)
    with database.write() as session:
        session.execute(update(Job).where(Job.id == large).values(reserved_until=now_plus(-1)))
    assert claim(database, packing(holding(4), "worker-b")) is None
    assert job_of(database, large).reserved_by == "worker-b"


def test_a_higher_priority_goes_before_a_job_that_room_is_kept_for(database: Database) -> None:
    large = submit(database, num_ranks=8)
    waited_long(database, large)
    submit(database)
    urgent = submit(database, priority=1)
    assert claim(database, packing(holding(4))) == urgent
    assert claim(database, packing(holding(4))) is None


def test_only_what_ends_in_time_is_filled_in(database: Database) -> None:
    large = submit(database, num_ranks=8)
    waited_long(database, large)
    submit(database)
    submit(database, time_limit_s=4_000.0)
    short = submit(database, time_limit_s=600.0)
    assert claim(database, packing(holding(4, ends_by_s=3_600.0))) == short
    assert claim(database, packing(holding(4, ends_by_s=3_600.0))) is None
    assert claim(database, packing(holding(4, ends_by_s=None))) is None


def test_a_job_that_the_worker_handed_back_comes_last(database: Database) -> None:
    first = submit(database, priority=5)
    assert claim(database, packing(Room(OFFER))) == first
    with database.write() as session:
        hand_back(session, first, 1, "no disk")
    second = submit(database, num_ranks=2)
    assert claim(database, packing(Room(OFFER))) == second
    assert claim(database, packing(Room(OFFER), "worker-b")) == first


def test_paused_queues_and_limits_hold(database: Database) -> None:
    submit(database)
    second = submit(database, queue="second")
    with database.write() as session:
        configure_queue(session, "train", max_running=None, paused=True)
        configure_queue(session, "second", max_running=1, paused=False)
    submit(database, queue="second")
    assert claim(database, packing(Room(OFFER)), "train", "second") == second
    assert claim(database, packing(Room(OFFER)), "train", "second") is None


def test_workers_that_claim_at_once_never_share_a_job(database: Database) -> None:
    submitted = [submit(database, num_ranks=1 + number % 3) for number in range(24)]
    start = threading.Barrier(6)

    def take(number: int) -> list[str]:
        start.wait()
        found = []
        while (job_id := claim(database, packing(Room(OFFER), f"worker-{number}"))) is not None:
            found.append(job_id)
        return found

    with ThreadPoolExecutor(6) as pool:
        taken = [job_id for job_ids in pool.map(take, range(6)) for job_id in job_ids]
    assert sorted(taken) == sorted(submitted)
    assert all(job_of(database, job_id).attempt == 1 for job_id in submitted)


def test_more_different_needs_than_a_look_reads_starve_nobody(database: Database) -> None:
    with database.write() as session:
        for number in range(MAX_DIFFERENT_NEEDS + 5):
            jobs.insert_job(session, _spec(resources={"memory_gb": 1.0 + number / 1_000}))
        last = jobs.insert_job(session, _spec(priority=1, resources={"memory_gb": 99.0, "cpus": 9})).id
        assert len(different_needs(session, "train")) == MAX_DIFFERENT_NEEDS
    assert claim(database, packing(Room(OFFER))) == last


def _spec(**fields: Any) -> TrainSpec:
    return TrainSpec(kind="train", **fields)
