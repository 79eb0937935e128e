"""Keep two workers of one data directory off the same GPU of a machine: a lock file for each GPU and host.

A lock ends with its process, whatever way that ends, so nothing has to be cleaned up.
"""

import fcntl
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from apt_jobs.errors import AlreadyRunning

logger = logging.getLogger(__name__)

MAX_NAME_BYTES = 300  # of a worker, as read from a lock file


class GpuLocks:
    """The GPUs that this process may use."""

    def __init__(self) -> None:
        self._files: list[int] = []

    def lock(self, folder: Path, host: str, gpus: Sequence[int], worker: str) -> None:
        """Lock the GPUs until `unlock`, or until this process ends.

        Args:
            folder: of lock files, which all workers of the data directory use.
            host: name of this machine, as other machines may share the folder.
            gpus: indexes of GPUs of this machine.
            worker: name of this worker, for the message to the others.

        Raises:
            AlreadyRunning: another worker of this machine uses one of them; none is locked then.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for gpu in gpus:
                self._lock_one(folder / f"gpu-{re.sub(r'[^A-Za-z0-9.-]', '_', host)}-{gpu}.lock", gpu, worker)
        except AlreadyRunning:
            self.unlock()
            raise
        except OSError as exc:  # a file system without locks: the operator has to see to it
            logger.warning("cannot lock GPUs", extra={"folder": str(folder), "why": str(exc)})

    def unlock(self) -> None:
        """Let other workers have the GPUs."""
        for file in self._files:
            os.close(file)
        self._files.clear()

    def _lock_one(self, path: Path, gpu: int, worker: str) -> None:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._files.append(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            other = os.pread(file, MAX_NAME_BYTES, 0).decode("utf-8", "replace").strip() or "another worker"
            raise AlreadyRunning(
                f"GPU {gpu} of this machine is used by worker {other}; stop that one, or give this worker other GPUs, "
                "as --gpus 1, or --gpus '' for none"
            ) from exc
        os.ftruncate(file, 0)
        os.pwrite(file, worker.encode()[:MAX_NAME_BYTES], 0)
