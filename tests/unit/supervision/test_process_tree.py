"""What a killed worker leaves on its GPUs is gone before they are used again; what is another's stays."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from apt_jobs.errors import Unavailable
from apt_jobs.supervision import process_tree
from apt_jobs.supervision.process_tree import WORKER_MARKER, clear_leftovers, kill_marked, marked_processes

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"


@contextmanager
def rank_of(worker: str) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-c", STUBBORN]
    with subprocess.Popen(command, env={**os.environ, WORKER_MARKER: worker}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_ranks_of_an_earlier_process_of_the_worker_are_ended() -> None:
    with rank_of("/data:a") as left, rank_of("/data:b") as other:
        assert marked_processes("/data:a", WORKER_MARKER) == [left.pid]
        assert clear_leftovers("/data:a", timeout_s=0.2) == 1
        assert left.wait() == -9
        assert other.poll() is None
    assert clear_leftovers("/data:a", timeout_s=0.2) == 0


def test_what_even_sigkill_does_not_end_is_waited_for_no_longer_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_tree, "KILL_TIMEOUT_S", 0.2)
    monkeypatch.setattr(process_tree, "send", lambda pids, number: None)  # as if it hung in the kernel
    with rank_of("/data:c") as hanging:
        with pytest.raises(Unavailable, match=rf"hold its GPUs: processes {hanging.pid}$"):
            clear_leftovers("/data:c", timeout_s=0.1)
        assert kill_marked("/data:c", WORKER_MARKER) == [hanging.pid]
