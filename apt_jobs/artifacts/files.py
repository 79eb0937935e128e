"""Contents of `/v1/files`: one plain file each, named by its id. The row is the commit point, the file comes before."""

import os
import time
from collections.abc import Collection
from pathlib import Path

from apt_jobs.artifacts.folders import TEMPORARY_PREFIX
from apt_jobs.settings import Settings

ORPHAN_AGE_S = 86_400.0  # younger ones may belong to a row that is not committed yet


def file_path(settings: Settings, file_id: str) -> Path:
    """Return where the content of a file lies, from an id that this service made."""
    return settings.files_dir / file_id


def temporary_path(settings: Settings, name: str) -> Path:
    """Return where content is written until it is whole; makes the folder."""
    settings.files_dir.mkdir(parents=True, exist_ok=True)
    return settings.files_dir / f"{TEMPORARY_PREFIX}{name}"


def publish_file(temporary: Path, settings: Settings, file_id: str) -> None:
    """Give whole and synced content its name."""
    temporary.replace(file_path(settings, file_id))
    folder = os.open(settings.files_dir, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def delete_file(settings: Settings, file_id: str) -> None:
    """Delete the content of a file whose row is gone."""
    file_path(settings, file_id).unlink(missing_ok=True)


def old_files(settings: Settings) -> list[str]:
    """Return the names of contents that are older than `ORPHAN_AGE_S`, unfinished ones included."""
    if not settings.files_dir.is_dir():
        return []
    limit = time.time() - ORPHAN_AGE_S
    return [entry.name for entry in os.scandir(settings.files_dir) if entry.stat().st_mtime < limit]


def delete_orphans(settings: Settings, names: Collection[str]) -> None:
    """Delete contents that have no row: what a process that was killed left."""
    for name in names:
        (settings.files_dir / name).unlink(missing_ok=True)
