"""Deleting a job: its rows, then its files; what has not ended is kept whole."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from apt_jobs.artifacts.checkpoints import checkpoints_of_job
from apt_jobs.artifacts.runs import run_dir, runs_of_job
from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import get_job, insert_job
from apt_jobs.errors import Conflict, InvalidReferences, NotFound
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.operations.delete_job import delete_job
from apt_jobs.operations.steer import apply_policy, cancel_job, pause_job, resume_job, retry_job
from apt_jobs.settings import Settings


@pytest.fixture
def settings(sqlite_url: str, tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", database_url=SecretStr(sqlite_url))


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    database = Database(settings.database)
    yield database
    database.dispose()


def test_a_deleted_job_leaves_neither_rows_nor_files(settings: Settings, database: Database) -> None:
    with database.write() as session:
        job_id = insert_job(session, TrainSpec(kind="train")).id
    folders = checkpoints_of_job(settings, job_id), run_dir(settings, job_id, 1)
    for folder in folders:
        folder.mkdir(parents=True)
    with pytest.raises(Conflict):
        delete_job(database, settings, job_id)
    assert all(folder.is_dir() for folder in folders)
    with database.write() as session:
        cancel_job(session, job_id)
    delete_job(database, settings, job_id)
    assert not any(folder.exists() for folder in (folders[0], runs_of_job(settings, job_id)))
    with pytest.raises(NotFound), database.read() as session:
        get_job(session, job_id)


def test_a_retry_checks_what_the_job_refers_to_and_changes_nothing_if_it_is_gone(
    settings: Settings, database: Database
) -> None:
    with database.write() as session:
        job_id = insert_job(session, TrainSpec(kind="train", dataset="gone")).id
        cancel_job(session, job_id)
    with pytest.raises(InvalidReferences, match="gone"), database.write() as session:
        retry_job(session, settings, job_id)
    with database.read() as session:
        assert get_job(session, job_id).state == "cancelled"


def test_a_policy_steers_a_job_as_its_users_do_and_gives_way_to_one_that_has_ended(
    settings: Settings, database: Database
) -> None:
    with database.write() as session:
        job_id = insert_job(session, TrainSpec(kind="train")).id
        assert apply_policy(session, job_id, "warn", "spike") == []
        assert len(apply_policy(session, job_id, "pause", "paused by a policy: spike")) == 1
        assert get_job(session, job_id).reason == "paused by a policy: spike"
        assert resume_job(session, job_id)[0].state == "queued"
        assert pause_job(session, job_id)[0].state == "paused"
        assert len(apply_policy(session, job_id, "cancel", "cancelled by a policy: nan")) == 1
        assert apply_policy(session, job_id, "pause", "spike") == []
        assert retry_job(session, settings, job_id)[0].state == "queued"
