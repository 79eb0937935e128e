"""The data directory is closed to other users of the machine."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from apt_jobs.errors import Unavailable
from apt_jobs.private_files import keep_private


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {path.lstat().st_mode & 0o077 for path in (folder, *folder.rglob("*")) if not path.is_symlink()}


def test_a_new_folder_and_what_is_made_in_it_is_private(tmp_path: Path) -> None:
    keep_private(tmp_path / "new" / "data")
    (tmp_path / "new" / "data" / "runs").mkdir()
    (tmp_path / "new" / "data" / "runs" / "log").write_text("x")
    assert modes(tmp_path / "new" / "data") == {0}


def test_a_folder_of_an_earlier_version_is_tightened_with_all_that_is_ours_in_it(tmp_path: Path) -> None:
    for name in ("runs/job_1/attempt-1/rank-0.spool", "checkpoints/job_1/step-1/model.safetensors", "apt_jobs.sqlite3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "runs" / "tool").write_text("x")
    (tmp_path / "runs" / "tool").chmod(0o755)
    tmp_path.chmod(0o755)
    keep_private(tmp_path)
    assert modes(tmp_path) == {0}
    assert (tmp_path / "runs" / "tool").stat().st_mode & 0o777 == 0o700  # what its owner may do stays


def test_files_of_others_and_targets_of_links_stay_as_they_are(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data, elsewhere, data / "public", data / "models"):
        folder.mkdir()
        folder.chmod(0o755)
    (elsewhere / "shared").write_text("x")
    (data / "models" / "linked").symlink_to(elsewhere)
    (data / "datasets").symlink_to(elsewhere)
    keep_private(data)
    assert data.stat().st_mode & 0o777 == 0o700
    assert (data / "models").stat().st_mode & 0o777 == 0o700
    assert (data / "public").stat().st_mode & 0o777 == 0o755
    assert elsewhere.stat().st_mode & 0o777 == 0o755
    assert (elsewhere / "shared").stat().st_mode & 0o777 == 0o644


def test_a_folder_that_cannot_be_used_is_named_with_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/no-such-folder")):
        with pytest.raises(Unavailable, match=r"cannot use the data directory .*APT_JOBS_DATA_DIR"):
            keep_private(path)
