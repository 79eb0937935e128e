"""The marker of a data directory: a missing mount, another one, or a full disk is found before a job is claimed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from apt_jobs.db.engine import Database
from apt_jobs.db.service_values import get_value
from apt_jobs.errors import OutOfSpace
from apt_jobs.operations.data_directory import (
    DATA_ID,
    MARKER_NAME,
    mark_data_directory,
    require_room,
    why_not_usable,
    why_wrong_directory,
)
from apt_jobs.settings import Settings

MakeSettings = Callable[..., Settings]


def data_id(database: Database) -> str | None:
    with database.read() as session:
        return get_value(session, DATA_ID)


def test_the_first_use_marks_the_directory_and_later_ones_find_it(
    database: Database, make_settings: MakeSettings
) -> None:
    settings = make_settings()
    assert why_wrong_directory(settings, data_id(database)) is None  # of a database that was never marked
    for _ in range(2):
        mark_data_directory(settings, database)
        assert (settings.root / MARKER_NAME).read_text().strip() == data_id(database)
        assert why_not_usable(settings, data_id(database)) is None


def test_a_missing_mount_is_named_and_never_marked(
    database: Database, make_settings: MakeSettings, tmp_path: Path
) -> None:
    mark_data_directory(make_settings(), database)
    empty = make_settings(data_dir=tmp_path / "mount point")
    mark_data_directory(empty, database)
    assert not (empty.root / MARKER_NAME).exists()
    reason = why_wrong_directory(empty, data_id(database))
    assert reason is not None
    assert f"has no file {MARKER_NAME}" in reason
    assert "mount the shared file system" in reason


@pytest.mark.parametrize("content", [b"another-id\n", b"", b"\xff\x00\xfe", b"x" * 10_000])
def test_the_directory_of_another_database_is_named(
    database: Database, make_settings: MakeSettings, content: bytes
) -> None:
    settings = make_settings()
    mark_data_directory(settings, database)
    (settings.root / MARKER_NAME).write_bytes(content)
    assert "belongs to another database" in (why_wrong_directory(settings, data_id(database)) or "")


def test_a_directory_that_holds_the_database_is_the_right_one(tmp_path: Path, sqlite_url: str) -> None:
    database, settings = Database(sqlite_url), Settings(data_dir=tmp_path)
    mark_data_directory(settings, database)
    (tmp_path / MARKER_NAME).unlink()
    mark_data_directory(settings, database)
    assert why_not_usable(settings, data_id(database)) is None
    database.dispose()


def test_too_little_room_is_said_with_its_numbers(make_settings: MakeSettings) -> None:
    with pytest.raises(
        OutOfSpace, match=r"only [\d,]+ bytes are free in .*; at least 1,125,899,906,842,624 are needed"
    ):
        require_room(make_settings(min_free_bytes=1 << 50))
    assert "bytes are free" in (why_not_usable(make_settings(min_free_bytes=1 << 50), None) or "")
    require_room(make_settings())  # also of a directory that is not there yet
