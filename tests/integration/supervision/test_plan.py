"""What the supervisor refuses before it starts ranks."""

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import update

from apt_jobs.db.dataset_pins import unfinished_job_with
from apt_jobs.db.engine import Database
from apt_jobs.db.events import append_events
from apt_jobs.db.jobs import claim, get_job, insert_job
from apt_jobs.db.models import Job
from apt_jobs.errors import InvalidCheckpoint, InvalidDataset
from apt_jobs.events.kinds import CheckpointSaved
from apt_jobs.jobs.run_file import RunFile
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


def _claimed(database: Database, dataset: str) -> str:
    with database.write() as session:
        job_id = insert_job(session, TrainSpec(kind="train", dataset=dataset)).id
        claim(session, job_id, "test", 60.0)
    return job_id


def _plan(settings: Settings, database: Database, job_id: str) -> RunFile:
    with database.read() as session:
        job = get_job(session, job_id)
    return plan_attempt(settings, database, job, [], 1, lambda: "")


def test_the_first_attempt_pins_the_content_and_another_content_is_refused_with_both_hashes(
    database: Database, sqlite_url: str, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path / "data", database_url=SecretStr(sqlite_url))
    settings.datasets_dir.mkdir(parents=True)
    file = settings.datasets_dir / "mine.txt"
    file.write_text("some words")
    first, other = _claimed(database, "mine"), _claimed(database, "mine")
    run_file = _plan(settings, database, first)
    assert run_file.dataset_file == file
    assert run_file.dataset_sha256 == hashlib.sha256(b"some words").hexdigest()
    assert _plan(settings, database, first).dataset_sha256 == run_file.dataset_sha256
    file.write_text("some other words")
    with pytest.raises(InvalidDataset) as caught:
        _plan(settings, database, first)
    for content in (b"some words", b"some other words"):
        assert hashlib.sha256(content).hexdigest() in str(caught.value)
    assert _plan(settings, database, other).dataset_sha256 == hashlib.sha256(b"some other words").hexdigest()


def test_a_validation_set_of_its_own_is_pinned_and_needed_as_well(
    database: Database, sqlite_url: str, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path / "data", database_url=SecretStr(sqlite_url))
    settings.datasets_dir.mkdir(parents=True)
    (settings.datasets_dir / "mine.txt").write_text("some words")
    (settings.datasets_dir / "held.txt").write_text("held out")
    with database.write() as session:
        job_id = insert_job(session, TrainSpec(kind="train", dataset="mine", validation_dataset="held")).id
        claim(session, job_id, "test", 60.0)
    run_file = _plan(settings, database, job_id)
    assert run_file.dataset_sha256 == hashlib.sha256(b"some words").hexdigest()
    assert run_file.validation_source is not None
    assert run_file.validation_source.sha256 == hashlib.sha256(b"held out").hexdigest()
    with database.read() as session:
        assert unfinished_job_with(session, "held") == job_id
    (settings.datasets_dir / "held.txt").write_text("other words")
    with pytest.raises(InvalidDataset, match="'mine' or 'held' was replaced"):
        _plan(settings, database, job_id)


def test_a_mixture_and_what_is_evaluated_are_pinned_and_needed(
    database: Database, sqlite_url: str, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path / "data", database_url=SecretStr(sqlite_url))
    settings.datasets_dir.mkdir(parents=True)
    for name in ("one", "two", "held"):
        (settings.datasets_dir / f"{name}.txt").write_text(f"the words of {name}")
    spec: dict[str, Any] = {
        "kind": "train",
        "name": 'not "other"',
        "datasets": [{"name": "one"}, {"name": "pydoc-topics"}, {"name": "two", "weight": 2.0}],
        "validation_datasets": {"wiki": "held"},
    }
    with database.write() as session:
        job_id = insert_job(session, TrainSpec.model_validate(spec)).id
        claim(session, job_id, "test", 60.0)
    run_file = _plan(settings, database, job_id)
    assert [source.name for source in [run_file.dataset_source, *run_file.mixed_sources]] == [
        "one",
        "pydoc-topics",
        "two",
    ]
    assert {name: source.name for name, source in run_file.evaluation_sources.items()} == {"wiki": "held"}
    assert _plan(settings, database, job_id) == run_file
    with database.read() as session:
        assert {unfinished_job_with(session, name) for name in ("one", "two", "held")} == {job_id}
        assert unfinished_job_with(session, "other") is None
        assert unfinished_job_with(session, "wiki") is None
    (settings.datasets_dir / "two.txt").write_text("other words")
    with pytest.raises(InvalidDataset, match="'two' or 'held' was replaced"):
        _plan(settings, database, job_id)


def test_later_attempts_compute_with_as_many_threads_as_the_first_on_as_many_cores(
    database: Database, sqlite_url: str, tmp_path: Path
) -> None:
    """Another number of threads adds up in another order: a resumed training would get other bits."""
    folder, url = tmp_path / "data", SecretStr(sqlite_url)
    job_id = _claimed(database, "pydoc-topics")
    with database.read() as session:
        job = get_job(session, job_id)

    def threads(attempt: int, cores: int, proposed: int) -> int | None:
        job.attempt = attempt
        settings = Settings(data_dir=folder, database_url=url, worker_cpus=cores)
        return plan_attempt(settings, database, job, [], 1, lambda: "", threads_per_rank=proposed).threads_per_rank

    assert threads(1, cores=8, proposed=8) == 8  # it was alone
    assert threads(2, cores=8, proposed=1) == 8  # beside others
    assert threads(4, cores=8, proposed=1) == 8  # attempt 3 was not planned
    assert threads(5, cores=2, proposed=1) == 1  # another machine


@pytest.mark.parametrize("state", ["queued", "running", "pausing", "paused"])
def test_an_unfinished_job_needs_its_data_set(database: Database, state: str) -> None:
    job_id = _claimed(database, "mine")
    _claimed(database, "other")
    with database.write() as session:
        lease = {"lease_until": Job.lease_until} if state in ("running", "pausing") else {"lease_until": None}
        session.execute(update(Job).where(Job.id == job_id).values(state=state, **lease))
    with database.read() as session:
        assert unfinished_job_with(session, "mine") == job_id
        assert unfinished_job_with(session, "theirs") is None
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(state="cancelled", lease_until=None))
    with database.read() as session:
        assert unfinished_job_with(session, "mine") is None
