"""Ranks that outlive their supervisor and their worker are found by the next worker, which was given no name."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from apt_jobs.supervision.process_tree import send
from tests.acceptance.stack import DEADLINE_S, LONG, Stack, attempts_of, has_both_workers, until


@pytest.fixture
def own_stack(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path / "data")
    yield stack
    send(stack.pids(), signal.SIGCONT)
    stack.process.send_signal(signal.SIGINT)
    stack.process.communicate(timeout=DEADLINE_S)
    send(stack.pids(), signal.SIGKILL)


def test_frozen_ranks_of_killed_processes_never_share_a_gpu_with_the_next_attempt(own_stack: Stack) -> None:
    wait_until_up(own_stack)
    with own_stack.client() as client:
        job_id = client.submit({**LONG, "num_ranks": 2})["id"]
        until(lambda: client.checkpoints(job_id))
        name = next(row["name"] for row in client.workers() if row["kind"] == "train")
    frozen = [*own_stack.pids("apt_jobs.training.launch_ranks"), *own_stack.pids("-u", "apt_jobs.training.run")]
    assert len(frozen) == 3, own_stack.story()
    send(frozen, signal.SIGSTOP)  # torchrun as well: it reacts to the death of its parent no more
    send([pid for pid in own_stack.pids() if pid not in frozen], signal.SIGKILL)
    own_stack.process.communicate(timeout=DEADLINE_S)
    assert all(is_alive(pid) for pid in frozen)
    (own_stack.data_dir / "local.json").unlink()
    own_stack.process = own_stack.command("up")
    deadline = time.monotonic() + DEADLINE_S
    while not (ranks := set(own_stack.pids("-u", "apt_jobs.training.run")) - set(frozen)):
        assert time.monotonic() < deadline, own_stack.story()
        time.sleep(0.01)
    assert [pid for pid in frozen if is_alive(pid)] == [], "two trainings at once"
    assert ranks
    wait_until_up(own_stack)
    with own_stack.client() as client:
        assert next(row["name"] for row in client.workers() if row["kind"] == "train") == name
        until(lambda: attempts_of(client, job_id)[-1]["resumed_from_step"])
        client.cancel(job_id)


def wait_until_up(stack: Stack) -> None:
    until(lambda: (stack.data_dir / "local.json").exists() or stack.process.poll() is not None)
    with stack.client() as client:
        until(lambda: has_both_workers(client))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return os.path.exists(f"/proc/{pid}")  # noqa: PTH110
