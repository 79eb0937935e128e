"""Where the unix socket of the embedded Valkey lies.

It lies in the data directory, unless its path would be too long for the kernel. Then `apt-jobs up` makes a folder with
a name that nobody can guess, below `XDG_RUNTIME_DIR` or the temporary directory, and records it in the data directory,
where the other processes find it.
"""

import os
import stat
import tempfile
from pathlib import Path

from apt_jobs.errors import Denied, InvalidInput

UNIX_SOCKET_PATH_MAX = 100  # bytes; unix(7): sun_path holds 108 on Linux, 104 elsewhere
_NAME = "valkey.sock"
_RECORD = "socket_folder"


def find_socket(folder: Path) -> Path:
    """Return the path of the socket that belongs to Valkey's folder in the data directory.

    Raises:
        Denied: the recorded folder is not one that only this user may enter.
    """
    path = folder / _NAME
    if _fits(path):
        return path
    recorded = _read_record(folder)
    if recorded is None:
        return path  # `apt-jobs up` does not run here, and who connects is told that nobody listens
    _require_private(recorded)
    return recorded / _NAME


def prepare_socket(folder: Path) -> Path:
    """Make the socket's folder if it is not there, and return the socket's path. Only `apt-jobs up` calls this.

    Raises:
        Denied: see `find_socket`.
        InvalidInput: no directory has a name that is short enough.
        OSError: the folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    path = folder / _NAME
    if _fits(path):
        return path
    recorded = _read_record(folder)
    if recorded is None or not recorded.is_dir():
        recorded = Path(tempfile.mkdtemp(prefix="apt-jobs-", dir=_runtime_folder()))  # its mode is 0700
        temporary = folder / f"{_RECORD}.tmp"
        temporary.write_bytes(os.fsencode(recorded))
        temporary.replace(folder / _RECORD)
    _require_private(recorded)
    return recorded / _NAME


def remove_socket_folder(folder: Path) -> None:
    """Remove the recorded folder, if there is one, when the Valkey of `folder` has ended."""
    recorded = _read_record(folder)
    if recorded is None:
        return
    (folder / _RECORD).unlink(missing_ok=True)
    try:
        _require_private(recorded)
        (recorded / _NAME).unlink(missing_ok=True)
        recorded.rmdir()
    except (OSError, Denied):  # not ours any more, or in use: it stays
        return


def _fits(path: Path) -> bool:
    return len(os.fsencode(path)) < UNIX_SOCKET_PATH_MAX


def _read_record(folder: Path) -> Path | None:
    try:
        return Path(os.fsdecode((folder / _RECORD).read_bytes()))
    except OSError:
        return None


def _runtime_folder() -> str:
    """`XDG_RUNTIME_DIR` if it is what its specification promises, else a temporary directory with a short name."""
    named = os.environ.get("XDG_RUNTIME_DIR", "")
    for folder in (named, tempfile.gettempdir(), "/tmp"):  # noqa: S108  # a folder of our own is made in it
        is_short = folder.startswith("/") and _fits(Path(folder) / "apt-jobs-01234567" / _NAME)
        if is_short and (folder != named or _is_private(Path(folder))):
            return folder
    raise InvalidInput(
        f"no directory is short enough for a unix socket, neither {tempfile.gettempdir()!r} nor /tmp: set TMPDIR"
    )


def _is_private(folder: Path) -> bool:
    found = folder.lstat() if folder.exists() else None
    return (
        found is not None and stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
    )


def _require_private(folder: Path) -> None:
    if os.path.lexists(folder) and not _is_private(folder):  # not there: nobody listens
        raise Denied(
            f"{folder}, made for the socket of the embedded Valkey, is no folder that only this user may enter: "
            "remove it and start `apt-jobs up` again"
        )
