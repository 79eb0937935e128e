"""Keep folders that jobs share, of prepared data or environments, within their size: the longest unused goes first."""

import logging
import math
import os
import shutil
import time
from pathlib import Path

from apt_jobs.folder_lock import FolderLock, lock_path

logger = logging.getLogger(__name__)


def prune_shared(root: Path, max_bytes: int, max_unused_s: float = math.inf) -> int:
    """Remove folders of `root` until at most `max_bytes` are left; nothing in use.

    Folders that nobody used for `max_unused_s` seconds go in any case, and so does what killed processes left.

    Returns how many folders were removed.
    """
    if not root.is_dir():
        return 0
    num_removed = sum(_remove(folder, of=_published(folder)) for folder in root.glob(".tmp-*"))
    folders = [folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    sizes = {folder: size_of_folder(folder) for folder in folders}
    excess_bytes = sum(sizes.values()) - max_bytes
    for folder in sorted(folders, key=_used_ns):
        if excess_bytes <= 0 and time.time() - _used_ns(folder) / 1e9 <= max_unused_s:
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
        logger.info("removed what jobs share", extra={"folder": folder.name})
        return True
    except OSError as exc:
        logger.warning("cannot remove what jobs share", extra={"folder": folder.name, "why": str(exc)})
        return False
    finally:
        lock.close()


def _used_ns(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def size_of_folder(folder: Path) -> int:
    """Return the bytes of all files in a folder, which may change meanwhile."""
    num_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                num_bytes += Path(parent, name).lstat().st_size
            except FileNotFoundError:
                continue
    return num_bytes
