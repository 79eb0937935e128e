"""What a killed worker leaves on its GPUs is gone before they are used again; what is another's stays."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from apt_jobs.errors import Unavailable
from apt_jobs.supervision import process_tree
from apt_jobs.supervision.process_tree import (
    WORKER_MARKER,
    ProcessTree,
    clear_leftovers,
    kill_marked,
    marked_processes,
)
from tests.acceptance.stack import until

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"

WRITE = "open('small', 'wb').write(bytes(1000)); open('large', 'wb').truncate(1 << 40)"
FORK = """
import os, signal
if os.getuid() == 0:  # the kernel counts no processes of root
    os.setuid(65534)
for _ in range(100):
    if os.fork() == 0:
        signal.pause()
"""


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


@pytest.mark.parametrize(
    ("code", "limits", "shown"),
    [
        (WRITE, {resource.RLIMIT_FSIZE: 10_000}, "File too large"),  # a sparse file of a terabyte
        (FORK, {resource.RLIMIT_NPROC: 20}, "Resource temporarily unavailable"),
    ],
)
def test_a_process_of_a_tree_keeps_to_its_limits(tmp_path: Path, code: str, limits: dict[int, int], shown: str) -> None:
    code = f"import os; os.chdir({str(tmp_path)!r})\n{code}"
    tree = ProcessTree([sys.executable, "-c", code], os.environ, f"limits:{tmp_path}", tmp_path / "log", limits)
    try:
        until(lambda: tree.poll() is not None)
        assert tree.poll() == 1
        assert shown in (tmp_path / "log").read_text()
    finally:
        for process in marked_by_others(f"limits:{tmp_path}"):
            os.kill(process, 9)
        tree.kill()
    assert not (tmp_path / "large").exists() or (tmp_path / "large").stat().st_size == 0


def marked_by_others(marker: str) -> list[int]:
    """Processes with this marker, also those that have become another user's."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"APT_JOBS_ATTEMPT={marker}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found
