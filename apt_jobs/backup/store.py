"""The folder of backups: contents by their SHA-256, which snapshots share, and one manifest a snapshot.

    apt_jobs_backup.json    what this folder is
    objects/ab/ab34...      contents; written once, never changed
    snapshots/NAME.json     the commit point of a backup: what is not named by one may be deleted

A backup that is killed leaves contents that the next one finds again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from apt_jobs.directories import named_os_errors
from apt_jobs.errors import Conflict, InvalidInput, NotFound
from apt_jobs.folder_lock import FolderLock
from apt_jobs.jobs.code import Sha256

MARKER, LOCK = "apt_jobs_backup.json", "lock"
_COPY_BYTES = 1 << 20
_UNFINISHED = ".tmp-"


class SavedFile(BaseModel):
    """A file of the data directory. Time and number of its inode tell whether it has changed since."""

    model_config = ConfigDict(frozen=True)

    sha256: Sha256
    size_bytes: int
    mtime_ns: int
    inode: int


class SavedTable(BaseModel):
    """A table: its blocks in order, by their SHA-256."""

    model_config = ConfigDict(frozen=True)

    num_rows: int
    blocks: list[Sha256]


class Snapshot(BaseModel):
    """One backup: everything that a restoration needs."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    name: str
    created_at: str
    version: str  # of apt-jobs
    revision: str  # of the schema
    data_id: str | None  # of the data directory; see operations/data_directory.py
    tables: dict[str, SavedTable]
    files: dict[str, SavedFile]  # by path below the data directory
    links: dict[str, str]  # symbolic links, not followed
    num_skipped: int  # files that could not be read or were gone when their turn came

    @property
    def contents(self) -> set[str]:
        """SHA-256 of all that it needs."""
        blocks = {block for table in self.tables.values() for block in table.blocks}
        return blocks | {file.sha256 for file in self.files.values()}

    @property
    def num_bytes(self) -> int:
        """Of its files."""
        return sum(file.size_bytes for file in self.files.values())


class BackupStore:
    """The backups in one folder. One process writes at a time (`lock`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().resolve()
        self._objects, self._snapshots = self.folder / "objects", self.folder / "snapshots"

    def create(self) -> None:
        """Make the folder, or find one that was made.

        Raises:
            InvalidInput: the folder holds something else, or cannot be written to.
        """
        with named_os_errors(f"backups cannot be kept in {str(self.folder)!r}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            marker = self.folder / MARKER
            if not marker.exists() and any(entry.name != LOCK for entry in self.folder.iterdir()):
                raise InvalidInput(f"{str(self.folder)!r} is not empty and holds no backups; name another folder")
            self._objects.mkdir(exist_ok=True)
            self._snapshots.mkdir(exist_ok=True)
            marker.write_text(json.dumps({"format": 1}))

    def lock(self) -> FolderLock:
        """Hold the folder alone, until the lock is closed.

        Raises:
            Conflict: another process writes to it.
        """
        lock = FolderLock(self.folder / LOCK)
        if not lock.try_exclusive():
            lock.close()
            raise Conflict(f"another process writes a backup to {str(self.folder)!r}; wait for its end")
        return lock

    def snapshots(self) -> list[str]:
        """Return the names of all backups, oldest first.

        Raises:
            NotFound: there are no backups in the folder.
        """
        if not (self.folder / MARKER).is_file():
            raise NotFound(f"{str(self.folder)!r} holds no backups of apt-jobs")
        return sorted(path.stem for path in self._snapshots.glob("*.json") if not path.name.startswith(_UNFINISHED))

    def read(self, name: str | None = None) -> Snapshot:
        """Read a backup; None: the newest.

        Raises:
            NotFound: there is none, or none of that name.
            InvalidInput: its manifest is damaged, or of another version.
        """
        known = self.snapshots()
        if not known or (name is not None and name not in known):
            what = "no backup" if name is None else f"no backup {name!r}"
            raise NotFound(f"{str(self.folder)!r} has {what}; there are: {', '.join(known[-20:]) or 'none'}")
        path = self._snapshots / f"{name or known[-1]}.json"
        try:
            return Snapshot.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as exc:
            raise InvalidInput(f"the backup {path.stem} cannot be read, or is of another version: {exc}") from exc

    def has(self, sha256: str) -> bool:
        """Tell whether a content is there."""
        return self._path(sha256).is_file()

    def add(self, source: BinaryIO) -> tuple[str, int]:
        """Keep a content, synced to the disk; returns its SHA-256 and size in bytes."""
        digest, num_bytes = hashlib.sha256(), 0
        temporary = self.folder / f"{_UNFINISHED}{os.getpid()}"
        try:
            with temporary.open("wb") as target:
                while piece := source.read(_COPY_BYTES):
                    digest.update(piece)
                    num_bytes += len(piece)
                    target.write(piece)
                if not self.has(digest.hexdigest()):
                    target.flush()
                    os.fsync(target.fileno())
            path = self._path(digest.hexdigest())
            if not path.is_file():
                path.parent.mkdir(exist_ok=True)
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return digest.hexdigest(), num_bytes

    def commit(self, snapshot: Snapshot) -> None:
        """Write the manifest: from now on the backup exists."""
        temporary = self._snapshots / f"{_UNFINISHED}{snapshot.name}.json"
        with temporary.open("w") as file:
            file.write(snapshot.model_dump_json())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._snapshots / f"{snapshot.name}.json")
        for folder in (*self._objects.iterdir(), self._objects, self._snapshots):
            _sync_folder(folder)

    def open(self, sha256: str) -> BinaryIO:
        """Open a content for reading.

        Raises:
            InvalidInput: it is not there.
        """
        try:
            return self._path(sha256).open("rb")
        except OSError as exc:
            raise InvalidInput(f"the backup lacks the content {sha256}: {exc.strerror}") from exc

    def copy_to(self, sha256: str, target: BinaryIO | None) -> None:
        """Copy a content, or only read it, and compare it with its name.

        Raises:
            InvalidInput: it is missing or damaged.
        """
        digest = hashlib.sha256()
        with self.open(sha256) as source:
            while piece := source.read(_COPY_BYTES):
                digest.update(piece)
                if target is not None:
                    target.write(piece)
        if digest.hexdigest() != sha256:
            raise InvalidInput(f"the content {sha256} of the backup is damaged: its SHA-256 differs")

    def prune(self, keep: int) -> list[str]:
        """Delete all but the newest `keep` backups, and contents that no backup needs. Returns the deleted ones."""
        deleted = self.snapshots()[:-keep]
        for name in deleted:
            (self._snapshots / f"{name}.json").unlink()
        needed = {content for name in self.snapshots() for content in self.read(name).contents}
        for path in self._all_objects():
            if path.name not in needed:
                path.unlink()
        return deleted

    def free_bytes(self) -> int:
        """Bytes that are free on the disk of the backups."""
        return shutil.disk_usage(self.folder).free

    def _all_objects(self) -> Iterator[Path]:
        yield from self._objects.glob("??/*")

    def _path(self, sha256: str) -> Path:
        return self._objects / sha256[:2] / sha256


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
