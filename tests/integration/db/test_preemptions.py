"""Preemption on both dialects: who yields to whom, once, and what becomes of both."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import insert, update

from apt_jobs.db import jobs
from apt_jobs.db.clock import now_plus
from apt_jobs.db.engine import Database
from apt_jobs.db.hand_backs import hand_back
from apt_jobs.db.models import Checkpoint, Job
from apt_jobs.db.placements import Packing, choose, claim_fitting
from apt_jobs.db.preemptions import Preemption, plan_preemptions, request_preemption
from apt_jobs.db.queues import configure_queue
from apt_jobs.db.workers import pause_worker, record_worker, set_drained
from apt_jobs.jobs.packing import Held, Offer, Room, RoomReport
from apt_jobs.jobs.preemption import PreemptionRules
from apt_jobs.jobs.states import JobState
from tests.integration.db.steps import LEASE_S, job_of, submit

RULES = PreemptionRules(exempt_s=30.0, max_times=3)
ALIVE_S = 30.0


class Fleet:
    """Workers of two cores, whose jobs take one each."""

    def __init__(self, database: Database, *names: str, queues: tuple[str, ...] = ("train",)) -> None:
        self._database, self._queues = database, list(queues)
        self.held: dict[str, dict[str, Held]] = {name: {} for name in names}
        for name in names:
            self.record(name)

    def record(self, name: str) -> None:
        report = RoomReport(2, 8.0, 16, 4, 1, tuple(self.held[name].items()))
        with self._database.write() as session:
            record_worker(
                session,
                name=name,
                kind="train",
                queues=self._queues,
                hostname="host",
                pid=1,
                version="1",
                gpus=[],
                current_job_id=None,
                room=report.as_document(),
            )

    def packing(self, name: str) -> Packing:
        room = Room(Offer(cpus=2, memory_gb=8.0, max_jobs=16), tuple(self.held[name].values()))
        return Packing(name, "train", room, now_s=0.0, reserve_after_s=300.0)

    def claim(self, name: str, ran_s: float = 100.0) -> str | None:
        """Claim the next job, as if it had begun `ran_s` seconds ago."""
        packing = self.packing(name)
        with self._database.write() as session:
            if (claimed := claim_fitting(session, self._queues, packing, LEASE_S)) is None:
                return None
            job_id = claimed.job.id
            session.execute(update(Job).where(Job.id == job_id).values(claimed_at=now_plus(-ran_s)))
        self.held[name][job_id] = Held(cpus=1)
        self.record(name)
        return job_id

    def run(self, name: str, ran_s: float = 100.0, **fields: Any) -> str:
        job_id = submit(self._database, **fields)
        assert self.claim(name, ran_s) == job_id
        return job_id

    def leave(self, name: str, job_id: str, **fields: Any) -> None:
        """Let a job end as its supervisor reports it."""
        with self._database.write() as session:
            attempt = jobs.get_job(session, job_id).attempt
            jobs.finish(session, job_id, attempt, **{"outcome": JobState.QUEUED, **fields})
        del self.held[name][job_id]
        self.record(name)


def wait_for(database: Database, **fields: Any) -> str:
    """Submit a job that has waited for a while."""
    job_id = submit(database, **{"priority": 5, **fields})
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(not_before_at=now_plus(-5)))
    return job_id


def save(database: Database, job_id: str, ago_s: float) -> None:
    row = {"id": f"ckpt_{job_id}", "job_id": job_id, "attempt": 1, "filename": job_id, "step": 1, "epoch": 0}
    with database.write() as session:
        at: Mapping[str, Any] = {"size_bytes": 1, "is_best": False, "created_at": now_plus(-ago_s)}
        session.execute(insert(Checkpoint).values(**row, **at))


def plan(database: Database, rules: PreemptionRules = RULES) -> list[Preemption]:
    with database.read() as session:
        return plan_preemptions(session, rules, ALIVE_S)


def preempt(database: Database, rules: PreemptionRules = RULES) -> list[str]:
    """Do what the loop of a web process does; the jobs that were told to yield."""
    plans = plan(database, rules)
    with database.write() as session:
        assert all(request_preemption(session, one, rules) for one in plans)
    return [job_id for one in plans for job_id, _ in one.victims]


def test_the_job_with_the_youngest_checkpoint_yields_wherever_it_runs(database: Database) -> None:
    fleet = Fleet(database, "a", "b")
    running = [fleet.run(name, ran_s=1_000.0) for name in ("a", "a", "b", "b")]
    for job_id, ago_s in zip(running, (300.0, 200.0, 40.0, 100.0), strict=True):
        save(database, job_id, ago_s)
    urgent = wait_for(database)
    [found] = plan(database)
    assert (found.job_id, found.worker, found.victims) == (urgent, "b", ((running[2], 1),))
    assert 40.0 <= found.lost_s < 60.0


def test_the_victim_is_queued_again_without_a_fault_and_the_urgent_job_gets_its_room(database: Database) -> None:
    fleet = Fleet(database, "a")
    victim, _ = fleet.run("a", ran_s=60.0), fleet.run("a", ran_s=600.0)
    urgent = wait_for(database)
    assert preempt(database) == [victim]
    row = job_of(database, victim)
    assert (row.state, row.preempted_by, row.num_preemptions) == ("running", urgent, 1)
    assert jobs.stop_requests_of(row).preempted_by == urgent
    assert preempt(database) == []  # it saves
    fleet.leave("a", victim, reason=f"preempted by {urgent}; saved at step 7")
    row = job_of(database, victim)
    assert (row.state, row.preempted_by, row.num_job_faults, row.num_infrastructure_faults) == ("queued", None, 0, 0)
    older = submit(database, priority=4)
    assert [fleet.claim("a"), fleet.claim("a")] == [urgent, None]
    assert [job_of(database, job_id).state for job_id in (older, victim)] == ["queued", "queued"]


def test_room_that_was_made_is_kept_from_jobs_of_lower_priority_in_any_queue(database: Database) -> None:
    fleet = Fleet(database, "a", queues=("first", "second"))
    victim, other = (fleet.run("a", queue="first", ran_s=ran_s) for ran_s in (60.0, 600.0))
    urgent = wait_for(database, queue="second", num_ranks=2)
    assert sorted(preempt(database)) == sorted([victim, other])
    fleet.leave("a", victim)
    with database.read() as session:
        assert choose(session, ["first", "second"], fleet.packing("a")).startable == []
    higher = submit(database, queue="second", priority=9)
    assert fleet.claim("a") == higher
    for job_id in (higher, other):
        fleet.leave("a", job_id)
    with database.write() as session:
        session.execute(update(Job).where(Job.id == higher).values(state="paused"))
    assert fleet.claim("a") == urgent


def of_the_same_priority(database: Database, fleet: Fleet) -> None:
    wait_for(database, priority=0)


def not_due_yet(database: Database, fleet: Fleet) -> None:
    submit(database, priority=5)


def with_free_room(database: Database, fleet: Fleet) -> None:
    fleet.held["b"] = {}
    fleet.record("b")
    wait_for(database)


def while_a_job_ends(database: Database, fleet: Fleet) -> None:
    with database.write() as session:
        victim = next(iter(fleet.held["a"]))
        jobs.finish(session, victim, 1, JobState.SUCCEEDED)  # its processes are not gone yet
    wait_for(database)


def larger_than_any_worker(database: Database, fleet: Fleet) -> None:
    wait_for(database, num_ranks=16)


def in_a_queue_of_others(database: Database, fleet: Fleet) -> None:
    wait_for(database, queue="elsewhere")


def in_a_paused_queue(database: Database, fleet: Fleet) -> None:
    wait_for(database)
    with database.write() as session:
        configure_queue(session, "train", max_running=None, paused=True)


def in_a_full_queue(database: Database, fleet: Fleet) -> None:
    wait_for(database)
    with database.write() as session:
        configure_queue(session, "train", max_running=2, paused=False)


def on_a_drained_worker(database: Database, fleet: Fleet) -> None:
    wait_for(database)
    with database.write() as session:
        set_drained(session, "a", drained=True)


def on_a_paused_worker(database: Database, fleet: Fleet) -> None:
    wait_for(database)
    with database.write() as session:
        pause_worker(session, "a", "the disk is full", 60.0)


def handed_back_by_the_worker(database: Database, fleet: Fleet) -> None:
    first = next(iter(fleet.held["a"]))
    fleet.leave("a", first, outcome=JobState.SUCCEEDED)
    urgent = wait_for(database)
    assert fleet.claim("a") == urgent
    with database.write() as session:
        hand_back(session, urgent, 1, "no disk")
        session.execute(update(Job).where(Job.id == urgent).values(not_before_at=now_plus(-5)))
    del fleet.held["a"][urgent]
    fleet.run("a", priority=4)


def when_victims_just_began(database: Database, fleet: Fleet) -> None:
    wait_for(database)
    with database.write() as session:
        session.execute(update(Job).where(Job.state == "running").values(claimed_at=now_plus(-10)))


def when_victims_yielded_often(database: Database, fleet: Fleet) -> None:
    wait_for(database)
    with database.write() as session:
        session.execute(update(Job).values(num_preemptions=RULES.max_times))


def when_victims_may_not_yield(database: Database, fleet: Fleet) -> None:
    wait_for(database)
    with database.write() as session:
        session.execute(update(Job).values(is_preemptible=False))


def when_victims_are_cancelled(database: Database, fleet: Fleet) -> None:
    wait_for(database)
    with database.write() as session:
        session.execute(update(Job).where(Job.state == "running").values(cancel_requested_at=now_plus(0)))


@pytest.mark.parametrize(
    "situation",
    [
        of_the_same_priority,
        not_due_yet,
        with_free_room,
        while_a_job_ends,
        larger_than_any_worker,
        in_a_queue_of_others,
        in_a_paused_queue,
        in_a_full_queue,
        on_a_drained_worker,
        on_a_paused_worker,
        handed_back_by_the_worker,
        when_victims_just_began,
        when_victims_yielded_often,
        when_victims_may_not_yield,
        when_victims_are_cancelled,
    ],
)
def test_nobody_yields(sqlite_database: Database, situation: Callable[[Database, Fleet], None]) -> None:
    fleet = Fleet(sqlite_database, "a")
    fleet.run("a")
    fleet.run("a")
    situation(sqlite_database, fleet)
    assert plan(sqlite_database) == []


def test_nobody_yields_where_preemption_is_off(sqlite_database: Database) -> None:
    fleet = Fleet(sqlite_database, "a")
    fleet.run("a")
    fleet.run("a")
    wait_for(sqlite_database)
    assert plan(sqlite_database, PreemptionRules(is_on=False)) == []
    assert plan(sqlite_database) != []


def test_each_of_two_urgent_jobs_gets_room_of_its_own(database: Database) -> None:
    fleet = Fleet(database, "a")
    running = [fleet.run("a"), fleet.run("a")]
    wait_for(database)
    wait_for(database, resources={"cpus": 1})
    assert sorted(preempt(database)) == sorted(running)


def test_a_job_that_room_is_kept_for_elsewhere_preempts_there_only(database: Database) -> None:
    fleet = Fleet(database, "a", "b")
    for name, ran_s in (("a", 50.0), ("a", 50.0), ("b", 90.0), ("b", 90.0)):
        fleet.run(name, ran_s)
    urgent = wait_for(database)
    with database.write() as session:
        session.execute(update(Job).where(Job.id == urgent).values(reserved_by="b", reserved_until=now_plus(30)))
    assert preempt(database)[0] in fleet.held["b"]


def test_of_processes_that_plan_at_once_one_preempts(database: Database) -> None:
    fleet = Fleet(database, "a", "b")
    for name in ("a", "a", "b", "b"):
        fleet.run(name)
    wait_for(database)
    [one] = plan(database)
    elsewhere = "b" if one.worker == "a" else "a"
    other = Preemption(one.job_id, elsewhere, tuple((job_id, 1) for job_id in fleet.held[elsewhere]), 1.0)
    start = threading.Barrier(4)

    def request(chosen: Preemption) -> bool:
        start.wait()
        with database.write() as session:
            return request_preemption(session, chosen, RULES)

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(request, [one, other, one, other])) == 1
    with database.read() as session:
        rows = [jobs.get_job(session, job_id) for held in fleet.held.values() for job_id in held]
    assert {row.lease_owner for row in rows if row.preempted_by is not None} in ({"a"}, {"b"})


def test_a_victim_that_ended_meanwhile_is_left_alone(database: Database) -> None:
    fleet = Fleet(database, "a")
    victim = fleet.run("a", ran_s=60.0)
    fleet.run("a", ran_s=600.0)
    wait_for(database)
    plans = plan(database)
    fleet.leave("a", victim, outcome=JobState.SUCCEEDED)
    with database.write() as session:
        assert request_preemption(session, plans[0], RULES)
    row = job_of(database, victim)
    assert (row.state, row.preempted_by, row.num_preemptions) == ("succeeded", None, 0)


def test_room_is_kept_as_long_as_victims_may_take_to_save(database: Database) -> None:
    fleet = Fleet(database, "a")
    fleet.run("a", ran_s=60.0, grace_period_s=1_000.0)
    fleet.run("a", ran_s=600.0)
    urgent = wait_for(database)
    preempt(database)
    row = job_of(database, urgent)
    assert row.reserved_until is not None
    assert 900.0 < (row.reserved_until - row.created_at).total_seconds() < 1_100.0
