"""Pack a folder for a job: what git tracks and what it does not ignore; without git, all but caches and environments.

Nothing is read before the sizes are known: a sparse file of a terabyte is refused by its name at once.
"""

import hashlib
import io
import os
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit, urlunsplit

from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.code import (
    ABOUT_NAME,
    DEFAULT_MAX_BYTES,
    FILE_MODE,
    MAX_DIFF_CHARS,
    MAX_FILES,
    MTIME_S,
    PROGRAM_MODE,
    CodeOrigin,
    require_name,
    shown,
    stays_inside,
)

GIT_TIMEOUT_S = 120.0
SKIPPED_FOLDERS = frozenset(
    (
        *(".git", ".hg", ".svn", "__pycache__", ".venv", "venv", "node_modules", ".mypy_cache", ".ruff_cache"),
        *(".pytest_cache", ".ipynb_checkpoints", ".apt_jobs", "apt_jobs_runs"),
    )
)
_OWN_FOLDERS = (".apt_jobs", "apt_jobs_runs")  # of this package; nobody means to pack them
_MEMORY_BYTES = 8 << 20
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PackedCode:
    """A packed folder. `file` is at its beginning."""

    file: IO[bytes]
    sha256: str
    size_bytes: int
    names: tuple[str, ...]
    origin: CodeOrigin

    @property
    def num_files(self) -> int:
        """How many files and links it has."""
        return len(self.names)


