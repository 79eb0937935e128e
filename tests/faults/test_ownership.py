"""Promises 2 and 4: one attempt at a time owns a job, whoever is killed or paused; losing the broker loses no job."""

import random
import time
from pathlib import Path

import pytest
import redis
from sqlalchemy import select

from apt_jobs.db.jobs import get_job
from apt_jobs.db.models import EventRow
from tests.faults.history import faults_in
from tests.faults.record import campaign, count
from tests.faults.service import DEADLINE_S, LEASE_S, Service, service, until

WORKERS = ("worker-a", "worker-b", "worker-c")
BACKLOG = 8


def test_kills_and_pauses_never_give_a_job_two_owners(tmp_path: Path, database_url: str) -> None:
    kills, pauses = count(8, 250), count(3, 150)
    with campaign(2, "kill -9 and pauses of workers") as found, service(tmp_path / "s", database_url) as running:
        chance = random.Random(found.seed)
        running.start_web()
        for name in WORKERS:
            running.start_worker(name)
        frozen: dict[str, float] = {}  # worker: when it may go on
        plan = ["kill"] * kills + ["pause"] * pauses
        chance.shuffle(plan)
        while plan or frozen or running.num_open():
            if plan and running.num_open() < BACKLOG:
                running.submit(steps=chance.randrange(5, 30))
            for name in [name for name, until_s in frozen.items() if time.monotonic() > until_s]:
                running.thaw(name)
                del frozen[name]
            awake = [name for name in WORKERS if name not in frozen]
            if plan and len(awake) > 1:
                name = chance.choice(awake)
                found.faults += 1
                if plan.pop() == "kill":
                    running.restart(name)
                else:
                    running.freeze(name)
                    frozen[name] = time.monotonic() + chance.uniform(LEASE_S, 7 * LEASE_S)
            time.sleep(chance.uniform(0.1, 0.8))
        with running.database.read() as session:
            found.trials = len(set(session.scalars(select(EventRow.job_id))))
        found.violations += faults_in(running.database)


@pytest.mark.parametrize("fence", [True, False], ids=["fence", "no-fence"])
def test_a_paused_worker_that_wakes_late_writes_nothing(tmp_path: Path, database_url: str, fence: bool) -> None:
    """And with the fence taken away it does, and the judge finds it: the campaign above can fail."""
    without = {} if fence else {"APT_JOBS_TEST_NO_FENCE": "1"}
    with campaign(2, "a late writer" if fence else "a late writer, fence removed (must be found)") as found:
        with service(tmp_path / "s", database_url) as running:
            running.start_web()
            running.start_worker("sleeper", **without)
            job_id = running.submit(steps=40)
            until(lambda: attempt_of(running, job_id) == 1)
            running.freeze("sleeper")
            running.start_worker("second")
            began = time.monotonic()
            until(lambda: attempt_of(running, job_id) == 2)
            found.recovered(time.monotonic() - began)
            running.thaw("sleeper")
            until(lambda: not running.num_open())
            time.sleep(1.0)  # what the sleeper still wants to write it writes now
            faults = faults_in(running.database)
        found.trials = found.faults = 1
        assert fence or faults
        found.violations += faults if fence else []


def test_no_job_is_lost_with_the_broker(tmp_path: Path, database_url: str) -> None:
    rounds = count(1, 20)
    with (
        campaign(4, "broker restarted, flushed, frozen, killed") as found,
        service(tmp_path / "s", database_url) as running,
    ):
        running.start_web()
        for name in WORKERS[:2]:
            running.start_worker(name)
        for _ in range(rounds):
            for fault in (restart, flush, freeze, stay_away):
                for _ in range(3):
                    running.submit(steps=10)
                began = time.monotonic()
                fault(running)
                running.submit(steps=5)
                until(lambda: not running.num_open(), DEADLINE_S)
                found.recovered(time.monotonic() - began)
                found.trials += 4
                found.faults += 1
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


def freeze(running: Service) -> None:
    """A half-open connection: the peer is there, and says nothing."""
    running.freeze("valkey")
    time.sleep(12.0)  # longer than the transport's socket timeout
    running.thaw("valkey")


def stay_away(running: Service) -> None:
    running.kill("valkey")
    time.sleep(5.0)
    running.start_valkey()
