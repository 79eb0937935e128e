"""Promises 1, 10 and 14: a 202 is durable, a repeated request makes one job, a due time makes one job."""

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
from sqlalchemy import func, select, update

from apt_jobs.db.access import Role, create_key
from apt_jobs.db.models import Job, Schedule, ScheduleRun
from apt_jobs.db.schedules import ScheduleValues, create_schedule
from apt_jobs.jobs.spec import TrainSpec
from tests.conftest import some_port
from tests.faults.forked import Forker
from tests.faults.history import faults_in
from tests.faults.record import FULL, campaign, count
from tests.faults.service import Service, service, until

BODY = {"kind": "train", "labels": {"steps": "0"}}
POST_PAUSE_S = 0.02  # of each of three clients: what they post has to be worked off, too
STARTS_WITHIN_S = 60.0
NUM_ROUNDS = count(3, 50)  # of each dialect


@contextmanager
def rest(running: Service) -> Iterator[httpx.Client]:
    """A client of the campaign's web process, with a key."""
    with running.database.write() as session:
        key = create_key(session, "campaign", Role.ADMIN)
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(
        base_url=f"http://127.0.0.1:{running.port}", headers=headers, timeout=15.0, trust_env=False
    ) as client:
        until(lambda: is_up(client))
        yield client


def is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def test_a_202_outlives_the_web_process(tmp_path: Path, database_url: str, forker: Forker) -> None:
    with (
        campaign(1, "kill -9 of web around the commit") as found,
        service(tmp_path / "s", database_url, forker) as running,
    ):
        found.on(running.database.dialect)
        chance = random.Random(found.seed)
        running.start_web()
        running.start_worker("worker-a")
        accepted: list[str] = []

        def post_until_killed(client: httpx.Client) -> None:
            try:
                while True:
                    answer = client.post("/api/jobs", json=BODY)
                    if answer.status_code == httpx.codes.ACCEPTED:
                        accepted.append(answer.json()["id"])
                    time.sleep(POST_PAUSE_S)
            except httpx.HTTPError:
                return

        with rest(running) as client:
            for _ in range(count(4, 100)):
                posts = [threading.Thread(target=post_until_killed, args=(client,)) for _ in range(3)]
                for post in posts:
                    post.start()
                time.sleep(chance.uniform(0.0, 0.3))
                running.kill("web")
                for post in posts:
                    post.join()
                found.fault("kill")
                began = time.monotonic()
                running.restart("web")
                until(lambda: is_up(client))
                found.recovered(time.monotonic() - began)
        until(lambda: not running.num_open())
        with running.database.read() as session:
            stored = set(session.scalars(select(Job.id)))
        found.trials = len(accepted)
        found.violations += [f"{job_id} was accepted and is gone" for job_id in accepted if job_id not in stored]
        found.violations += faults_in(running.database)


def test_jobs_accepted_without_a_broker_run_without_it(tmp_path: Path, database_url: str, forker: Forker) -> None:
    away_s = 120.0 if FULL else 2.0
    with (
        campaign(1, f"broker away for {away_s:.0f} s") as found,
        service(tmp_path / "s", database_url, forker) as running,
        ThreadPoolExecutor() as pool,
    ):
        found.on(running.database.dialect)
        running.start_web()
        running.start_worker("worker-a")
        with rest(running) as client:
            running.kill("valkey")
            began = time.monotonic()
            answers = pool.map(lambda _: client.post("/api/jobs", json=BODY).raise_for_status(), range(5))
            ids = [answer.json()["id"] for answer in answers]
            until(lambda: all(running.state(job_id) != "queued" for job_id in ids))
            found.recovered(time.monotonic() - began)
            time.sleep(away_s)
            running.start_valkey()
        if found.slowest_recovery_s > STARTS_WITHIN_S:
            found.violations.append(f"started after {found.slowest_recovery_s:.0f} s")
        until(lambda: not running.num_open())
        found.trials = len(ids)
        found.fault("outage")
        found.violations += faults_in(running.database)


def test_one_idempotency_key_makes_one_job(tmp_path: Path, database_url: str, forker: Forker) -> None:
    with campaign(10, "concurrent posts of one key") as found, service(tmp_path / "s", database_url, forker) as running:
        found.on(running.database.dialect)
        running.start_web()
        with rest(running) as client, ThreadPoolExecutor(50) as pool:
            for number in range(NUM_ROUNDS):
                headers = {"idempotency-key": f"key-{number}"}

                def post(steps: int, headers: dict[str, str] = headers) -> httpx.Response:
                    body = {"kind": "train", "labels": {"steps": str(steps)}}
                    return client.post("/api/jobs", json=body, headers=headers)

                answers = list(pool.map(post, [1] * 50))
                ids = {answer.json().get("id") for answer in answers}
                statuses = {answer.status_code for answer in answers}
                if len(ids) != 1 or statuses != {202}:
                    found.violations.append(f"round {number}: {len(ids)} ids, statuses {statuses}")
                if post(2).status_code != httpx.codes.UNPROCESSABLE_ENTITY:
                    found.violations.append(f"round {number}: the key was accepted with another body")
                found.trials += 50
        with running.database.read() as session:
            rows = session.scalar(select(func.count()).select_from(Job))
        if rows != NUM_ROUNDS:
            found.violations.append(f"{rows} rows")


def test_a_due_time_fires_once_among_several_web_processes(tmp_path: Path, database_url: str, forker: Forker) -> None:
    num_schedules = 5
    with (
        campaign(14, "two web processes, kill -9 of one") as found,
        service(tmp_path / "s", database_url, forker) as running,
    ):
        found.on(running.database.dialect)
        chance = random.Random(found.seed)
        running.start_web("web")
        running.start_web("web-2", APT_JOBS_PORT=str(some_port()))
        with rest(running):
            spec = TrainSpec.model_validate(BODY)
            values = ScheduleValues("nightly", "@daily", "UTC", spec, "queue", "all", paused=False)
            with running.database.write() as session:
                ids = [create_schedule(session, values).id for _ in range(num_schedules)]
            for number in range(count(4, 50)):
                due = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(days=1, minutes=2 * number)
                with running.database.write() as session:
                    session.execute(update(Schedule).values(next_due_at=due))
                if chance.random() < 0.5:
                    running.restart("web-2")
                    found.fault("kill")
                until(lambda due=due: all(has_run(running, one, due) for one in ids))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
                found.trials += num_schedules
        with running.database.read() as session:
            runs = list(session.execute(select(ScheduleRun.schedule_id, ScheduleRun.due_at, ScheduleRun.job_id)))
            made = session.scalar(select(func.count()).select_from(Job))
        jobs = {job_id for _, _, job_id in runs if job_id is not None}
        if len(jobs) != made:
            found.violations.append(f"{made} jobs for {len(jobs)} runs with a job")


def has_run(running: Service, schedule_id: str, due: datetime) -> bool:
    with running.database.read() as session:
        return session.get(ScheduleRun, (schedule_id, due)) is not None
