"""Folders that jobs share are kept within their size, and nothing in use is removed."""

import os
import time
from pathlib import Path

from apt_jobs.artifacts.shared_space import prune_shared
from apt_jobs.folder_lock import FolderLock, lock_path


def _prepared(root: Path, name: str, num_bytes: int, used_s: int) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "tokens.bin").write_bytes(b"x" * num_bytes)
    lock_path(folder).touch()
    os.utime(folder, (used_s, used_s))
    return folder


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    folders = [_prepared(tmp_path, name, 100, used_s) for name, used_s in (("a", 3), ("b", 1), ("c", 2))]
    assert prune_shared(tmp_path, 300) == 0
    assert prune_shared(tmp_path, 150) == 2
    assert [folder.is_dir() for folder in folders] == [True, False, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.lock"]


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    used, free = _prepared(tmp_path, "used", 100, 1), _prepared(tmp_path, "free", 100, 2)
    lock = FolderLock(lock_path(used))
    assert lock.try_shared()
    assert prune_shared(tmp_path, 0) == 1
    assert (used.is_dir(), free.is_dir()) == (True, False)
    lock.close()
    assert prune_shared(tmp_path, 0) == 1


def test_what_a_killed_process_left_goes_but_not_what_is_being_made(tmp_path: Path) -> None:
    left, making = _prepared(tmp_path, ".tmp-left", 1, 1), _prepared(tmp_path, ".tmp-making", 1, 1)
    lock = FolderLock(lock_path(tmp_path / "making"))
    assert lock.try_exclusive()
    assert prune_shared(tmp_path, 1 << 30) == 1
    assert (left.is_dir(), making.is_dir()) == (False, True)
    lock.close()


def test_a_missing_folder_has_nothing_to_remove(tmp_path: Path) -> None:
    assert prune_shared(tmp_path / "none", 0) == 0


def test_what_nobody_used_for_too_long_goes_though_there_is_room(tmp_path: Path) -> None:
    old, new = _prepared(tmp_path, "old", 1, 1), _prepared(tmp_path, "new", 1, int(time.time()))
    assert prune_shared(tmp_path, 1 << 30, 3_600.0) == 1
    assert (old.is_dir(), new.is_dir()) == (False, True)
