"""What an idle stack costs: CPU time of all processes of `apt-jobs up` while nobody asks for anything."""

import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.rows import Row
from tests.acceptance.stack import DEADLINE_S, Stack, has_both_workers, until

CALM_S = 20.0
MEASURED_S = 60.0


def rows() -> Iterator[Row]:
    """`idle/stack`, in CPU seconds a second: the share of one core."""
    with tempfile.TemporaryDirectory() as folder:
        stack = Stack(Path(folder), APT_JOBS_LEASE_S="60", APT_JOBS_HEARTBEAT_S="10")  # as users have it
        try:
            until(lambda: (stack.data_dir / "local.json").exists())
            with stack.client() as client:
                until(lambda: has_both_workers(client))
            time.sleep(CALM_S)
            before, began = _cpu_s(stack), time.monotonic()
            time.sleep(MEASURED_S)
            share = (_cpu_s(stack) - before) / (time.monotonic() - began)
        finally:
            stack.process.send_signal(signal.SIGINT)
            stack.process.communicate(timeout=DEADLINE_S)
    yield Row("idle/stack", share, 1.0, "one core", share, "CPU s/s")


def _cpu_s(stack: Stack) -> float:
    """User and system time of the stack's processes, Valkey's included."""
    processes = [psutil.Process(stack.process.pid), *psutil.Process(stack.process.pid).children(recursive=True)]
    times = [process.cpu_times() for process in processes]
    return sum(one.user + one.system for one in times)
