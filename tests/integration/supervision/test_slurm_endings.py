"""What an attempt becomes whose allocation ended without a word of its supervisor, by what Slurm says of it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import claim, get_job, insert_job, reap_expired
from apt_jobs.db.models import Job
from apt_jobs.events.live import LivePublisher
from apt_jobs.jobs.needs import Needs
from apt_jobs.jobs.packing import Offer
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.settings import Settings
from apt_jobs.workers.slurm.attempt import Shared, SlurmAttempt, SlurmOptions
from apt_jobs.workers.slurm.client import SlurmClient, SlurmJob
from apt_jobs.workers.slurm.request import Attempt
from apt_jobs.workers.slurm.step import BEGUN
from apt_jobs.workers.slurm.watch import Look

LEASE_S = 3.0


class Answers:
    """Slurm, which says the same whenever it is asked."""

    why_silent = None

    def __init__(self, state: str, name: str) -> None:
        self._jobs = (SlurmJob("7", state, name, ""),)

    @property
    def last(self) -> Look:
        return Look(time.monotonic(), self._jobs)

    def look(self) -> Look:
        return self.last

    def look_soon(self) -> None:
        """There is nothing new."""


class NoCommands:
    """Commands that a job whose end is known needs none of."""

    def cancel(self, job_ids: list[str], signal: str | None = None) -> None:
        assert job_ids == []
        assert signal is None


@pytest.fixture
def end(
    database: Database, make_settings: Callable[..., Settings], tmp_path: Path, valkey_url: str
) -> Callable[..., Job]:
    """Run an attempt whose allocation ends so; the job as it is then."""

    def run(state: str, *, has_begun: bool) -> Job:
        with database.write() as session:
            job_id = insert_job(session, TrainSpec(kind="train", max_attempts=5)).id
            assert claim(session, job_id, "slurm", LEASE_S) is not None
        attempt = Attempt(job_id, 1, "slurm", tmp_path)
        if has_begun:
            (tmp_path / BEGUN).write_text("7")
        shared = Shared(
            settings=make_settings(lease_s=LEASE_S, heartbeat_s=0.5),
            options=SlurmOptions(),
            database=database,
            publisher=LivePublisher(valkey_url),
            client=cast(SlurmClient, NoCommands()),
            watch=cast(Any, Answers(state, attempt.name)),
            on_waiting=lambda *_: None,
        )
        SlurmAttempt(shared, attempt, Needs(), Offer()).run(is_submitted=True)
        with database.write() as session:
            reap_expired(session, 0.0)
            return get_job(session, job_id)

    return run


@pytest.mark.parametrize(
    ("state", "has_begun", "words", "faults"),
    [
        ("PREEMPTED", True, "ended as PREEMPTED; it did not save in time", (0, 0)),
        ("TIMEOUT", True, "Slurm job 7 ended as TIMEOUT", (0, 1)),
        ("CANCELLED", True, "Slurm job 7 ended as CANCELLED", (0, 1)),
        ("CANCELLED", False, "Slurm job 7 ended as CANCELLED", (0, 1)),
        ("FAILED", True, "Slurm job 7 ended as FAILED", (0, 1)),
        ("FAILED", False, "ended as FAILED before it started: it printed nothing", (0, 0)),
        ("OUT_OF_MEMORY", True, "Slurm job 7 ended as OUT_OF_MEMORY", (1, 0)),
        ("NODE_FAIL", True, "worker slurm was lost", (0, 1)),  # its processes may live on: the lease decides
    ],
)
def test_an_allocation_that_ends_without_a_report(
    end: Callable[..., Job], state: str, has_begun: bool, words: str, faults: tuple[int, int]
) -> None:
    job = end(state, has_begun=has_begun)
    assert job.state == "queued"
    assert words in (job.reason or "")
    assert (job.num_job_faults, job.num_infrastructure_faults) == faults
