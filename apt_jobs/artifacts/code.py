"""Packed code that was uploaded: `<code>/<sha256>.tar`, and beside it what is known of it, which appears last.

Jobs name it by its hash, so a retry or a copy of a job runs the very same files.
"""

import os
import shutil
import tarfile
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from apt_jobs.artifacts.paths import inside
from apt_jobs.errors import InvalidInput, NotFound
from apt_jobs.jobs.code import ABOUT_NAME, CodeOrigin, open_packed, packed_members, shown

_KEPT_UPLOAD_S = 86_400.0  # of an upload that broke


class CodeRecord(BaseModel):
    """What is known of a packed folder."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    sha256: str
    size_bytes: int
    num_files: int
    created_at: datetime
    origin: CodeOrigin


def add_code(code_dir: Path, packed: Path, sha256: str) -> CodeRecord:
    """Check a whole and synced file, and keep it under its hash. It is there already where it was uploaded before.

    Raises:
        InvalidInput: it is no packed code; the message names the file in it.
    """
    with packed.open("rb") as file:
        tar, origin = open_packed(file)
        num_files = sum(member.name != ABOUT_NAME for member in packed_members(tar))
    record = CodeRecord(
        sha256=sha256,
        size_bytes=packed.stat().st_size,
        num_files=num_files,
        created_at=datetime.now(UTC),
        origin=origin,
    )
    packed.replace(_tar_path(code_dir, sha256))
    temporary = code_dir / f".about-{sha256}-{os.getpid()}"
    temporary.write_text(record.model_dump_json())
    temporary.replace(_record_path(code_dir, sha256))
    return record


def find_code(code_dir: Path, sha256: str) -> CodeRecord:
    """Return what is known of packed code.

    Raises:
        NotFound: nobody uploaded it, or it was removed.
    """
    try:
        record = CodeRecord.model_validate_json(_record_path(code_dir, sha256).read_bytes())
        if _tar_path(code_dir, sha256).stat().st_size == record.size_bytes:
            return record
    except (OSError, ValidationError):
        pass
    raise NotFound(f"there is no packed code {sha256}; upload it: `apt-jobs run` does")


def touch_code(code_dir: Path, sha256: str) -> None:
    """Note that somebody is about to use it: it is not removed for a day."""
    try:
        os.utime(_record_path(code_dir, sha256))
    except OSError:
        pass  # it is gone, as whoever uses it will find


def code_path(code_dir: Path, sha256: str) -> Path:
    """Return the tar file of code that `find_code` has found."""
    return _tar_path(code_dir, sha256)


def unpack_code(code_dir: Path, sha256: str, folder: Path) -> None:
    """Write the files into a folder, over what is there; other files of the folder stay.

    Raises:
        NotFound: the code is not here.
        InvalidInput: it is damaged.
        OSError: the disk does not take it.
    """
    find_code(code_dir, sha256)
    with _tar_path(code_dir, sha256).open("rb") as file:
        tar, _ = open_packed(file)
        write_members(tar, packed_members(tar), folder)


def write_members(tar: tarfile.TarFile, members: Iterable[tarfile.TarInfo], folder: Path) -> None:
    """Write checked members of a tar file into a folder, over what is there.

    Raises:
        InvalidInput: one is damaged, or a link that leads out by way of others.
        OSError: the disk does not take it.
    """
    root = folder.resolve()
    links: list[tarfile.TarInfo] = []
    for member in members:
        if member.issym():
            links.append(member)
        elif member.name != ABOUT_NAME:
            _write_file(tar, member, root)
    for link in links:  # last: no file is written through one
        path = _free_place(root, link.name)
        path.symlink_to(link.linkname)
        if inside(root, link.name) is None:
            path.unlink()
            raise InvalidInput(f"{shown(link.name)} is a link out of the folder")


def stale_code(code_dir: Path, unused_s: float) -> Iterator[str]:
    """Yield the hashes of code that nobody asked for in `unused_s` seconds; remove what broken uploads left."""
    now_s = time.time()
    if not code_dir.is_dir():
        return
    for path in sorted(code_dir.iterdir()):
        try:
            age_s = now_s - path.stat().st_mtime
        except OSError:
            continue
        if path.name.startswith("."):
            if age_s > _KEPT_UPLOAD_S:
                path.unlink(missing_ok=True)
        elif path.suffix == ".json" and age_s > unused_s:
            yield path.stem


def delete_code(code_dir: Path, sha256: str) -> None:
    """Remove packed code, what is known of it first."""
    _record_path(code_dir, sha256).unlink(missing_ok=True)
    _tar_path(code_dir, sha256).unlink(missing_ok=True)


def _write_file(tar: tarfile.TarFile, member: tarfile.TarInfo, root: Path) -> None:
    source = tar.extractfile(member)
    if source is None:
        raise InvalidInput(f"{shown(member.name)} is damaged")
    path = _free_place(root, member.name)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o700 if member.mode & 0o100 else 0o600)
    with os.fdopen(fd, "wb") as target:
        shutil.copyfileobj(source, target)
    os.utime(path, (member.mtime, member.mtime))


def _free_place(root: Path, name: str) -> Path:
    """Return where a file goes, its folders made; what an earlier attempt left in its way is removed."""
    path = root
    *folders, last = name.split("/")
    for part in folders:
        path = path / part
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            path.mkdir()
    path = path / last
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    return path


def _tar_path(code_dir: Path, sha256: str) -> Path:
    return code_dir / f"{sha256}.tar"


def _record_path(code_dir: Path, sha256: str) -> Path:
    return code_dir / f"{sha256}.json"
