"""One training over two nodes, each with a torchrun of its own, which meet over TCP."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from apt_jobs.client.client import Client
from apt_jobs.db.clock import now_plus
from apt_jobs.db.models import WorkerRow
from tests.acceptance.stack import DEADLINE_S, LONG, TINY, WAITS_ONCE, Stack, attempts_of, until

CLUSTER = {"queue": "cluster", "num_nodes": 2}


def stop(stack: Stack, process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE_S) == 0, stack.story()


@pytest.fixture(scope="module")
def head(stack: Stack) -> Iterator[None]:
    """A worker that has two nodes, of which only its own is up."""
    process = stack.worker("cluster", "train", "--queue=cluster", "--name=cluster", "--num-nodes=2")
    yield
    stop(stack, process)


def start_node(stack: Stack, client: Client) -> "subprocess.Popen[str]":
    """The second node."""
    process = stack.worker("node-1", "node", "--head=cluster")
    until(lambda: any(row["name"] == "cluster/node-1" and row["pid"] == process.pid for row in client.workers()))
    return process


def count_as_alive(stack: Stack, name: str) -> None:
    """Let no heartbeat of a dead process be missed until its successor beats: a busy machine starts that late."""
    with stack.database() as database, database.write() as session:
        session.execute(update(WorkerRow).where(WorkerRow.name == name).values(heartbeat_at=now_plus(DEADLINE_S)))


@pytest.fixture
def node(stack: Stack, client: Client, head: None) -> Iterator[None]:
    process = start_node(stack, client)
    yield
    stop(stack, process)


def ranks(stack: Stack, node_rank: int) -> list[int]:
    """Rank processes that a node's torchrun started."""
    found = []
    for pid in stack.pids("apt_jobs.training.run", "--run-file"):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"GROUP_RANK=%d" % node_rank in environment:
            found.append(pid)
    return found


def test_a_job_waits_for_the_node_that_is_missing(client: Client, head: None) -> None:
    job = client.submit({**TINY, **CLUSTER})
    until(lambda: "node 1 of worker cluster is not up" in (client.get(job["id"])["reason"] or ""))
    assert client.cancel(job["id"])["state"] == "cancelled"


def test_a_training_runs_over_two_nodes(client: Client, node: None) -> None:
    job = client.wait(client.submit({**TINY, **CLUSTER})["id"])
    assert job["state"] == "succeeded", job
    started = next(event for event in client.events(job["id"]) if event["kind"] == "started")
    assert started["world_size"] == 2


def test_a_lost_node_breaks_the_attempt_and_the_next_one_resumes(stack: Stack, client: Client, node: None) -> None:
    more: dict[str, Any] = {**LONG["training"], "max_steps": 80}
    job = client.submit({**LONG, **CLUSTER, "training": more})
    until(lambda: client.checkpoints(job["id"]))
    os.kill(until(lambda: ranks(stack, 1))[0], signal.SIGKILL)
    ended = client.wait(job["id"])
    first, second = attempts_of(client, job["id"])
    assert (first["outcome"], second["outcome"], ended["step"]) == ("queued", "succeeded", 80)
    assert second["resumed_from_step"] >= 20
    assert ranks(stack, 0) == ranks(stack, 1) == []


def test_an_attempt_breaks_when_the_ranks_of_a_node_end_before_they_meet_the_others(
    stack: Stack, client: Client, node: None
) -> None:
    job = client.submit({**WAITS_ONCE, **CLUSTER})
    until(lambda: ranks(stack, 0) and ranks(stack, 1))
    os.kill(until(lambda: stack.pids("apt_jobs.training.launch_ranks", "node_rank=1"))[0], signal.SIGKILL)
    assert client.wait(job["id"])["state"] == "succeeded"
    first = attempts_of(client, job["id"])[0]
    assert "cluster/node-1 ended early: torchrun ended with status -9" in first["reason"]


def test_an_attempt_breaks_when_a_node_is_started_again(stack: Stack, client: Client, head: None) -> None:
    killed = start_node(stack, client)
    job = client.submit({**WAITS_ONCE, **CLUSTER})
    until(lambda: ranks(stack, 0) and ranks(stack, 1))
    killed.kill()
    killed.wait()
    count_as_alive(stack, "cluster/node-1")
    successor = start_node(stack, client)
    assert client.wait(job["id"])["state"] == "succeeded"
    first = attempts_of(client, job["id"])[0]
    assert "cluster/node-1 ended early: its process was started again" in first["reason"]
    stop(stack, successor)
