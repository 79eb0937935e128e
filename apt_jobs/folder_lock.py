"""A lock file beside a folder that processes share: who uses the folder holds it with others, who changes it alone."""

import fcntl
import os
from pathlib import Path


class FolderLock:
    """The lock of one prepared folder. Closing it, or the end of the process, releases it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def try_exclusive(self) -> bool:
        """Hold it alone, if nobody else holds it."""
        return self._try(fcntl.LOCK_EX)

    def try_shared(self) -> bool:
        """Hold it with others, if nobody holds it alone."""
        return self._try(fcntl.LOCK_SH)

    def keep_over_exec(self) -> None:
        """Hold it also in the program that this process becomes."""
        os.set_inheritable(self._fd, True)

    def close(self) -> None:
        """Release it."""
        os.close(self._fd)

    def _try(self, how: int) -> bool:
        try:
            fcntl.flock(self._fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return self._is_current()

    def _is_current(self) -> bool:
        """Return whether the file was not removed before it was locked; if it was, open the one that is there now."""
        try:
            if os.path.samestat(os.fstat(self._fd), self._path.stat()):
                return True
        except FileNotFoundError:
            pass
        os.close(self._fd)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return False


def lock_path(folder: Path) -> Path:
    """Return the path of a prepared folder's lock."""
    return folder.with_name(f"{folder.name}.lock")
