"""The name of a worker that was given none: the same after every restart, so that its leftovers are found.

A name is held by a lock on a file in the data directory, which ends with the process, however it ends. A second worker
of the same kind beside a living one gets a number.
"""

import fcntl
import hashlib
import os
import socket
from collections.abc import Sequence

from apt_jobs.errors import AlreadyRunning, Unavailable
from apt_jobs.settings import Settings

MAX_NUMBER = 100
DIGEST_CHARS = 6
_held: list[int] = []  # file descriptors, open as long as this process lives


def hold_default_name(settings: Settings, kind: str, gpus: Sequence[int] | None = None) -> str:
    """Return a name that no other worker of this machine has, and hold it until this process ends.

    It is made of the kind, the host and the GPUs that the worker was told to use; where several data directories may
    share a database, of the data directory as well.

    Raises:
        AlreadyRunning: too many workers of this kind run here.
        Unavailable: the data directory takes no file.
    """
    name = f"{kind}-{socket.gethostname()}"
    if gpus is not None:
        name += f"-gpus-{'-'.join(map(str, gpus)) or 'none'}"
    if settings.database_url is not None:
        name += f"-{hashlib.sha256(str(settings.root).encode(errors='surrogateescape')).hexdigest()[:DIGEST_CHARS]}"
    for number in range(1, MAX_NUMBER + 1):
        numbered = name if number == 1 else f"{name}-{number}"
        if _hold(settings, numbered):
            return numbered
    raise AlreadyRunning(f"{MAX_NUMBER} workers named {name} run already; name this one with --name")


def _hold(settings: Settings, name: str) -> bool:
    folder = settings.locks_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise Unavailable(f"cannot hold the worker's name in {folder}: {exc.strerror}; give it a --name") from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return False
    except OSError as exc:
        os.close(fd)
        raise Unavailable(f"{folder} allows no locks ({exc.strerror}); give the worker a --name") from exc
    _held.append(fd)
    return True
