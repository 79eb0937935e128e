"""The manifest of a checkpoint: size and SHA-256 of each of its files. A folder without one is not complete."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from apt_jobs.errors import InvalidCheckpoint

MANIFEST = "manifest.json"


class FileEntry(BaseModel):
    """What the manifest says of one file."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    size_bytes: int


class Manifest(BaseModel):
    """The document in `manifest.json`."""

    model_config = ConfigDict(frozen=True)

    files: dict[str, FileEntry]


def manifest_of(folder: Path) -> Manifest:
    """Describe the files that are in a folder now."""
    files = {
        path.name: FileEntry(sha256=sha256_of(path), size_bytes=path.stat().st_size)
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    return Manifest(files=files)


def has_manifest(folder: Path) -> bool:
    """Return whether a checkpoint was written to its end."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        InvalidCheckpoint: there is none, or it is damaged.
    """
    try:
        document: Any = json.loads((folder / MANIFEST).read_bytes())
        return Manifest.model_validate(document)
    except (OSError, ValueError, RecursionError) as exc:
        why = f"{exc.error_count()} wrong fields" if isinstance(exc, ValidationError) else exc
        raise InvalidCheckpoint(f"checkpoint {folder.name!r} is not complete: its manifest: {why}") from exc


def require_whole(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        InvalidCheckpoint: a file is missing, cut or changed.
    """
    for name, expected in read_manifest(folder).files.items():
        if Path(name).name != name:
            raise InvalidCheckpoint(f"checkpoint {folder.name!r} has a manifest that names {name!r}, which is no file")
        try:
            found = sha256_of(folder / name)
        except OSError as exc:
            raise InvalidCheckpoint(f"checkpoint {folder.name!r} is not complete: {exc}") from exc
        if found != expected.sha256:
            raise InvalidCheckpoint(f"{name} of checkpoint {folder.name!r} is damaged: its sha256 differs")


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