@contextmanager
def pack_folder(folder: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> Iterator[PackedCode]:
    """Pack a folder into a temporary file.

    Raises:
        InvalidInput: it is too large, or holds what a worker could not have; the message names the file.
    """
    if not folder.is_dir():
        raise InvalidInput(f"there is no folder {shown(str(folder))}: --workdir names the folder of the code")
    root = folder.resolve()
    names = packed_names(root)
    sizes = {name: _size_bytes(root, name) for name in names}
    _require_sizes(root, sizes, max_bytes)
    origin = _origin(root)
    with tempfile.SpooledTemporaryFile(_MEMORY_BYTES) as file:
        digest = _write(file, root, sizes, origin)
        size_bytes = file.tell()
        if size_bytes > max_bytes:
            raise InvalidInput(f"{shown(str(root))} is {size_bytes:,} bytes when packed; at most {max_bytes:,}")
        file.seek(0)
        yield PackedCode(file, digest, size_bytes, tuple(names), origin)


def packed_names(root: Path) -> list[str]:
    """Return the files of a folder that are packed, relative to it, sorted.

    Raises:
        InvalidInput: there are none or too many, or git cannot be asked.
    """
    listed = _listed_by_git(root) if _is_in_git(root) else _walked(root)
    names = sorted(name for name in listed if name.split("/")[0] not in _OWN_FOLDERS and name != ABOUT_NAME)
    if not names:
        raise InvalidInput(f"{shown(str(root))} has no file that git does not ignore: there is nothing to run")
    if len(names) > MAX_FILES:
        raise InvalidInput(f"{shown(str(root))} has more than {MAX_FILES:,} files: add some to .gitignore")
    for name in names:
        require_name(name)
    return names


def _is_in_git(root: Path) -> bool:
    try:
        done = _git(root, "rev-parse", "--is-inside-work-tree")
    except FileNotFoundError:
        return False  # no git here
    if done.returncode == 0:
        return done.stdout.strip() == b"true"
    if b"not a git repository" in done.stderr:
        return False
    raise InvalidInput(f"git cannot say what {shown(str(root))} holds: {_first_line(done.stderr)}")


def _listed_by_git(root: Path) -> list[str]:
    done = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate")
    if done.returncode != 0:
        raise InvalidInput(f"git cannot list the files of {shown(str(root))}: {_first_line(done.stderr)}")
    names: list[str] = []
    for raw in done.stdout.split(b"\0"):
        name = _decoded(raw.rstrip(b"/"))
        path = root / name
        if not name or not os.path.lexists(path):
            continue  # deleted, but not in git yet
        if path.is_dir() and not path.is_symlink():  # a submodule, or a repository in this one
            names += [f"{name}/{inner}" for inner in _listed_by_git(path)]
        else:
            names.append(name)
        if len(names) > MAX_FILES:
            break
    return names


def _walked(root: Path) -> list[str]:
    names: list[str] = []
    for parent, folders, files in os.walk(root):
        inside = Path(parent).relative_to(root)
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        links = [name for name in folders if Path(parent, name).is_symlink()]
        kept = [name for name in files if not name.endswith(".pyc")]
        names += [_decoded(os.fsencode(inside / name)) for name in (*links, *kept)]
        if len(names) > MAX_FILES:
            break
    return names


def _size_bytes(root: Path, name: str) -> int:
    """Return the size of a file or link that can be packed."""
    path = root / name
    try:
        status = path.lstat()
    except OSError as exc:
        raise InvalidInput(f"{shown(name)} cannot be read: {exc.strerror}") from exc
    if stat.S_ISLNK(status.st_mode):
        target = _decoded(os.fsencode(path.readlink()))
        if not stays_inside(name, target) or root not in path.resolve().parents:
            raise InvalidInput(
                f"{shown(name)} is a link out of the folder, to {shown(target)}; copy the file, or add the link to "
                ".gitignore"
            )
        return 0
    if not stat.S_ISREG(status.st_mode):
        raise InvalidInput(f"{shown(name)} is no regular file; remove it, or add it to .gitignore")
    return status.st_size


def _require_sizes(root: Path, sizes: dict[str, int], max_bytes: int) -> None:
    total = sum(sizes.values())
    if total <= max_bytes:
        return
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    named = ", ".join(f"{shown(name)} ({sizes[name]:,} bytes)" for name in largest)
    raise InvalidInput(
        f"{shown(str(root))} has {total:,} bytes and at most {max_bytes:,} are packed; the largest: {named}. "
        "Add data to .gitignore and upload it with `apt-jobs datasets add`"
    )


def _write(file: IO[bytes], root: Path, sizes: dict[str, int], origin: CodeOrigin) -> str:
    """Write the tar file; returns its SHA-256."""
    about = origin.model_dump_json().encode()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(_member(ABOUT_NAME, len(about)), io.BytesIO(about))
        for name, size_bytes in sizes.items():
            _add(tar, root, name, size_bytes)
    file.seek(0)
    digest = hashlib.sha256()
    while part := file.read(_READ_BYTES):
        digest.update(part)
    return digest.hexdigest()


def _add(tar: tarfile.TarFile, root: Path, name: str, size_bytes: int) -> None:
    path = root / name
    try:
        if path.is_symlink():
            link = _member(name, 0)
            link.type, link.linkname = tarfile.SYMTYPE, _decoded(os.fsencode(path.readlink()))
            tar.addfile(link)
            return
        with path.open("rb") as opened:
            is_program = bool(os.fstat(opened.fileno()).st_mode & stat.S_IXUSR)
            tar.addfile(_member(name, size_bytes, PROGRAM_MODE if is_program else FILE_MODE), opened)
            if opened.read(1):
                raise OSError(0, "it grew while it was packed")
    except OSError as exc:  # tarfile raises one for a file that became shorter
        raise InvalidInput(f"{shown(name)} cannot be packed: {exc.strerror or exc}") from exc


def _member(name: str, size_bytes: int, mode: int = FILE_MODE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size_bytes, mode, MTIME_S
    return info


def _origin(root: Path) -> CodeOrigin:
    if not _is_in_git(root):
        return CodeOrigin()
    commit = _git_word(root, "rev-parse", "--verify", "--quiet", "HEAD")
    branch = _git_word(root, "symbolic-ref", "--quiet", "--short", "HEAD")
    remote = _without_password(_git_word(root, "config", "--get", "remote.origin.url"))
    status = _git(root, "status", "--porcelain", "--untracked-files=normal", "--", ".")
    return CodeOrigin(
        commit=commit,
        branch=branch,
        remote=remote,
        is_dirty=bool(status.stdout.strip()),
        diff=_diff(root) if commit is not None else "",
    )


def _diff(root: Path) -> str:
    """Return how tracked files differ from the commit, cut where it is too long."""
    command = _git_command("diff", "HEAD", "--relative", "--no-color", "--no-ext-diff", "--no-textconv", "--", ".")
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        raw = process.stdout.read(4 * MAX_DIFF_CHARS + 1)
        process.kill()
    text = raw.decode("utf-8", "replace")
    return text if len(text) <= MAX_DIFF_CHARS else f"{text[:MAX_DIFF_CHARS]}\n[the rest is left out]\n"


def _git(root: Path, *arguments: str) -> "subprocess.CompletedProcess[bytes]":
    try:
        return subprocess.run(
            _git_command(*arguments),
            cwd=root,
            capture_output=True,
            check=False,
            timeout=GIT_TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as exc:
        raise InvalidInput(f"git did not answer within {GIT_TIMEOUT_S:.0f} s in {shown(str(root))}") from exc


def _git_command(*arguments: str) -> Sequence[str]:
    return ["git", "-c", "core.quotepath=off", *arguments]


def _git_word(root: Path, *arguments: str) -> str | None:
    done = _git(root, *arguments)
    text = done.stdout.decode("utf-8", "replace").strip()[:1_000]
    return text if done.returncode == 0 and text else None


def _without_password(url: str | None) -> str | None:
    if url is None or "://" not in url:
        return url
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as exc:
        raise InvalidInput(f"{raw.decode('ascii', 'backslashreplace')!r} is no UTF-8; rename the file") from exc


def _first_line(raw: bytes) -> str:
    return (raw.decode("utf-8", "replace").strip().splitlines() or ["it failed"])[0][:300]
