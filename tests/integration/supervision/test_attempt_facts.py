"""What an attempt ran with is noted in its row, from its own Python."""

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from apt_jobs.db.attempt_facts import last_facts
from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import claim, insert_job
from apt_jobs.db.workers import record_worker
from apt_jobs.jobs.attempt_facts import AttemptFacts, PythonFacts
from apt_jobs.jobs.run_file import EnvironmentPlan, RunFile
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.supervision.attempt_facts import PYTHON_FACTS, FactsRecorder
from tests.acceptance.stack import until
from tests.integration.run_files import run_file_in

GPUS = [{"index": 0, "name": "GPU A"}, {"index": 1, "name": "GPU B"}]


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Database]:
    database = Database(sqlite_url)
    yield database
    database.dispose()


def _attempt(database: Database, folder: Path, **fields: object) -> RunFile:
    job = {"kind": "train", "entry_point": "code", "argv": ["true"], "code": {"sha256": "a" * 64}}
    spec = TrainSpec.model_validate(job)
    with database.write() as session:
        job_id = insert_job(session, spec).id
        claim(session, job_id, "w", 60.0)
        record_worker(
            session, name="w", kind="train", queues=[], hostname="h", pid=1, version="1", gpus=GPUS, current_job_id=None
        )
    return run_file_in(folder, spec, job_id=job_id, dataset_sha256="d" * 64, **fields)


def _facts(database: Database, job_id: str) -> AttemptFacts | None:
    with database.read() as session:
        return last_facts(session, job_id)


def test_the_service_s_own_python_is_noted_with_machine_code_and_data(database: Database, tmp_path: Path) -> None:
    run_file = _attempt(database, tmp_path)
    with FactsRecorder(database, run_file, "w", [1]):
        facts = until(lambda: _facts(database, run_file.job_id))
    assert (facts.python, facts.environment, facts.gpus) == (platform.python_version(), None, ["GPU B"])
    assert any(package.startswith("pydantic==") for package in facts.packages)
    assert facts.packages == sorted(facts.packages, key=str.lower)
    assert (facts.code, facts.dataset_sha256) == ("a" * 64, "d" * 64)


def test_an_environment_is_noted_once_it_is_there(database: Database, tmp_path: Path) -> None:
    plan = EnvironmentPlan(environments_dir=tmp_path, python="3.12", timeout_s=1, max_bytes=1, max_unused_s=1)
    run_file = _attempt(database, tmp_path, environment=plan)
    with FactsRecorder(database, run_file, "w", []):
        assert _facts(database, run_file.job_id) is None
        found = PythonFacts(python="3.12.1", packages=["six==1.17.0"], environment="e" * 64)
        (tmp_path / ".new").write_text(found.model_dump_json())
        (tmp_path / ".new").rename(tmp_path / PYTHON_FACTS)
        facts = until(lambda: _facts(database, run_file.job_id))
    assert (facts.python, facts.packages, facts.environment) == ("3.12.1", ["six==1.17.0"], "e" * 64)


def test_an_attempt_that_ends_before_its_environment_is_there_has_no_facts(database: Database, tmp_path: Path) -> None:
    plan = EnvironmentPlan(environments_dir=tmp_path, python="3.12", timeout_s=1, max_bytes=1, max_unused_s=1)
    run_file = _attempt(database, tmp_path, environment=plan)
    with FactsRecorder(database, run_file, "w", []):
        pass
    assert _facts(database, run_file.job_id) is None
