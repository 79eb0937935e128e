"""Promises 2 and 4: one attempt at a time owns a job, whoever is killed or paused; losing the broker loses no job."""

import random
import time
from pathlib import Path

import redis
from sqlalchemy import select

from apt_jobs.db.jobs import get_job
from apt_jobs.db.models import EventRow
from tests.faults.forked import Forker
from tests.faults.history import faults_in
from tests.faults.record import FULL, campaign, count
from tests.faults.service import LEASE_S, Service, service, until

WORKERS = tuple(f"worker-{letter}" for letter in "abcdef")
MAX_FROZEN = len(WORKERS) - 2
BACKLOG = 12
FREEZE_BROKER_S = 12.0 if FULL else 2.0  # 12: longer than the transport's socket timeout
BROKER_AWAY_S = 5.0 if FULL else 1.0


def test_kills_and_pauses_never_give_a_job_two_owners(tmp_path: Path, database_url: str, forker: Forker) -> None:
    kills, pauses = count(8, 250), count(4, 150)
    with (
        campaign(2, "kill -9 and pauses of workers") as found,
        service(tmp_path / "s", database_url, forker) as running,
    ):
        found.on(running.database.dialect)
        chance = random.Random(found.seed)
        running.start_web()
        for name in WORKERS:
            running.start_worker(name)
        frozen: dict[str, float] = {}  # worker: when it may go on
        plan = ["kill"] * kills + ["pause"] * pauses
        chance.shuffle(plan)
        while plan or frozen or running.num_open():
            while plan and running.num_open() < BACKLOG:
                running.submit(steps=chance.randrange(5, 30))
            for name in [name for name, until_s in frozen.items() if time.monotonic() > until_s]:
                running.thaw(name)
                del frozen[name]
            if plan and (plan[-1] == "kill" or len(frozen) < MAX_FROZEN):
                name = chance.choice([name for name in WORKERS if name not in frozen])
                fault = plan.pop()
                found.fault(fault)
                if fault == "kill":
                    running.restart(name)
                else:
                    running.freeze(name)
                    frozen[name] = time.monotonic() + chance.uniform(LEASE_S, 4 * LEASE_S)
            time.sleep(chance.uniform(0.05, 0.5))
        with running.database.read() as session:
            found.trials = len(set(session.scalars(select(EventRow.job_id))))
        found.violations += faults_in(running.database)


def test_only_the_fence_stops_a_worker_that_wakes_late(tmp_path: Path, database_url: str, forker: Forker) -> None:
    """Without it a late writer writes, and the judge finds what it wrote: the campaign above can fail."""
    with (
        campaign(2, "a late writer; with the fence removed it is found") as found,
        service(tmp_path / "s", database_url, forker) as running,
    ):
        found.on(running.database.dialect)
        running.start_web()
        for _ in range(count(1, 10)):
            running.start_worker("fenced", "a")
            running.start_worker("unfenced", "b", APT_JOBS_TEST_NO_FENCE="1")
            fenced, unfenced = running.submit(steps=25, queue="a"), running.submit(steps=25, queue="b")
            until(lambda: attempt_of(running, fenced) and attempt_of(running, unfenced))  # noqa: B023
            for name in ("fenced", "unfenced"):
                running.freeze(name)
            began = time.monotonic()
            for name, queue, job_id in (("unfenced", "b", unfenced), ("fenced", "a", fenced)):
                running.start_worker(f"second-{queue}", queue)
                until(lambda: attempt_of(running, job_id) > 1)  # noqa: B023
                running.thaw(name)
            found.recovered(time.monotonic() - began)
            until(lambda: not running.num_open())
            time.sleep(1.0)  # what the sleepers still want to write they write now
            found.violations += faults_in(running.database, [fenced])
            if not faults_in(running.database, [unfenced]):
                found.violations.append("a writer without a fence was not found")
            found.trials += 2
            found.fault("pause")
            found.fault("pause without fence")
            for name in ("fenced", "unfenced", "second-a", "second-b"):
                running.kill(name)


def test_no_job_is_lost_with_the_broker(tmp_path: Path, database_url: str, forker: Forker) -> None:
    with (
        campaign(4, "broker restarted, flushed, half-open, away") as found,
        service(tmp_path / "s", database_url, forker) as running,
    ):
        found.on(running.database.dialect)
        running.start_web()
        for name in WORKERS[:2]:
            running.start_worker(name)
        for _ in range(count(1, 10)):
            for fault in (restart, flush, half_open, stay_away):
                for _ in range(3):
                    running.submit(steps=10)
                began = time.monotonic()
                fault(running)
                running.submit(steps=5)
                until(lambda: not running.num_open())
                found.recovered(time.monotonic() - began)
                found.trials += 4
                found.fault(fault.__name__)
        found.violations += faults_in(running.database)


def test_no_job_is_lost_with_its_wake_up(tmp_path: Path, database_url: str, forker: Forker) -> None:
    """A worker dies between taking a wake-up from the broker and claiming the job; the next one looks by itself."""
    with (
        campaign(4, "worker killed between pop and start") as found,
        service(tmp_path / "s", database_url, forker) as running,
    ):
        found.on(running.database.dialect)
        running.start_web()
        for _ in range(count(2, 10)):
            running.start_worker("taker", APT_JOBS_TEST_DIES_ON_WAKE_UP="1")
            job_id = running.submit(steps=1)
            running.processes["taker"].wait()
            began = time.monotonic()
            running.start_worker("taker")
            until(lambda: running.state(job_id) == "succeeded")  # noqa: B023
            found.recovered(time.monotonic() - began)
            found.trials += 1
            found.fault("kill")
            running.kill("taker")
        found.violations += faults_in(running.database)


def attempt_of(running: Service, job_id: str) -> int:
    with running.database.read() as session:
        return get_job(session, job_id).attempt


def restart(running: Service) -> None:
    running.restart("valkey")


def flush(running: Service) -> None:
    client = redis.Redis.from_url(running.redis_url)
    client.flushall()
    client.close()


def half_open(running: Service) -> None:
    """The peer is there, and says nothing."""
    running.freeze("valkey")
    time.sleep(FREEZE_BROKER_S)
    running.thaw("valkey")


def stay_away(running: Service) -> None:
    running.kill("valkey")
    time.sleep(BROKER_AWAY_S)
    running.start_valkey()
