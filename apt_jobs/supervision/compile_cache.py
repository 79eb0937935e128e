"""The cache of compiled kernels, which all trainings of a data directory share: where it is, and its limit.

Compilers never remove anything from it, and compile again what is missing. They take the files of one folder for a
whole (Triton keeps a kernel and its description in one), so a folder goes at once or stays.
"""

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from apt_jobs.artifacts.folders import delete_folder, sweep
from apt_jobs.settings import Settings

logger = logging.getLogger(__name__)

IN_USE_S = 3_600.0  # a folder that was written or read so lately is kept: a training may be about to load more of it


@dataclass(frozen=True, slots=True, order=True)
class _Folder:
    """A folder without folders in it."""

    used_at: float  # Unix seconds, of the file that was used last
    size_bytes: int
    path: Path


def compile_cache_dir(settings: Settings) -> Path:
    """Return the folder of the cache."""
    return settings.root / "compile_cache"


def prune_compile_cache(settings: Settings) -> int:
    """Remove what was not used for longest until the cache fits its limit; returns the bytes removed.

    A cache that cannot be read or changed is left as it is, with a line in the log.
    """
    folders = sorted(_folders(compile_cache_dir(settings)))
    excess_bytes = sum(folder.size_bytes for folder in folders) - settings.compile_cache_max_bytes
    num_removed_bytes = 0
    for folder in folders:
        if num_removed_bytes >= excess_bytes or folder.used_at > time.time() - IN_USE_S:
            break
        try:
            sweep(folder.path.parent)
            delete_folder(folder.path)
        except OSError as exc:
            logger.warning("cannot prune the compile cache", extra={"folder": str(folder.path), "why": str(exc)})
            break
        num_removed_bytes += folder.size_bytes
    if num_removed_bytes:
        logger.info("pruned the compile cache", extra={"num_bytes": num_removed_bytes})
    return num_removed_bytes


def _folders(root: Path) -> Iterator[_Folder]:
    for parent, subfolders, names in os.walk(root):
        if subfolders or not names:
            continue
        try:
            statuses = [Path(parent, name).lstat() for name in names]
        except OSError:
            continue  # a compiler is at work in it
        used_at = max(max(status.st_atime, status.st_mtime) for status in statuses)
        yield _Folder(used_at, sum(status.st_size for status in statuses), Path(parent))
