"""What the supervisor refuses before it starts ranks."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import SecretStr

from apt_jobs.db.engine import Database
from apt_jobs.db.events import append_events
from apt_jobs.db.jobs import claim, get_job, insert_job
from apt_jobs.errors import InvalidCheckpoint
from apt_jobs.events.kinds import CheckpointSaved
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.settings import Settings
from apt_jobs.supervision.prepare_run import plan_attempt


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Database]:
    database = Database(sqlite_url)
    yield database
    database.dispose()


@pytest.mark.parametrize("filename", ["../../outside", "/{outside}", "link", "job/../../outside", ""])
@pytest.mark.parametrize("used_as", ["resume", "base_model"])
def test_a_checkpoint_outside_of_the_data_directory_is_not_followed(
    database: Database, sqlite_url: str, tmp_path: Path, filename: str, used_as: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    settings = Settings(data_dir=tmp_path / "a" / "data", database_url=SecretStr(sqlite_url))
    settings.checkpoints_dir.mkdir(parents=True)
    (settings.checkpoints_dir / "link").symlink_to(outside)
    checkpoint_id = "ckpt_" + "0" * 20
    with database.write() as session:
        job_id = insert_job(session, TrainSpec(kind="train")).id
        claim(session, job_id, "test", 60.0)
        saved = CheckpointSaved(checkpoint_id, filename.format(outside=outside), 1, 0, 1.0, 1.0, 10, is_best=True)
        append_events(session, job_id, 1, [(datetime.now(UTC), saved)], 60.0)
    if used_as == "base_model":
        with database.write() as session:
            job_id = insert_job(session, TrainSpec(kind="train", base_model=checkpoint_id)).id
            claim(session, job_id, "test", 60.0)
    with database.read() as session:
        job = get_job(session, job_id)
    with pytest.raises(InvalidCheckpoint):
        plan_attempt(settings, database, job, [], 1, lambda: "")
