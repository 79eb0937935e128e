"""Back up a service while it runs: the database as of one instant, and the files that it names.

The snapshot of the database comes first. Right behind it every file that it may name gets a second link, so that a
deletion meanwhile takes nothing away: checkpoints, data sets, code and models are never written to after they got
their name. Then files and rows are copied in peace. A checkpoint that has a row and no files was deleted in the moment
between, if its row is gone by now, too: everything is done again, a few times at most.
"""

import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from apt_jobs import __version__
from apt_jobs.artifacts.folders import DELETED_PREFIX, TEMPORARY_PREFIX, delete_folder
from apt_jobs.artifacts.manifest import MANIFEST, read_manifest
from apt_jobs.artifacts.paths import is_plain_name
from apt_jobs.backup.store import BackupStore, SavedFile, SavedTable, Snapshot
from apt_jobs.db.dump import begin_snapshot, dump_table, tables
from apt_jobs.db.engine import Database
from apt_jobs.db.models import Checkpoint
from apt_jobs.db.service_values import get_value
from apt_jobs.db.upgrade import current_revision, require_current_schema
from apt_jobs.directories import named_os_errors
from apt_jobs.errors import InvalidCheckpoint, InvalidInput, Unavailable
from apt_jobs.operations.data_directory import DATA_ID
from apt_jobs.settings import Settings

LINKED = ("checkpoints", "code", "datasets", "files", "models")  # never written to once they have their name
READ_IN_PLACE = ("runs",)  # grow while they are copied
STAGE_PREFIX = ".backup-"
MAX_TRIES = 5


@dataclass(frozen=True, slots=True)
class Backup:
    """What a backup did."""

    snapshot: Snapshot
    num_new_files: int  # that were read; the others are as they were in the backup before
    num_new_bytes: int  # of files, that no backup had
    deleted: list[str]  # older backups


class _Vanished(Exception):
    """A file that a row names was deleted between the snapshot and its link."""


def back_up(database: Database, settings: Settings, store: BackupStore, *, runs: bool, keep: int | None) -> Backup:
    """Add a backup of `settings`' data directory and `database` to `store`.

    Args:
        database: The service's.
        settings: The service's.
        store: Where to; made if it is not there.
        runs: Whether spools, logs and outputs of attempts are part of it.
        keep: Delete older backups but for so many; None: keep all.

    Raises:
        InvalidInput: the store lies within the data directory, or is a folder of something else.
        Conflict: another process writes to the store.
        OutOfSpace: its disk is full. The backups before are whole.
        Unavailable: the database does not answer or has another schema, or checkpoints vanish all the time.
    """
    if settings.root == store.folder or settings.root in store.folder.parents:
        raise InvalidInput(f"{str(store.folder)!r} lies within the data directory: name a folder outside of it")
    require_current_schema(database)
    store.create()
    lock = store.lock()
    try:
        with named_os_errors(f"the backup in {str(store.folder)!r} broke off"):
            copier = _Copier(store, settings.root)
            snapshot = _try_until_whole(database, settings, copier, runs=runs)
            store.commit(snapshot)
            deleted = [] if keep is None else store.prune(keep)
    finally:
        lock.close()
    return Backup(snapshot, copier.num_new_files, copier.num_new_bytes, deleted)


def _try_until_whole(database: Database, settings: Settings, copier: "_Copier", *, runs: bool) -> Snapshot:
    for number in range(MAX_TRIES):
        try:
            return _take(database, settings, copier, runs=runs)
        except _Vanished:
            time.sleep(0.2 * (number + 1))
    raise Unavailable(f"checkpoints were deleted during each of {MAX_TRIES} tries to back them up; try again later")


def _take(database: Database, settings: Settings, copier: "_Copier", *, runs: bool) -> Snapshot:
    now = datetime.now(UTC)
    copier.begin()
    with database.read() as session:
        begin_snapshot(session)
        with _stage(settings.root) as staged:
            for name, source in staged.items():
                copier.add_folder(name, source)
            for name in READ_IN_PLACE if runs else ():
                copier.add_folder(name, settings.root / name)
            _require_checkpoints(database, session, staged.get("checkpoints"), copier.files)
        saved = {table.name: copier.add_table(dump_table(session, table)) for table in tables()}
        data_id = get_value(session, DATA_ID)
    return Snapshot(
        name=f"{now:%Y%m%dT%H%M%S}Z-{now.microsecond:06d}",
        created_at=now.isoformat(),
        version=__version__,
        revision=current_revision(database) or "",
        data_id=data_id,
        tables=saved,
        files=copier.files,
        links=copier.links,
        num_skipped=copier.num_skipped,
    )


