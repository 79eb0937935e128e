"""Promise 17: a sweep has exactly its planned jobs, and halving decides once, whatever web process dies when."""

import random
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import func, select

from apt_jobs.db.engine import Database
from apt_jobs.db.models import Job
from apt_jobs.db.sweep_models import Sweep, SweepRung, SweepTrial
from tests.faults.forked import Forker
from tests.faults.history import faults_in
from tests.faults.record import campaign, count
from tests.faults.service import service, until
from tests.faults.test_submissions import is_up, rest

NUM_JOBS = 4
BODY: dict[str, Any] = {
    "spec": {"kind": "train", "labels": {"steps": "12"}, "max_attempts": 100},
    "parameters": {"labels.loss": {"values": ["4", "3", "2", "1", "5", "6"]}, "training.seed": {"min": 1, "max": 9}},
    "method": "halving",
    "num_jobs": NUM_JOBS,
    "halving": {"min_steps": 3, "reduction_factor": 2, "max_steps": 12},
    "metric": "train_loss",
    "max_running": 2,
}


def test_a_sweep_has_its_planned_jobs_whatever_dies(tmp_path: Path, database_url: str, forker: Forker) -> None:
    with (
        campaign(17, "kill -9 of web while a sweep is made and halved") as found,
        service(tmp_path / "s", database_url, forker) as running,
    ):
        found.on(running.database.dialect)
        chance = random.Random(found.seed)
        running.start_web()
        for worker in ("worker-a", "worker-b"):
            running.start_worker(worker)
        with rest(running) as client:
            for number in range(count(1, 25)):  # each is killed twice
                key = {"idempotency-key": f"sweep-{number}"}
                post = threading.Thread(target=post_once, args=(client, key))
                post.start()
                time.sleep(chance.uniform(0.0, 0.1))
                running.kill("web")
                post.join()
                found.fault("kill at creation")
                began = time.monotonic()
                running.restart("web")
                until(lambda key=key: post_once(client, key))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
                found.recovered(time.monotonic() - began)
                time.sleep(chance.uniform(0.0, 2.0))
                running.restart("web")
                found.fault("kill at promotion")
                until(lambda: is_up(client))
                found.trials += NUM_JOBS
        until(lambda: not running.num_open() and all_finished(running.database))
        found.violations += violations(running.database, found.trials)
        found.violations += faults_in(running.database)


def post_once(client: httpx.Client, key: dict[str, str]) -> bool:
    try:
        return client.post("/api/sweeps", json=BODY, headers=key).status_code == httpx.codes.ACCEPTED
    except httpx.HTTPError:
        return False


def all_finished(database: Database) -> bool:
    with database.read() as session:
        return session.scalar(select(Sweep.id).where(Sweep.finished_at.is_(None)).limit(1)) is None


def violations(database: Database, num_planned: int) -> list[str]:
    """Every way in which the rows are not what was planned."""
    with database.read() as session:
        counts = {name: session.scalar(select(func.count()).select_from(name)) for name in (Job, SweepTrial)}
        found = [f"{number} rows of {table.__tablename__}" for table, number in counts.items() if number != num_planned]
        query = select(SweepTrial, Job).join(Job, Job.id == SweepTrial.job_id)
        for trial, job in session.execute(query):
            rungs = session.scalars(
                select(SweepRung).where(SweepRung.sweep_id == trial.sweep_id, SweepRung.number == trial.number)
            ).all()
            if job.sweep_id != trial.sweep_id or job.holds:
                found.append(f"{job.id}: of {job.sweep_id}, held by {job.holds}")
            if job.state == "cancelled" and all(rung.is_promoted for rung in rungs):
                found.append(f"{job.id}: stopped, though it was promoted at {len(rungs)} rungs")
            if job.state == "succeeded" and len(rungs) > 3:
                found.append(f"{job.id}: {len(rungs)} rungs")
    return found
