"""Restore a backup into a data directory and a database that are empty.

Everything is written beside the directory and gets its name at the end, after the rows are committed: a restoration
that is killed leaves a directory that nobody takes for a whole one, and the next one begins again.
"""

import os
from io import BytesIO
from pathlib import Path

from sqlalchemy import func, select

from apt_jobs.artifacts.folders import delete_folder
from apt_jobs.artifacts.paths import is_plain_name
from apt_jobs.backup.store import BackupStore, Snapshot
from apt_jobs.db.dump import load_block, tables
from apt_jobs.db.engine import Database
from apt_jobs.db.models import Job
from apt_jobs.db.upgrade import migrating, newest_revision, upgrade_database
from apt_jobs.directories import named_os_errors
from apt_jobs.errors import Conflict, InvalidInput, Unavailable
from apt_jobs.operations.data_directory import MARKER_NAME
from apt_jobs.settings import Settings

UNFINISHED_SUFFIX = ".restoring"


def restore(store: BackupStore, name: str | None, settings: Settings) -> Snapshot:
    """Bring back a backup.

    Args:
        store: The folder of backups.
        name: The backup; None: the newest.
        settings: Where to: its data directory, and its database if it names one.

    Raises:
        NotFound: there is no such backup.
        InvalidInput: a content is missing or damaged.
        Conflict: the data directory or the database is not empty.
        Unavailable: the backup has the schema of another version, or the database does not answer.
        OutOfSpace: the disk is full. Nothing was restored.
    """
    snapshot = store.read(name)
    wanted = newest_revision()
    if snapshot.revision != wanted:
        raise Unavailable(
            f"the backup {snapshot.name} has schema {snapshot.revision} and this version of apt-jobs needs {wanted}: "
            f"restore it with version {snapshot.version}, then install this one and run `apt-jobs migrate`"
        )
    root = settings.root
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise Conflict(f"the data directory {root} is not empty: name another one by --data-dir")
    with named_os_errors(f"the backup cannot be restored to {str(root)!r}"):
        unfinished = root.with_name(root.name + UNFINISHED_SUFFIX)
        delete_folder(unfinished)  # of a restoration that was killed
        unfinished.mkdir(parents=True)
        _write_files(store, snapshot, unfinished)
        _write_rows(store, snapshot, settings, unfinished)
        if root.exists():
            root.rmdir()
        unfinished.rename(root)
    return snapshot


def verify(store: BackupStore, name: str | None) -> Snapshot:
    """Read every content of a backup and compare it with its SHA-256.

    Raises:
        NotFound: there is no such backup.
        InvalidInput: a content is missing or damaged.
    """
    snapshot = store.read(name)
    for sha256 in sorted(snapshot.contents):
        store.copy_to(sha256, None)
    return snapshot


def _write_files(store: BackupStore, snapshot: Snapshot, folder: Path) -> None:
    for name, saved in snapshot.files.items():
        with _new_path(folder, name).open("wb") as target:
            store.copy_to(saved.sha256, target)
            target.flush()
            os.fsync(target.fileno())
        os.utime(folder / name, ns=(saved.mtime_ns, saved.mtime_ns))
    for name, target_name in snapshot.links.items():  # after the files: none is written through one
        _new_path(folder, name).symlink_to(target_name)
    if snapshot.data_id is not None:
        (folder / MARKER_NAME).write_text(f"{snapshot.data_id}\n")


def _new_path(folder: Path, name: str) -> Path:
    if not is_plain_name(name):
        raise InvalidInput(f"the backup names a file {name!r}, which does not lie below the data directory")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write_rows(store: BackupStore, snapshot: Snapshot, settings: Settings, folder: Path) -> None:
    own = settings.database_url is None
    url = Settings(data_dir=folder).database if own else settings.database
    database = Database(url)
    try:
        upgrade_database(database)
        with migrating(database) as connection:
            if connection.scalar(select(func.count()).select_from(Job)):
                raise Conflict("the database has jobs: restore into an empty one")
            for table in reversed(list(tables())):
                connection.execute(table.delete())  # what migrations and a first start put there
            for table in tables():
                for block in snapshot.tables[table.name].blocks if table.name in snapshot.tables else ():
                    content = BytesIO()
                    store.copy_to(block, content)
                    load_block(connection, table, content.getvalue())
    finally:
        database.dispose()
