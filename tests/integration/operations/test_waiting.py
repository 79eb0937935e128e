"""Why a job waits, in words: every rule that keeps it from being claimed has its sentence, alone and in a list."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select, update

from apt_jobs.db import jobs
from apt_jobs.db.clock import now_plus
from apt_jobs.db.engine import Database
from apt_jobs.db.hand_backs import hand_back
from apt_jobs.db.models import Job
from apt_jobs.db.queues import configure_queue
from apt_jobs.db.workers import pause_worker, record_worker, set_drained
from apt_jobs.jobs.needs import needs_of
from apt_jobs.jobs.packing import Held, RoomReport
from apt_jobs.jobs.resources import Resources
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.operations.expected_start import MAX_POSITION
from apt_jobs.operations.waiting import MAX_LISTED_POSITION, Waiting, waiting_of, waiting_of_page
from tests.integration.db.steps import LEASE_S, claim, submit

WORKER: dict[str, Any] = {"kind": "train", "queues": ["train"], "hostname": "here", "version": "1", "gpus": []}


def worker(database: Database, name: str = "a", **fields: Any) -> None:
    with database.write() as session:
        job_id = fields.pop("job", None)
        record_worker(session, **{**WORKER, **fields}, name=name, pid=1, current_job_id=job_id)


def lacks(database: Database, name: str, reason: str) -> None:
    with database.write() as session:
        claimed = jobs.claim_next(session, "train", name, LEASE_S)
        assert claimed is not None
        hand_back(session, claimed.job.id, claimed.job.attempt, reason)


def paused_queue(database: Database) -> None:
    worker(database)
    with database.write() as session:
        configure_queue(session, "train", max_running=None, paused=True)


def full_queue(database: Database) -> None:
    worker(database)
    with database.write() as session:
        configure_queue(session, "train", max_running=1, paused=False)
        jobs.insert_job(session, SPEC)
    claim(database)


def backing_off(database: Database) -> None:
    worker(database)
    with database.write() as session:
        session.execute(update(Job).values(not_before_at=now_plus(60), reason="a rank died"))


def lacking(database: Database) -> None:
    for name in ("a", "b"):
        worker(database, name)
        lacks(database, name, f"no disk on {name}")


def of_another_kind(database: Database) -> None:
    worker(database, kind="generate")


def drained(database: Database) -> None:
    worker(database)
    with database.write() as session:
        set_drained(session, "a", drained=True)


def paused_worker(database: Database) -> None:
    worker(database)
    with database.write() as session:
        pause_worker(session, "a", "only 5 bytes are free", 60)


def one_lacks_one_is_drained(database: Database) -> None:
    worker(database)
    worker(database, "b")
    lacks(database, "a", "no GPU")
    with database.write() as session:
        set_drained(session, "b", drained=True)


def too_small_for_it(database: Database) -> None:
    worker(database, room=room_of(cpus=2))
    with database.write() as session:
        session.execute(update(Job).values(needs=needs_of(TrainSpec(kind="train", resources=Resources(gpus=1_000)))))


def full(database: Database) -> None:
    worker(database, room=room_of(("job_x", Held(cpus=2)), cpus=2), job="job_x")


def half_full(database: Database) -> None:
    worker(database, room=room_of(("job_x", Held(cpus=1)), cpus=2), job="job_x")


def kept_for_it(database: Database) -> None:
    full(database)
    with database.write() as session:
        session.execute(update(Job).values(reserved_by="a", reserved_until=now_plus(60)))


def preempting(database: Database) -> None:
    full(database)
    with database.write() as session:
        urgent = session.scalars(select(Job.id)).one()
        session.execute(update(Job).values(reserved_by="a", reserved_until=now_plus(60)))
        for number in range(4):
            session.add(jobs.new_job(TrainSpec(kind="train", queue="other"), job_id=f"job_{number}"))
            session.flush()
            assert jobs.claim(session, f"job_{number}", "a", 60.0)
        session.execute(update(Job).where(Job.queue == "other").values(preempted_by=urgent))


def preempted(database: Database) -> None:
    full(database)
    with database.write() as session:
        session.execute(update(Job).values(reason="preempted by job_x; saved at step 7"))


def kept_for_another(database: Database) -> None:
    worker(database, room=room_of(cpus=2, kept_for="job_y"))


def room_of(*held: tuple[str, Held], cpus: int, kept_for: str | None = None) -> dict[str, Any]:
    return RoomReport(
        cpus=cpus, memory_gb=8.0, max_jobs=16, max_cpu_ranks=4, num_nodes=1, jobs=held, kept_for=kept_for
    ).as_document()


def nobody(_database: Database) -> None:
    return


SPEC = TrainSpec(kind="train", priority=9)


@pytest.mark.parametrize(
    ("situation", "reason"),
    [
        (nobody, "no train worker serves the queue 'train'; start one: apt-jobs worker train --queue train"),
        (of_another_kind, "no train worker serves the queue 'train' (1 of another kind do)"),
        (paused_queue, "the queue 'train' is paused"),
        (full_queue, "the queue 'train' runs 1 of at most 1 jobs at once"),
        (backing_off, "back-off until 2"),
        (lacking, "no worker can serve it: a: no disk on a; b: no disk on b"),
        (drained, "no worker of the queue 'train' claims jobs now: a: drained"),
        (paused_worker, "no worker of the queue 'train' claims jobs now: a: only 5 bytes are free"),
        (one_lacks_one_is_drained, "no worker can serve it now: a: no GPU; b: drained"),
        (too_small_for_it, "no worker can serve it: a: the job wants 1000 GPUs, and this worker has 0 such GPUs"),
        (full, "1 of 1 workers of the queue 'train' are busy (a: 0 of 2 CPU cores are free, the job takes 1)"),
        (half_full, "next in the queue; 0 of 1 workers of the queue 'train' are busy"),
        (kept_for_it, "the job takes 1); a keeps room for it"),
        (preempting, "the job takes 1); a keeps room for it; job_0, job_1, job_2 and 1 more save and leave for it"),
        (preempted, "the job takes 1); preempted by job_x; saved at step 7"),
        (kept_for_another, "are busy (a: room is kept for job_y)"),
        (worker, "next in the queue; 0 of 1 workers of the queue 'train' are busy"),
    ],
)
def test_each_reason_is_said_alone_and_in_a_list(
    database: Database, situation: Callable[[Database], None], reason: str
) -> None:
    job_id = submit(database)
    situation(database)
    with database.read() as session:
        job = jobs.get_job(session, job_id)
        alone, listed = waiting_of(session, job, 30.0), waiting_of_page(session, [job], 30.0)
    assert alone is not None
    assert reason in alone.reason
    assert listed == {job_id: Waiting(alone.position, alone.reason)}


def test_what_does_not_wait_waits_for_nothing(database: Database) -> None:
    job_id = submit(database)
    claim(database)
    with database.read() as session:
        job = jobs.get_job(session, job_id)
        assert (waiting_of(session, job, 30.0), waiting_of_page(session, [job], 30.0)) == (None, {})


def test_a_job_far_behind_has_an_exact_place_alone_and_a_bound_in_a_list(database: Database) -> None:
    worker(database)
    ids = [submit(database) for _ in range(MAX_LISTED_POSITION + 2)]
    with database.read() as session:
        rows = [jobs.get_job(session, job_id) for job_id in (ids[0], ids[1], ids[-1])]
        listed = waiting_of_page(session, rows, 30.0)
        alone = waiting_of(session, rows[-1], 30.0)
    assert [listed[row.id].position for row in rows] == [1, 2, None]
    assert listed[ids[1]].reason.startswith("behind 1 job;")
    assert listed[ids[-1]].reason.startswith("behind at least 100 jobs;")
    assert isinstance(alone, Waiting)
    assert (alone.position, alone.reason[:16]) == (MAX_LISTED_POSITION + 2, "behind 101 jobs;")


def ending_soon(database: Database) -> str:
    """Fill a worker of two cores with a job that ends in 500 s by its progress, and one at its limit of 3,840 s."""
    held = {}
    for fields in ({}, {"time_limit_s": 3_600.0}):
        job_id = submit(database, queue="other", **fields)
        with database.write() as session:
            assert jobs.claim(session, job_id, "a", LEASE_S)
            session.execute(update(Job).where(Job.id == job_id).values(claimed_at=now_plus(-500)))
        held[job_id] = Held(cpus=1)
    with database.write() as session:
        limitless = {"step": 300, "num_steps": 600}
        session.execute(update(Job).where(Job.id == min(held)).values(limitless))
    worker(database, room=room_of(*held.items(), cpus=2), job=min(held))
    return min(held)


def in_s_of(database: Database, job_id: str) -> float | None:
    with database.read() as session:
        found = waiting_of(session, jobs.get_job(session, job_id), 30.0)
        now = session.scalars(select(now_plus(0))).one()
    assert found is not None
    assert ("expected to start at about 2" in found.reason) is (found.expected_start_at is not None)
    return None if found.expected_start_at is None else (found.expected_start_at - now).total_seconds()


def test_the_start_is_expected_by_progress_and_time_limits(database: Database) -> None:
    running = ending_soon(database)
    first, second, large = (submit(database, num_ranks=ranks) for ranks in (1, 1, 2))
    assert in_s_of(database, first) == pytest.approx(500, abs=30)
    assert in_s_of(database, second) == pytest.approx(3_840 - 500, abs=30)
    assert in_s_of(database, large) is None  # nobody knows how long the first two run
    with database.write() as session:
        session.execute(update(Job).where(Job.id == running).values(progress={"eta_s": 60.0}))
    assert in_s_of(database, first) == pytest.approx(60, abs=1)


def test_a_start_far_behind_or_on_a_worker_that_does_not_claim_is_unknown(database: Database) -> None:
    ending_soon(database)
    ids = [submit(database, time_limit_s=60.0) for _ in range(MAX_POSITION + 1)]
    assert in_s_of(database, ids[MAX_POSITION - 1]) is not None
    assert in_s_of(database, ids[MAX_POSITION]) is None
    with database.write() as session:
        pause_worker(session, "a", "only 5 bytes are free", 60)
    assert in_s_of(database, ids[0]) is None
