"""Promise 1 where queues are long, and the bad node: no job waits for long or fails for what one worker lacks."""

import time
from pathlib import Path

from sqlalchemy import insert

from apt_jobs.db.jobs import get_job, list_attempts
from apt_jobs.db.models import Job
from apt_jobs.db.workers import pause_of
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.operations.data_directory import MARKER_NAME, mark_data_directory
from apt_jobs.settings import Settings
from tests.faults.forked import Forker
from tests.faults.history import faults_in
from tests.faults.record import FULL, campaign, count
from tests.faults.service import Service, service, until

NUM_QUEUED = 100_000 if FULL else 2_000  # in ten other queues, which nobody serves
START_WITHIN_S = 10.0


def test_a_due_job_starts_beside_an_idle_worker_whatever_waits_elsewhere(
    tmp_path: Path, database_url: str, forker: Forker
) -> None:
    with (
        campaign(1, "a job whose wake-up was lost, behind long queues") as found,
        service(tmp_path / "s", database_url, forker) as running,
    ):
        found.on(running.database.dialect)
        fill_other_queues(running)
        running.start_web(APT_JOBS_MAX_QUEUED_JOBS="1000000")
        running.start_worker("idle", "train")
        first = running.submit(steps=1)
        until(lambda: running.state(first) == "succeeded")
        for trial in range(count(2, 20)):
            if trial % 2:
                running.freeze("valkey")  # not even the wake-ups of the web process arrive
            began = time.monotonic()
            job_id = running.submit(steps=1, priority=-100)  # the row, and no wake-up
            until(lambda: running.state(job_id) != "queued")  # noqa: B023
            took_s = time.monotonic() - began
            if trial % 2:
                running.thaw("valkey")
            found.recovered(took_s)
            if took_s > START_WITHIN_S:
                found.violations.append(f"{job_id} started after {took_s:.1f} s")
            until(lambda: running.state(job_id) == "succeeded")  # noqa: B023
            found.trials += 1
            found.fault("frozen broker" if trial % 2 else "lost wake-up")


def test_a_bad_node_fails_no_job_and_says_what_it_lacks(tmp_path: Path, database_url: str, forker: Forker) -> None:
    with (
        campaign(2, "a worker that lacks what jobs need, beside a good one") as found,
        service(tmp_path / "s", database_url, forker) as running,
    ):
        found.on(running.database.dialect)
        settings = Settings(data_dir=tmp_path / "s")
        mark_data_directory(settings, running.database)
        running.start_web()
        empty = tmp_path / "mount point"
        running.start_worker("unmounted", "train", APT_JOBS_DATA_DIR=str(empty))
        running.start_worker("lacking", "train", APT_JOBS_TEST_LACKS="no GPU")
        until(lambda: "has no file" in paused(running, "unmounted"))
        jobs = [running.submit(steps=2, max_attempts=1) for _ in range(count(6, 200))]
        until(lambda: paused(running, "lacking") == "handed back 3 jobs in a row; the last one: no GPU")
        assert {running.state(job_id) for job_id in jobs} == {"queued"}
        began = time.monotonic()
        running.start_worker("good", "train")
        until(lambda: not running.num_open())
        found.recovered(time.monotonic() - began)
        with running.database.read() as session:
            for job_id in jobs:
                job, attempts = get_job(session, job_id), list_attempts(session, job_id)
                if job.state != "succeeded" or job.num_job_faults or job.num_infrastructure_faults:
                    found.violations.append(f"{job_id} is {job.state}: {job.reason}")
                if any(attempt.worker == "unmounted" for attempt in attempts):
                    found.violations.append(f"{job_id} was claimed without its data directory")
        found.trials += len(jobs)
        found.fault("unmounted")
        found.fault("lacking")
        empty.mkdir(exist_ok=True)  # the mount comes back
        (empty / MARKER_NAME).write_text((settings.root / MARKER_NAME).read_text())
        running.kill("good")
        job_id = running.submit(steps=1)
        until(lambda: running.state(job_id) == "succeeded")
        with running.database.read() as session:
            assert list_attempts(session, job_id)[-1].worker == "unmounted"
        found.violations += faults_in(running.database)


def paused(running: Service, worker: str) -> str:
    with running.database.read() as session:
        return pause_of(session, worker) or ""


def fill_other_queues(running: Service) -> None:
    """Jobs as `insert_job` makes them, without their events: there are many."""
    spec = TrainSpec(kind="train").model_dump(mode="json")
    row = {"kind": "train", "priority": 5, "labels": {}, "spec": spec, "state": "queued", "max_attempts": 3}
    for start in range(0, NUM_QUEUED, 1_000):
        rows = [
            {**row, "id": f"job_{number:020d}", "queue": f"other-{number % 10}"}
            for number in range(start, start + 1_000)
        ]
        with running.database.write() as session:
            session.execute(insert(Job), rows)
