"""What cannot run a job claims none: a full disk, another data directory."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import count_by_state, insert_job
from apt_jobs.db.workers import paused_workers
from apt_jobs.jobs.spec import GenerateSpec
from apt_jobs.operations.data_directory import MARKER_NAME, mark_data_directory
from apt_jobs.settings import Settings
from apt_jobs.workers.generate import GenerateWorker
from apt_jobs.workers.node import Node


@pytest.fixture
def settings(sqlite_url: str, tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", database_url=SecretStr(sqlite_url))


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    settings.root.mkdir()
    database = Database(settings.database)
    mark_data_directory(settings, database)
    yield database
    database.dispose()


def test_a_node_without_the_right_data_directory_waits_and_says_why(settings: Settings, database: Database) -> None:
    node = Node(settings, head="head", node_rank=1, gpus=[])
    with database.write() as session:
        node._recorded(session, None)
    assert node._is_usable()
    marker = settings.root / MARKER_NAME
    marker.rename(settings.root / "elsewhere")
    assert not node._is_usable()
    with database.read() as session:
        assert f"has no file {MARKER_NAME}" in paused_workers(session)["head/node-1"]
    (settings.root / "elsewhere").rename(marker)
    assert not node._is_usable()  # it looks again after a while
    node._unusable_until_s = 0.0
    assert node._is_usable()


def test_a_generation_worker_serves_nothing_while_its_disk_is_full(settings: Settings, database: Database) -> None:
    with database.write() as session:
        for _ in range(2):
            insert_job(session, GenerateSpec(kind="generate", texts=["a"]))
    full = settings.model_copy(update={"min_free_bytes": 1 << 60})
    consumer = GenerateWorker(full, name="gen", queues=["generate"], device="cpu")._consumer
    consumer._serve_due()
    with database.read() as session:
        assert count_by_state(session)["queued"] == 2
    roomy = GenerateWorker(
        settings.model_copy(update={"min_free_bytes": 0}), name="gen", queues=["generate"], device="cpu"
    )
    assert roomy._consumer.is_usable()
    assert len(roomy._consumer._claim()) == 2
