"""What a training feels when nothing behind its spool works: the step time during a fault against that around it."""

import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path

import torch
from torch import nn

from apt_jobs.db.engine import Database
from apt_jobs.events.spool import SpoolWriter
from apt_jobs.gradient_monitor.monitor import GradientMonitor
from apt_jobs.settings import Settings
from benchmarks.rows import Row, paired_row
from benchmarks.stored_steps import stored_steps
from tests.acceptance.stack import DEADLINE_S, Stack, has_both_workers, until

SCRIPT = Path(__file__).parent / "latency_training.py"
NUM_ROUNDS = 4  # of each fault
WINDOW_S = 3.0  # with the fault, and as long without
CALM_S = 1.0  # after a fault, while what waited is sent
NUM_DISK_STEPS = 150  # of one block
NUM_DISK_ROUNDS = 6
PEER = "the same training without the fault"

Window = tuple[float, float]  # seconds since 1970


def rows() -> Iterator[Row]:
    """`stream/training-stall/FAULT`: milliseconds a step."""
    yield from _service_rows()
    yield _disk_row()


def _service_rows() -> Iterator[Row]:
    names = json.dumps({"steps": str(SCRIPT)})
    with tempfile.TemporaryDirectory() as folder:
        environment = {"APT_JOBS_LEASE_S": "60", "APT_JOBS_HEARTBEAT_S": "10", "APT_JOBS_ENTRY_POINTS": names}
        stack = Stack(Path(folder), **environment)
        try:
            until(lambda: (stack.data_dir / "local.json").exists())
            with stack.client() as client:
                until(lambda: has_both_workers(client))
                arguments = {"steps": 1_000_000, "shortest-s": 0.0, "longest-s": 0.0}
                spec = {"kind": "train", "entry_point": "steps", "num_ranks": 1, "arguments": arguments}
                job_id = client.submit(spec)["id"]
                until(lambda: (client.get(job_id)["step"] or 0) > 50)
                windows = {name: [_windows(stack, fault) for _ in range(NUM_ROUNDS)] for name, fault in FAULTS.items()}
                client.cancel(job_id)
                client.wait(job_id)
                steps = stored_steps(client, job_id)
        finally:
            stack.process.send_signal(signal.SIGINT)
            stack.process.communicate(timeout=DEADLINE_S)
    numbers = [step["step"] for step in steps]
    assert numbers == list(range(1, len(numbers) + 1)), "a step was lost"
    times: list[tuple[float, float]] = [
        (datetime.fromisoformat(step["at"]).timestamp(), step["step_time_ms"]) for step in steps[1:]
    ]

    def median_ms(window: Window) -> float:
        return float(statistics.median(ms for at, ms in times if window[0] < at < window[1]))

    for name, pairs in windows.items():
        faulty, sound = [median_ms(pair[0]) for pair in pairs], [median_ms(pair[1]) for pair in pairs]
        yield paired_row(f"stream/training-stall/{name}", faulty, sound, PEER, "ms")


def _windows(stack: Stack, fault: Callable[[Stack], AbstractContextManager[None]]) -> tuple[Window, Window]:
    with fault(stack):
        began = time.time()
        time.sleep(WINDOW_S)
        faulty = began, time.time()
    time.sleep(CALM_S)
    began = time.time()
    time.sleep(WINDOW_S)
    return faulty, (began, time.time())


@contextmanager
def _frozen(pids: list[int]) -> Iterator[None]:
    assert pids, "there is nothing to freeze"
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def _locked_database(stack: Stack) -> Iterator[None]:
    database = Database(Settings(data_dir=stack.data_dir).database)
    with database.write():
        yield
    database.dispose()


FAULTS: dict[str, Callable[[Stack], AbstractContextManager[None]]] = {
    "redis": lambda stack: _frozen(stack.pids("valkey-server")),
    "database": _locked_database,
    "relay": lambda stack: _frozen(stack.pids("supervise")),
}


def _disk_row() -> Row:
    """Make the spool a pipe that nobody reads: every write to it hangs."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pipe = Path(folder) / "pipe"
        os.mkfifo(pipe)
        reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        hanging, sound = SpoolWriter(pipe), SpoolWriter(Path(folder) / "file")
        faulty_ms, sound_ms = [], []
        _block_ms(hanging)  # fills the pipe
        _block_ms(sound)
        for _ in range(NUM_DISK_ROUNDS):
            faulty_ms.append(_block_ms(hanging))
            sound_ms.append(_block_ms(sound))
        os.close(reading)  # whoever still writes to it is recorded so
        hanging.close()
        sound.close()
    return paired_row("stream/training-stall/disk", faulty_ms, sound_ms, PEER, "ms")


def _block_ms(spool: SpoolWriter) -> float:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(75)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    times_ms = []
    with GradientMonitor(model, optimizer, spool=spool) as monitor:
        for _ in range(NUM_DISK_STEPS):
            began = time.perf_counter()
            loss = model(torch.randn(64, 64)).square().mean()
            loss.backward()
            monitor.step(loss=loss)
            optimizer.step()
            optimizer.zero_grad()
            times_ms.append((time.perf_counter() - began) * 1000.0)
    return statistics.median(times_ms)