@contextmanager
def _stage(root: Path) -> Iterator[dict[str, Path]]:
    """Link what is there now; yields the linked folders by name. One whose files cannot be linked is itself."""
    for stale in root.glob(f"{STAGE_PREFIX}*"):  # of a backup that was killed: only one at a time has the lock
        delete_folder(stale)
    stage = root / f"{STAGE_PREFIX}{os.getpid()}"
    try:
        folders = {name: root / name for name in LINKED if (root / name).is_dir()}
        yield {name: stage / name if _link_tree(folder, stage / name) else folder for name, folder in folders.items()}
    finally:
        delete_folder(stage)


def _link_tree(folder: Path, stage: Path) -> bool:
    """Link all files of `folder` below `stage`; False: the file system does not do that, or they are of another one."""
    try:
        stage.mkdir(parents=True)
        for parent, names, files in os.walk(folder):
            names[:] = [name for name in names if not name.startswith((TEMPORARY_PREFIX, DELETED_PREFIX))]
            below = stage / Path(parent).relative_to(folder)
            for name in names:
                target = below / name
                if Path(parent, name).is_symlink():
                    target.symlink_to(Path(parent, name).readlink())
                else:
                    target.mkdir()
            for name in files:
                if not name.startswith((TEMPORARY_PREFIX, DELETED_PREFIX)):
                    _link(Path(parent, name), below / name)
    except OSError:
        delete_folder(stage)
        return False
    return True


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except FileNotFoundError:
        return  # deleted meanwhile


def _require_checkpoints(
    database: Database, session: Session, folder: Path | None, files: dict[str, SavedFile]
) -> None:
    """Return if every checkpoint of the snapshot is copied as a whole, or was missing before the backup began.

    Raises:
        _Vanished: one was deleted since: its row is gone by now.
    """
    rows = session.execute(select(Checkpoint.id, Checkpoint.filename)).all()
    broken = {row.id for row in rows if not _is_copied(row.filename, folder, files)}
    if broken:
        with database.read() as later:
            if broken - set(later.scalars(select(Checkpoint.id))):
                raise _Vanished


def _is_copied(name: str, folder: Path | None, files: dict[str, SavedFile]) -> bool:
    try:
        names = read_manifest(folder / name).files if folder is not None and is_plain_name(name) else {}
    except InvalidCheckpoint:
        return False
    return bool(names) and all(f"checkpoints/{name}/{each}" in files for each in (MANIFEST, *names))


class _Copier:
    """Copies into the store what it does not have yet."""

    def __init__(self, store: BackupStore, root: Path) -> None:
        self._store, self._root = store, root
        self._before = store.read().files if store.snapshots() else {}
        self.num_new_files = self.num_new_bytes = 0
        self.begin()

    def begin(self) -> None:
        """Forget the files of a try that came to nothing."""
        self.files, self.links, self.num_skipped = dict[str, SavedFile](), dict[str, str](), 0

    def add_table(self, blocks: Iterator[tuple[bytes, int]]) -> SavedTable:
        """Keep the blocks of a table."""
        saved, num_rows = list[str](), 0
        for block, num in blocks:
            saved.append(self._store.add(BytesIO(block))[0])
            num_rows += num
        return SavedTable(num_rows=num_rows, blocks=saved)

    def add_folder(self, name: str, source: Path) -> None:
        """Keep all files below `source` as those of the folder `name`."""
        for parent, names, files in os.walk(source):
            names[:] = [each for each in names if not each.startswith((TEMPORARY_PREFIX, DELETED_PREFIX))]
            below = Path(name) / Path(parent).relative_to(source)
            for entry in (*names, *files):
                path = Path(parent, entry)
                if path.is_symlink():
                    self.links[str(below / entry)] = str(path.readlink())
                elif entry in files:
                    self._add_file(str(below / entry), path)

    def _add_file(self, name: str, path: Path) -> None:
        try:
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode):
                self.num_skipped += 1
                return
            known = self._before.get(name)
            is_same = known is not None and (known.size_bytes, known.mtime_ns, known.inode) == (
                *(found.st_size, found.st_mtime_ns, found.st_ino),
            )
            if known is not None and is_same and self._store.has(known.sha256):
                self.files[name] = known
                return
            source = path.open("rb")
        except OSError:  # gone, or of another user: of logs, which change all the time
            self.num_skipped += 1
            return
        with source:
            sha256, num_bytes = self._store.add(source)
        self.num_new_files += 1
        self.num_new_bytes += num_bytes
        self.files[name] = SavedFile(
            sha256=sha256, size_bytes=num_bytes, mtime_ns=found.st_mtime_ns, inode=found.st_ino
        )
