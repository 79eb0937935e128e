"""Data sets on disk: their records, those of an earlier version, and content that somebody changed."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import pytest

from apt_jobs.artifacts.datasets import (
    DatasetRecord,
    add_dataset,
    delete_dataset,
    find_dataset,
    identify_dataset,
    list_datasets,
)
from apt_jobs.errors import NotFound
from apt_jobs.jobs.dataset_format import DatasetFormat


def _add(folder: Path, name: str, content: bytes, filename: str, dataset_format: DatasetFormat) -> DatasetRecord:
    upload = folder / ".upload"
    upload.write_bytes(content)
    status = upload.stat()
    record = DatasetRecord(
        filename=filename,
        format=dataset_format,
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
        created_at=datetime.now(UTC),
    )
    add_dataset(folder, name, upload, record)
    return record


def test_a_data_set_is_found_listed_and_deleted_with_its_record(tmp_path: Path) -> None:
    record = _add(tmp_path, "mine", b"{}", "mine.jsonl", DatasetFormat.JSONL)
    (tmp_path / "old.txt").write_text("of an earlier version")
    assert find_dataset(tmp_path, "mine") == identify_dataset(tmp_path, "mine") == record
    assert [(name, found.format) for name, found in list_datasets(tmp_path)] == [("mine", "jsonl"), ("old", "text")]
    delete_dataset(tmp_path, "mine")
    assert [name for name, _ in list_datasets(tmp_path)] == ["old"]
    assert not (tmp_path / "mine.jsonl").exists()
    _add(tmp_path, "mine", b"text", "mine.txt", DatasetFormat.TEXT)


@pytest.mark.parametrize(("name", "filename"), [("mine", "mine.parquet"), ("old", "old.jsonl")])
def test_a_name_is_given_once_whatever_the_format(tmp_path: Path, name: str, filename: str) -> None:
    _add(tmp_path, "mine", b"{}", "mine.jsonl", DatasetFormat.JSONL)
    (tmp_path / "old.txt").write_text("of an earlier version")
    with pytest.raises(FileExistsError):
        _add(tmp_path, name, b"PAR1", filename, DatasetFormat.PARQUET)


def test_a_text_of_an_earlier_version_gets_its_hash(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("words")
    assert find_dataset(tmp_path, "old").sha256 is None
    assert identify_dataset(tmp_path, "old").sha256 == hashlib.sha256(b"words").hexdigest()
    assert find_dataset(tmp_path, "old").sha256 == hashlib.sha256(b"words").hexdigest()
    delete_dataset(tmp_path, "old")
    with pytest.raises(NotFound):
        find_dataset(tmp_path, "old")


def test_content_that_was_changed_has_another_hash_and_keeps_its_format(tmp_path: Path) -> None:
    record = _add(tmp_path, "mine", b"{}", "mine.jsonl", DatasetFormat.JSONL)
    (tmp_path / "mine.jsonl").write_text("{} {}")
    changed = identify_dataset(tmp_path, "mine")
    assert changed.sha256 == hashlib.sha256(b"{} {}").hexdigest() != record.sha256
    assert (changed.format, changed.size_bytes) == (DatasetFormat.JSONL, 5)


@pytest.mark.parametrize("content", [b"", b"{", b'{"filename": "../../etc/passwd"}'])
def test_a_damaged_record_is_no_record(tmp_path: Path, content: bytes) -> None:
    _add(tmp_path, "mine", b"text", "mine.txt", DatasetFormat.TEXT)
    (tmp_path / ".about" / "mine.json").write_bytes(content)
    assert find_dataset(tmp_path, "mine").filename == "mine.txt"


def test_a_record_does_not_lead_to_another_file(tmp_path: Path) -> None:
    record = _add(tmp_path, "mine", b"text", "mine.txt", DatasetFormat.TEXT)
    for filename in ("mine./../../secret", "other.txt"):
        forged = record.model_copy(update={"filename": filename})
        (tmp_path / ".about" / "mine.json").write_text(forged.model_dump_json())
        assert find_dataset(tmp_path, "mine").filename == "mine.txt"


def test_an_upload_that_a_crash_cut_short_does_not_hold_the_name(tmp_path: Path) -> None:
    record = _add(tmp_path, "mine", b"{}", "mine.jsonl", DatasetFormat.JSONL)
    record.file(tmp_path).unlink()
    assert list(list_datasets(tmp_path)) == []
    _add(tmp_path, "mine", b"{}", "mine.jsonl", DatasetFormat.JSONL)
