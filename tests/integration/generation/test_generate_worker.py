"""A real generation worker process on a real Valkey and both databases: results, cancel, drain, and sudden death."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from apt_jobs.db.engine import Database
from apt_jobs.db.events import events_after
from apt_jobs.db.jobs import get_job, insert_job, reap_expired
from apt_jobs.db.models import Job
from apt_jobs.db.steering import request_cancel
from apt_jobs.db.workers import list_workers
from apt_jobs.job_queue import WakeUpPublisher, make_celery
from apt_jobs.jobs.sampling_options import MAX_NEW_TOKENS
from apt_jobs.jobs.spec import GenerateSpec
from apt_jobs.jobs.states import TERMINAL_STATES, JobState
from apt_jobs.settings import Settings
from tests.unit.generation.tiny_model import llama_config, save_model

DEADLINE_S = 120.0
LEASE_S = 3.0
ROOT = Path(__file__).parents[3]
START = (
    "from apt_jobs.logs import configure_logging; configure_logging('INFO');"
    "from apt_jobs.settings import Settings; from apt_jobs.workers.generate import GenerateWorker;"
    "GenerateWorker(Settings(), name='gen-1', queues=['generate'], device='cpu').run()"
)


class Service:
    """A database, a broker and workers that come and go."""

    def __init__(self, settings: Settings, log_file: Path) -> None:
        self.settings = settings
        self.database = Database(settings.database)
        self._wake_ups = WakeUpPublisher(make_celery(settings))
        self._log_file = log_file

    def close(self) -> None:
        self._wake_ups.close()
        self.database.dispose()

    @contextmanager
    def worker(self, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        settings = self.settings
        variables = {
            "APT_JOBS_DATA_DIR": str(settings.root),
            "APT_JOBS_DATABASE_URL": settings.database,
            "APT_JOBS_REDIS_URL": settings.redis,
            "APT_JOBS_LEASE_S": str(LEASE_S),
            "APT_JOBS_HEARTBEAT_S": "0.5",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        with (
            self._log_file.open("ab") as log,
            subprocess.Popen(
                [sys.executable, "-c", START],
                env={**os.environ, **variables, **environment},
                stderr=log,
                stdout=log,
                cwd=settings.root,
            ) as process,
        ):
            try:
                self.wait_for(lambda: self.workers(), process)
                yield process
            finally:
                process.kill()

    def workers(self) -> list[str]:
        with self.database.read() as session:
            return [row.name for row in list_workers(session)]

    def submit(self, *texts: str, hint: bool = True, **options: Any) -> str:
        spec = GenerateSpec(kind="generate", texts=list(texts), **options)
        with self.database.write() as session:
            job_id = insert_job(session, spec).id
        if hint:
            self.hint(job_id)
        return job_id

    def hint(self, job_id: str) -> None:
        self._wake_ups.wake_up("generate")

    def job(self, job_id: str) -> Job:
        with self.database.read() as session:
            return get_job(session, job_id)

    def wait_for(self, condition: Callable[[], object], process: subprocess.Popen[bytes] | None = None) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, self._log_file.read_text()[-4_000:]
            assert process is None or process.poll() is None, self._log_file.read_text()[-4_000:]
            time.sleep(0.02)

    def wait_for_state(self, job_id: str, *states: JobState) -> Job:
        self.wait_for(lambda: self.job(job_id).state in states)
        return self.job(job_id)

    def wait_for_end(self, job_id: str) -> Job:
        return self.wait_for_state(job_id, *TERMINAL_STATES)


@pytest.fixture
def service(
    request: pytest.FixtureRequest, make_settings: Callable[..., Settings], valkey_url: str, tmp_path: Path
) -> Iterator[Service]:
    database_url = request.getfixturevalue(f"{request.param}_url")
    settings = make_settings(database_url=database_url, redis_url=valkey_url)
    save_model(settings.local_models_dir / "tiny", llama_config(max_position_embeddings=8_192))
    service = Service(settings, tmp_path / "worker.log")
    yield service
    service.close()


ON_SQLITE = pytest.mark.parametrize("service", ["sqlite"], indirect=True)
ON_BOTH = pytest.mark.parametrize("service", ["sqlite", "postgres"], indirect=True)


@ON_BOTH
def test_jobs_are_generated_refused_cancelled_finished_in_the_grace_and_handed_back(service: Service) -> None:
    """One worker's life, as each start costs seconds."""
    with service.worker(APT_JOBS_DRAIN_TIMEOUT_S="3") as process:
        job = service.wait_for_end(service.submit("一个消息", "The", model="tiny", max_length=12))
        assert job.state == JobState.SUCCEEDED
        assert job.result is not None
        assert job.result["model"] == "tiny"
        assert len(job.result["outputs"]) == 2
        assert job.result["num_tokens"] == [12, 12]
        assert job.result["truncated"] == [False, False]
        assert job.result["generation_time_ms"] > 0
        with service.database.read() as session:
            seqs = [(row.seq, row.kind) for row in events_after(session, job.id, 0, 10)]
        assert seqs == [(1, "state"), (2, "state"), (3, "state")]

        refused = {
            "no checkpoint 'ckpt_00000000000000000000'": service.submit("x", model="ckpt_00000000000000000000"),
            "no model can generate yet: train one first": service.submit("x"),
        }
        for message, job_id in refused.items():
            job = service.wait_for_end(job_id)
            assert job.state == JobState.FAILED
            assert job.error is not None
            assert message in job.error["message"]

        lost = [service.submit("x", model="tiny", max_length=3, hint=False) for _ in range(3)]
        service.hint(lost[-1])
        assert {service.wait_for_end(job_id).state for job_id in lost} == {JobState.SUCCEEDED}

        copy = service.settings.local_models_dir / "copy"
        shutil.copytree(service.settings.local_models_dir / "tiny", copy)
        assert service.wait_for_end(service.submit("x", model="copy", max_length=3)).state == JobState.SUCCEEDED
        shutil.rmtree(copy)
        for model in ("copy", "absent"):
            lacked = service.submit("x", model=model)
            service.wait_for(lambda: "handed back" in (service.job(lacked).reason or ""))  # noqa: B023
            assert (service.job(lacked).state, service.job(lacked).error) == (JobState.QUEUED, None)

        endless = service.submit(*["The"] * 64, model="tiny", max_length=MAX_NEW_TOKENS)
        service.wait_for_state(endless, JobState.RUNNING)
        with service.database.write() as session:
            request_cancel(session, endless, "a user changed their mind")
        cancelled = service.wait_for_end(endless)
        assert (cancelled.state, cancelled.reason) == (JobState.CANCELLED, "a user changed their mind")

        long = service.submit(*["The"] * 60, model="tiny", max_length=MAX_NEW_TOKENS)
        short = service.submit("The", model="tiny", max_length=100)
        service.wait_for_state(long, JobState.RUNNING)
        service.wait_for_state(short, JobState.RUNNING)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=DEADLINE_S) == 0
        assert service.job(short).state == JobState.SUCCEEDED
        job = service.job(long)
        assert (job.state, job.reason) == (JobState.QUEUED, "the worker was drained")
        assert job.num_job_faults_without_checkpoint == 0
        assert service.workers() == []


@ON_SQLITE
def test_the_job_of_a_killed_worker_is_queued_again_and_done_by_the_next(service: Service) -> None:
    with service.worker() as process:
        job_id = service.submit(*["The"] * 8, model="tiny", max_length=2_000)
        service.wait_for_state(job_id, JobState.RUNNING)
        process.kill()
    assert service.job(job_id).state == JobState.RUNNING
    service.wait_for(lambda: reap(service))
    with service.database.write() as session:
        job = get_job(session, job_id)
        assert (job.state, job.reason) == (JobState.QUEUED, "worker gen-1 was lost; trying again in 5 s")
        job.not_before_at = job.created_at  # the pause is another test's affair
        job.spec = {**job.spec, "max_length": 5}
    with service.worker():
        service.hint(job_id)
        job = service.wait_for_end(job_id)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)


def reap(service: Service) -> bool:
    with service.database.write() as session:
        return bool(reap_expired(session, grace_s=0.0))
