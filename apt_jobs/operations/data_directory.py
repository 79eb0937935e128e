"""Whether the data directory is the right one, and has room.

A marker file names the database that the directory belongs to. A machine whose mount is missing, or is another one,
would otherwise train into an empty folder and report checkpoints that nobody finds.
"""

import os
import uuid
from pathlib import Path

from apt_jobs.db.engine import Database
from apt_jobs.db.service_values import add_value, get_value
from apt_jobs.errors import OutOfSpace
from apt_jobs.settings import Settings

MARKER_NAME = "apt_jobs.id"
DATA_ID = "data_id"  # key of the service's values
_MAX_MARKER_BYTES = 200


def mark_data_directory(settings: Settings, database: Database) -> None:
    """Write the marker the first time that a database and a data directory are used together (`migrate`, `up`).

    Later calls leave a missing marker missing: the directory may be an empty mount point. A directory that holds the
    database itself is the right one.
    """
    with database.read() as session:
        known = get_value(session, DATA_ID)
    marker = settings.root / MARKER_NAME
    if known is None:
        found = _read(marker)  # of a database that was made again
        with database.write() as session:
            known, is_new = add_value(session, DATA_ID, found or str(uuid.uuid4()))
        if not is_new and not _holds_database(settings, database):
            return
    elif not _holds_database(settings, database):
        return
    if _read(marker) is None:
        settings.root.mkdir(parents=True, exist_ok=True)
        temporary = marker.with_name(f".{MARKER_NAME}.{os.getpid()}")
        temporary.write_text(f"{known}\n")
        temporary.rename(marker)


def why_wrong_directory(settings: Settings, data_id: str | None) -> str | None:
    """Return what is wrong with the data directory of a database with this id; None: nothing, or it has no id."""
    if data_id is None:
        return None
    marker = settings.root / MARKER_NAME
    try:
        found = _read(marker)
    except OSError as exc:
        return f"the data directory {settings.root} cannot be read ({exc.strerror}); is its file system mounted?"
    if found == data_id:
        return None
    seen = "has no file" if found is None else f"belongs to another database ({found!r} in its file)"
    return (
        f"the data directory {settings.root} {seen} {MARKER_NAME}, expected {data_id}: mount the shared file system, "
        "or, if this directory is the right one, write that id into the file"
    )


def require_room(settings: Settings) -> None:
    """Return if the data directory has room for a job.

    Raises:
        OutOfSpace: fewer than `min_free_bytes` are free.
    """
    free_bytes = free_bytes_of(settings)
    if free_bytes < settings.min_free_bytes:
        raise OutOfSpace(
            f"only {free_bytes:,} bytes are free in {settings.root}; at least {settings.min_free_bytes:,} are needed: "
            "free disk space"
        )


def free_bytes_of(settings: Settings) -> int:
    """Return what the service may still write into its data directory."""
    status = os.statvfs(_existing(settings.root))
    return status.f_bavail * status.f_frsize


def why_not_usable(settings: Settings, data_id: str | None) -> str | None:
    """Return why a worker can run no job in its data directory now; None: it can."""
    if (wrong := why_wrong_directory(settings, data_id)) is not None:
        return wrong
    try:
        require_room(settings)
    except OutOfSpace as exc:
        return str(exc)
    except OSError as exc:
        return f"the data directory {settings.root} cannot be read ({exc.strerror}); is its file system mounted?"
    return None


def _read(marker: Path) -> str | None:
    try:
        with marker.open("rb") as file:
            return file.read(_MAX_MARKER_BYTES).decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return None


def _existing(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _holds_database(settings: Settings, database: Database) -> bool:
    file = database.url.database
    return database.dialect == "sqlite" and file is not None and Path(file).resolve().parent == settings.root
