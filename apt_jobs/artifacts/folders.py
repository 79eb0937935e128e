"""Delete folders and files of artifacts so that half a deletion is never mistaken for the whole thing.

The name goes first, by one rename; what a killed process leaves behind is removed by `sweep`. Training processes load
this module: it knows neither the database nor the settings.
"""

import logging
import shutil
import time
from pathlib import Path

logger = logging.getLogger(__name__)

TEMPORARY_PREFIX, DELETED_PREFIX = ".tmp-", ".del-"


def delete_folder(folder: Path) -> bool:
    """Delete a folder: rename it, then remove what is in it. Returns False if it is not there."""
    deleted = folder.with_name(f"{DELETED_PREFIX}{folder.name}")
    shutil.rmtree(deleted, ignore_errors=True)  # of an earlier deletion that was killed
    try:
        folder.rename(deleted)
    except FileNotFoundError:
        return False
    shutil.rmtree(deleted, ignore_errors=True)
    return True


def try_to_delete_folder(folder: Path) -> None:
    """Delete a folder whose row is gone already. What the file system does not let go stays, with a line in the log."""
    try:
        delete_folder(folder)
    except OSError as exc:
        logger.warning("files that nothing refers to stay", extra={"folder": str(folder), "why": str(exc)})


def sweep(parent: Path, *, older_than_s: float = 0.0) -> None:
    """Remove what a save or a deletion left in `parent` when its process was killed, so long ago."""
    for folder in [*parent.glob(f"{TEMPORARY_PREFIX}*"), *parent.glob(f"{DELETED_PREFIX}*")]:
        if older_than_s and time.time() - folder.stat().st_mtime < older_than_s:
            continue
        shutil.rmtree(folder, ignore_errors=True)


def size_bytes_of(folder: Path) -> int:
    """Return the bytes of all files in a folder, those of folders below included; links are not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
