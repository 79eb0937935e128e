"""Uploads of data sets in parts: what arrived lies in a folder until it is complete, so that a broken one goes on.

`<datasets>/.uploads/<id>/` has `about.json` and `content`, whose size is how far the upload is. The id is a hash of
what is to be uploaded: who begins the same upload again finds it. One process at a time writes, under a lock.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from apt_jobs.artifacts.folders import try_to_delete_folder
from apt_jobs.artifacts.paths import inside
from apt_jobs.errors import Conflict, InvalidDataset, NotFound, Unavailable
from apt_jobs.folder_lock import FolderLock
from apt_jobs.jobs.dataset_format import DatasetFormat
from apt_jobs.settings import Settings

MAX_OPEN = 32
MAX_IDLE_S = 86_400.0  # without a part an upload is forgotten
_FOLDER, _ABOUT, _CONTENT, _LOCK = ".uploads", "about.json", "content", "lock"
_ID_CHARS = 32
_READ_BYTES = 1 << 20


class DatasetUpload(BaseModel):
    """What is to arrive."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    format: DatasetFormat
    column: str
    size_bytes: int
    sha256: str  # of the file as it is sent

    @property
    def id(self) -> str:
        return f"upl_{hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:_ID_CHARS]}"


def begin_upload(settings: Settings, upload: DatasetUpload) -> None:
    """Make its folder, or find it made.

    Raises:
        Unavailable: too many others are open.
    """
    root = settings.datasets_dir / _FOLDER
    prune_uploads(settings)
    folder = _folder(settings, upload.id)
    if not (folder / _ABOUT).exists():
        if len(list(root.glob("upl_*"))) >= MAX_OPEN:
            raise Unavailable(f"{MAX_OPEN} uploads are open already; finish or cancel one, or try again later")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CONTENT).touch()
        temporary = folder / f".{_ABOUT}"
        temporary.write_text(upload.model_dump_json())
        temporary.rename(folder / _ABOUT)
    (folder / _ABOUT).touch()


def find_upload(settings: Settings, upload_id: str) -> DatasetUpload:
    """Return what is to arrive.

    Raises:
        NotFound: there is no such upload, or it is forgotten.
    """
    try:
        return DatasetUpload.model_validate_json((_folder(settings, upload_id) / _ABOUT).read_bytes())
    except (OSError, ValidationError) as exc:
        raise NotFound(f"there is no upload {upload_id[:60]!r}; it was completed or cancelled, or is too old") from exc


def received_bytes(settings: Settings, upload_id: str) -> int:
    """Return how far an upload is."""
    try:
        return _content(settings, upload_id).stat().st_size
    except OSError as exc:
        raise NotFound(f"there is no upload {upload_id[:60]!r}") from exc


@contextmanager
def writing(settings: Settings, upload_id: str) -> Iterator[Path]:
    """Hold an upload alone; yields the file of its content.

    Raises:
        Conflict: somebody else sends a part of it.
    """
    lock = FolderLock(_folder(settings, upload_id) / _LOCK)
    try:
        if not lock.try_exclusive():
            raise Conflict("another part of this upload is arriving; ask how far it is, and go on from there")
        yield _content(settings, upload_id)
    finally:
        lock.close()


def checked_copy(source: Path, upload: DatasetUpload, target: Path, feed: Callable[..., bytes]) -> str:
    """Copy a complete content through a check; returns the SHA-256 of what was written.

    Raises:
        InvalidDataset: it is not whole, not what was announced, or `feed` does not like it.
    """
    sent, stored = hashlib.sha256(), hashlib.sha256()
    size = source.stat().st_size
    if size != upload.size_bytes:
        raise InvalidDataset(f"{size:,} of {upload.size_bytes:,} bytes have arrived; send the rest first")
    with source.open("rb") as incoming, target.open("wb") as outgoing:
        is_over = False
        while not is_over:
            part = incoming.read(_READ_BYTES)
            is_over = not part
            sent.update(part)
            kept = feed(part, final=is_over)
            stored.update(kept)
            outgoing.write(kept)
        outgoing.flush()
        os.fsync(outgoing.fileno())
    if sent.hexdigest() != upload.sha256:
        raise InvalidDataset(
            f"what arrived has the SHA-256 {sent.hexdigest()}, and {upload.sha256} was announced: the file changed "
            "while it was sent; cancel this upload and begin again"
        )
    return stored.hexdigest()


def cancel_upload(settings: Settings, upload_id: str) -> None:
    """Forget an upload and what arrived of it."""
    try_to_delete_folder(_folder(settings, upload_id))


def prune_uploads(settings: Settings) -> None:
    """Forget uploads that nobody went on with for too long."""
    for folder in (settings.datasets_dir / _FOLDER).glob("upl_*"):
        if time.time() - _changed_s(folder) > MAX_IDLE_S:
            try_to_delete_folder(folder)


def expires_at(settings: Settings, upload_id: str) -> datetime:
    """Return when an upload is forgotten if nothing more arrives."""
    return datetime.fromtimestamp(_changed_s(_folder(settings, upload_id)) + MAX_IDLE_S, UTC)


def _changed_s(folder: Path) -> float:
    """Return when somebody began an upload or sent a part of it, as seconds of the epoch."""
    paths = (folder / _ABOUT, folder / _CONTENT)
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def _folder(settings: Settings, upload_id: str) -> Path:
    folder = inside(settings.datasets_dir / _FOLDER, upload_id) if upload_id.startswith("upl_") else None
    if folder is None or folder.parent.name != _FOLDER:
        raise NotFound(f"there is no upload {upload_id[:60]!r}")
    return folder


def _content(settings: Settings, upload_id: str) -> Path:
    return _folder(settings, upload_id) / _CONTENT
