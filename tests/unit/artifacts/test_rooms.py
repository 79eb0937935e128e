"""From ids to folders: data sets, models, checkpoints and run folders, and how they are deleted."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from apt_jobs.artifacts.checkpoints import checkpoint_dir, checkpoints_of_job, complete_checkpoint_dir
from apt_jobs.artifacts.datasets import DatasetRecord, add_dataset, delete_dataset, find_dataset, list_datasets
from apt_jobs.artifacts.folders import delete_folder, size_bytes_of, sweep
from apt_jobs.artifacts.manifest import MANIFEST, manifest_of, require_whole
from apt_jobs.artifacts.models import list_local_models, local_model_dir
from apt_jobs.artifacts.runs import run_dir, runs_of_job
from apt_jobs.errors import InvalidCheckpoint, NotFound
from apt_jobs.settings import Settings

NO_NAMES = ["", ".", "..", "../up", "a/b", "/etc/passwd", ".hidden", "a\0b", "a\n", "a" * 101, "ü", "\ud800"]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings(data_dir=tmp_path / "data")
    for folder in (settings.datasets_dir, settings.local_models_dir, settings.checkpoints_dir, settings.runs_dir):
        folder.mkdir(parents=True)
    return settings


def test_a_data_set_is_added_listed_and_deleted_by_its_name(settings: Settings) -> None:
    folder = settings.datasets_dir
    uploaded = folder / ".upload"
    uploaded.write_text("text")
    status = uploaded.stat()
    record = DatasetRecord(
        filename="mine.v2.txt",
        size_bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
        created_at=datetime.now(UTC),
    )
    add_dataset(folder, "mine.v2", uploaded, record)
    with pytest.raises(FileExistsError):
        add_dataset(folder, "mine.v2", uploaded, record)
    assert [(name, row.size_bytes) for name, row in list_datasets(folder)] == [("mine.v2", 4)]
    delete_dataset(folder, "mine.v2")
    assert list(list_datasets(folder)) == []
    with pytest.raises(NotFound):
        delete_dataset(folder, "mine.v2")


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_leads_to_no_data_set(settings: Settings, name: str) -> None:
    with pytest.raises(NotFound):
        find_dataset(settings.datasets_dir, name)


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_leads_to_no_model_checkpoint_or_run(settings: Settings, name: str) -> None:
    (settings.root / "config.json").write_text("{}")
    assert local_model_dir(settings, name) is None
    if name in ("", ".", "..", "../up", "/etc/passwd", "a\0b", "\ud800"):
        assert checkpoint_dir(settings, name) is None
        for folder_of in (checkpoints_of_job, runs_of_job):
            with pytest.raises(ValueError, match="no id of a job"):
                folder_of(settings, name)


def test_a_local_model_is_a_folder_with_a_configuration(settings: Settings) -> None:
    for name in ("whole", "empty"):
        (settings.local_models_dir / name).mkdir()
    (settings.local_models_dir / "whole" / "config.json").write_text("{}")
    (settings.local_models_dir / "file").write_text("")
    outside = settings.root / "outside"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    (settings.local_models_dir / "link").symlink_to(outside)
    assert list_local_models(settings) == ["whole"]


def test_a_checkpoint_counts_when_its_manifest_is_there(settings: Settings) -> None:
    folder = settings.checkpoints_dir / "job_x" / "step-1"
    folder.mkdir(parents=True)
    assert complete_checkpoint_dir(settings, "job_x/step-1") is None
    (folder / "weights").write_bytes(b"1234")
    (folder / MANIFEST).write_text(manifest_of(folder).model_dump_json())
    assert complete_checkpoint_dir(settings, "job_x/step-1") == folder.resolve()
    require_whole(folder)
    (folder / "weights").write_bytes(b"1235")
    with pytest.raises(InvalidCheckpoint, match="sha256 differs"):
        require_whole(folder)


@pytest.mark.parametrize(
    "manifest",
    ["", "[]", "{}", '{"files": []}', '{"files": {"a": {}}}', '{"files": {"../a": {"sha256": "", "size_bytes": 1}}}'],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, manifest: str) -> None:
    (tmp_path / MANIFEST).write_text(manifest)
    with pytest.raises(InvalidCheckpoint):
        require_whole(tmp_path)


def test_a_run_folder_is_below_the_runs(settings: Settings) -> None:
    assert run_dir(settings, "job_x", 3) == settings.runs_dir / "job_x" / "attempt-3"


def test_a_folder_is_deleted_though_an_earlier_deletion_was_killed(tmp_path: Path) -> None:
    for name in ("step-1", ".del-step-1", ".tmp-step-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"12")
    assert size_bytes_of(tmp_path) == 6
    assert delete_folder(tmp_path / "step-1") is True
    assert delete_folder(tmp_path / "step-1") is False
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
