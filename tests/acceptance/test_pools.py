"""A pool of nodes: a training takes any of them, and another one when one fails."""

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from apt_jobs.client.client import Client
from tests.acceptance.stack import DEADLINE_S, WAITS_ONCE, Stack, attempts_of, until

NODES = ("pool-node-a", "pool-node-b")


def stop(stack: Stack, process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE_S) == 0, stack.story()


@pytest.fixture
def pool(stack: Stack, client: Client) -> Iterator[None]:
    """A worker that may lead, and two nodes."""
    processes = [stack.worker(name, "node", "--pool=gpu", f"--name={name}") for name in NODES]
    until(lambda: {row["name"] for row in client.workers()} >= set(NODES))
    processes.append(stack.worker("lead", "train", "--queue=pool", "--name=lead", "--pool=gpu"))
    yield
    for process in reversed(processes):
        stop(stack, process)


def node_of(client: Client, job_id: str) -> str | None:
    """The node that takes part in the job now."""
    return next(
        (row["name"] for row in client.workers() if row["name"] in NODES and row["current_job_id"] == job_id), None
    )


def test_a_training_takes_another_node_of_the_pool_when_one_fails(stack: Stack, client: Client, pool: None) -> None:
    job = client.submit({**WAITS_ONCE, "queue": "pool", "num_nodes": 2})
    first = until(lambda: node_of(client, job["id"]))
    launcher = until(lambda: stack.pids("apt_jobs.training.launch_ranks", "node_rank=1"))[0]
    os.kill(launcher, signal.SIGKILL)
    assert client.wait(job["id"])["state"] == "succeeded", stack.story()
    broken, _ = attempts_of(client, job["id"])
    assert f"{first} ended early: torchrun ended with status -9" in broken["reason"]
    rows = {row["name"]: row for row in client.workers()}
    assert "ended early" in (rows[first]["paused_reason"] or "")
    other = next(name for name in NODES if name != first)
    assert rows[other]["paused_reason"] is None
    assert (stack.data_dir / "runs" / job["id"] / "attempt-2" / "run.json").read_text().count(f'"{other}"') == 1


def test_a_node_belongs_to_a_pool_or_to_a_worker(stack: Stack) -> None:
    for arguments, words in (
        (["node"], "give either --pool NAME or --head NAME"),
        (["node", "--pool=a", "--head=b"], "give either --pool NAME or --head NAME"),
        (["node", "--pool=../x"], "is no name of a pool"),
        (["train", "--pool=a", "--num-nodes=2"], "leave one of them out"),
    ):
        process = stack.command("worker", *arguments)
        _, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode != 0
        assert words in errors
