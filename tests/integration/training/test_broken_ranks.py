"""A rank of a user script that goes wrong ends the job with a reason, and no other rank waits for it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from apt_jobs.db.engine import Database
from apt_jobs.db.events import events_after
from apt_jobs.db.jobs import claim_next, get_job, insert_job
from apt_jobs.jobs.spec import TrainSpec

SCRIPT = Path(__file__).with_name("broken_ranks.py")
ROOT = Path(__file__).resolve().parents[3]
LIMIT_S = 240.0  # far less than the ten minutes and more that a collective may wait


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Database]:
    opened = Database(sqlite_url)
    yield opened
    opened.dispose()


@pytest.mark.parametrize(
    ("fault", "state", "reason"),
    [
        ("other_layers", "failed", "InvalidInput: ranks [1] have other layers than rank 0"),
        ("no_layers", "failed", "InvalidInput: ranks [1] have other layers than rank 0"),
        ("raised", "failed", "rank 1: ValueError: a bad batch"),
        ("killed", "queued", "; trying again in "),
    ],
)
def test_one_broken_rank_ends_the_attempt(
    tmp_path: Path, sqlite_url: str, database: Database, fault: str, state: str, reason: str
) -> None:
    spec = TrainSpec(kind="train", entry_point="broken", arguments={"fault": fault}, num_ranks=2)
    job_id = _supervise(database, sqlite_url, tmp_path, spec, SCRIPT)
    with database.read() as session:
        job = get_job(session, job_id)
        kinds = [event.kind for event in events_after(session, job_id, 0, 1_000)]
    assert (job.state, reason in str(job.reason)) == (state, True), (job.reason, job.error)
    assert kinds.count("gradient") == (2 if fault in ("raised", "killed") else 0)


def test_a_registered_script_that_is_not_there_is_named(tmp_path: Path, sqlite_url: str, database: Database) -> None:
    job_id = _supervise(
        database, sqlite_url, tmp_path, TrainSpec(kind="train", entry_point="broken"), tmp_path / "gone.py"
    )
    with database.read() as session:
        job = get_job(session, job_id)
    assert (job.state, "gone.py" in str(job.reason)) == ("queued", True), job.reason


def _supervise(database: Database, url: str, folder: Path, spec: TrainSpec, script: Path) -> str:
    """Submit and claim a job, and run its supervisor to the end, which has `LIMIT_S`. Returns the job's id."""
    with database.write() as session:
        job_id = insert_job(session, spec).id
    with database.write() as session:
        assert claim_next(session, "train", "worker", 60.0)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "APT_JOBS_DATA_DIR": str(folder / "data"),
        "APT_JOBS_DATABASE_URL": url,
        "APT_JOBS_ENTRY_POINTS": json.dumps({"broken": str(script)}),
    }
    command = [sys.executable, "-m", "apt_jobs.supervision.supervise", f"--job-id={job_id}", "--attempt=1"]
    command.append("--worker-name=worker")
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.wait(LIMIT_S) == 0, process.stderr.read()
    return job_id
