"""A folder of a user's code, packed: one tar file, named by its SHA-256, that says where the code comes from.

The client packs it, the service checks and keeps it, the worker unpacks it. The first member describes it; all others
are regular files, and symbolic links that stay inside. Equal folders of equal history have equal bytes.
"""

import tarfile
from collections.abc import Iterator
from posixpath import dirname, join, normpath
from typing import IO, Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.printable import escaped, first_unprintable

ABOUT_NAME = ".apt_jobs_code.json"
DEFAULT_MAX_BYTES = 50 << 20
MAX_FILES = 20_000
MAX_NAME_CHARS = 1_000
MAX_ABOUT_BYTES = 8 << 20
MAX_DIFF_CHARS = 1_000_000
FILE_MODE, PROGRAM_MODE = 0o644, 0o755
MTIME_S = 946_684_800  # 2000-01-01: zip files know nothing before 1980

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Word = Annotated[str, StringConstraints(max_length=1_000)]


class CodeOrigin(BaseModel):
    """Where a packed folder comes from, as git knows it; nothing of it where git does not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    commit: _Word | None = Field(None, description="Commit that was checked out.")
    branch: _Word | None = Field(None, description="Branch that was checked out.")
    remote: _Word | None = Field(None, description="Where the repository comes from, without a password.")
    is_dirty: bool = Field(False, description="Files differ from the commit, or are not in it.")
    diff: Annotated[str, StringConstraints(max_length=MAX_DIFF_CHARS + 100)] = Field(
        "", description="How tracked files differ from the commit."
    )


def packed_members(tar: tarfile.TarFile, *, has_folders: bool = False) -> Iterator[tarfile.TarInfo]:
    """Yield the files and links of a packed folder, each checked; `open_packed` comes before.

    Args:
        tar: Where they are.
        has_folders: Folders are members as well, and left out, as in what `git archive` writes.

    Raises:
        InvalidInput: one could not be unpacked inside a folder; the message names it.
    """
    seen: set[str] = set()
    try:
        for member in tar:
            if has_folders and member.isdir():
                continue
            _require_member(member)
            if member.name in seen:
                raise InvalidInput(f"the packed code has {shown(member.name)} twice")
            seen.add(member.name)
            if len(seen) > MAX_FILES:
                raise InvalidInput(f"the packed code has more than {MAX_FILES:,} files")
            yield member
    except (tarfile.TarError, EOFError, UnicodeError) as exc:
        raise InvalidInput(f"the packed code is no tar file: {exc}") from exc


def open_packed(file: IO[bytes]) -> tuple[tarfile.TarFile, CodeOrigin]:
    """Open a packed folder; returns it behind its first member, and what that says.

    Raises:
        InvalidInput: it is none.
    """
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  # the caller's
        first = tar.next()
        opened = tar.extractfile(first) if first is not None and first.name == ABOUT_NAME else None
        if first is None or opened is None or first.size > MAX_ABOUT_BYTES:
            raise InvalidInput(f"the packed code does not begin with {ABOUT_NAME}; `apt-jobs run` packs it")
        return tar, CodeOrigin.model_validate_json(opened.read())
    except (tarfile.TarError, EOFError, UnicodeError) as exc:
        raise InvalidInput(f"the packed code is no tar file: {exc}") from exc
    except ValidationError as exc:
        raise InvalidInput(f"the packed code says wrong things of itself: {exc.error_count()} wrong fields") from exc


def require_name(name: str) -> None:
    """Refuse a path that is not one inside the folder, or that a reader's terminal would act on.

    Raises:
        InvalidInput: it is such a path; the message shows it.
    """
    if first_unprintable(name) is not None:
        raise InvalidInput(f"{shown(name)} has a character in its name that is not printable; rename it")
    if len(name) > MAX_NAME_CHARS:
        raise InvalidInput(f"{shown(name)} has a path of more than {MAX_NAME_CHARS:,} characters; shorten it")
    if {"", ".", ".."}.intersection(name.split("/")):
        raise InvalidInput(f"{shown(name)} leads out of the folder")


def stays_inside(name: str, target: str) -> bool:
    """Return whether a link `name` to `target` stays in the folder that both are in."""
    path = normpath(join(dirname(name), target))
    return not target.startswith("/") and path != ".." and not path.startswith("../")


def shown(name: str) -> str:
    """Return a path for a message."""
    text = escaped(name)
    return f"'{text if len(text) <= 200 else text[:200] + '...'}'"


def _require_member(member: tarfile.TarInfo) -> None:
    require_name(member.name)
    if member.name == ABOUT_NAME:
        return
    if member.issym():
        if not stays_inside(member.name, member.linkname):
            raise InvalidInput(f"{shown(member.name)} is a link out of the folder, to {shown(member.linkname)}")
    elif not member.isreg() or member.issparse():
        raise InvalidInput(f"{shown(member.name)} is no regular file")
