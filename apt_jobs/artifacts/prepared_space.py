"""Keep what was prepared of data sets within its size: what was not used for longest is removed first."""

import logging
import shutil
from pathlib import Path

from apt_jobs.folder_lock import FolderLock, lock_path

logger = logging.getLogger(__name__)


def prune_prepared(prepared_dir: Path, max_bytes: int) -> int:
    """Remove prepared folders until at most `max_bytes` are left, and what killed processes left; nothing in use.

    Returns how many folders were removed.
    """
    if not prepared_dir.is_dir():
        return 0
    num_removed = sum(_remove(folder, of=_published(folder)) for folder in prepared_dir.glob(".tmp-*"))
    folders = [folder for folder in prepared_dir.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    sizes = {folder: _size_bytes(folder) for folder in folders}
    excess_bytes = sum(sizes.values()) - max_bytes
    for folder in sorted(folders, key=_used_ns):
        if excess_bytes <= 0:
            break
        if _remove(folder, of=folder):
            excess_bytes -= sizes[folder]
            num_removed += 1
    return num_removed


def _published(temporary: Path) -> Path:
    return temporary.with_name(temporary.name.removeprefix(".tmp-"))


def _remove(folder: Path, *, of: Path) -> bool:
    """Remove a folder unless somebody holds its lock."""
    path = lock_path(of)
    lock = FolderLock(path)
    try:
        if not lock.try_exclusive():
            return False
        shutil.rmtree(folder)
        if not of.exists():
            path.unlink(missing_ok=True)
        logger.info("removed prepared data", extra={"folder": folder.name})
        return True
    except OSError as exc:
        logger.warning("cannot remove prepared data", extra={"folder": folder.name, "why": str(exc)})
        return False
    finally:
        lock.close()


def _used_ns(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _size_bytes(folder: Path) -> int:
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except FileNotFoundError:
        return 0
