"""Two workers of one data directory never use the same GPU of a machine."""

import subprocess
import sys
from pathlib import Path

import pytest

from apt_jobs.errors import AlreadyRunning
from apt_jobs.workers.gpu_locks import GpuLocks


def test_a_second_worker_is_refused_the_gpu_and_told_who_has_it(tmp_path: Path) -> None:
    first, second = GpuLocks(), GpuLocks()
    first.lock(tmp_path, "host", [0, 1], "train-a")
    with pytest.raises(AlreadyRunning, match=r"GPU 1 .* worker train-a; .* --gpus"):
        second.lock(tmp_path, "host", [2, 1], "train-b")
    second.lock(tmp_path, "host", [2], "train-b")  # the refusal has let it go
    second.lock(tmp_path, "other", [0, 1], "train-b")  # another machine has GPUs of its own
    first.unlock()
    second.lock(tmp_path, "host", [0, 1], "train-b")
    second.unlock()


def test_workers_without_gpus_lock_nothing(tmp_path: Path) -> None:
    for worker in ("a", "b"):
        GpuLocks().lock(tmp_path, "host", [], worker)


def test_a_killed_worker_leaves_no_lock(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, sys; from apt_jobs.workers.gpu_locks import GpuLocks; "
        "GpuLocks().lock(pathlib.Path(sys.argv[1]), 'host', [0], 'x'); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    locks = GpuLocks()
    locks.lock(tmp_path, "host", [0], "next")
    locks.unlock()
