"""`apt-jobs mcp` under the official client: a sweep is driven to its best job, every call sent twice, once counted."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
import mcp
import pytest
from httpx2 import AsyncClient as HttpClient
from mcp.client.streamable_http import streamable_http_client

from apt_jobs.agents.bounded import MAX_CHARS, bounded
from apt_jobs.client import Client
from apt_jobs.db.access import Role, create_key
from apt_jobs.db.events import append_events
from apt_jobs.db.jobs import claim_next, finish
from apt_jobs.events.kinds import LineLogged, StepTrained, Validated
from apt_jobs.jobs.states import JobState
from tests.conftest import some_port
from tests.integration.client.jobs import url_of
from tests.integration.web.served import DEADLINE_S, Served, until

SWEEP = {
    "spec": {"kind": "train", "queue": "agents", "training": {"max_steps": 2}},
    "parameters": {"training.learning_rate": {"values": [1e-3, 3e-3, 1e-2]}},
    "metric": "val_loss",
}


def answer_of(result: Any) -> dict[str, Any]:
    """What a tool answered: bounded, and the same as structure and as text."""
    assert not result.is_error, result.content
    assert len(result.content[0].text) <= 3 * MAX_CHARS  # indented
    assert json.loads(result.content[0].text) == result.structured_content
    return dict(result.structured_content)


async def twice(agent: mcp.Client, tool: str, **arguments: Any) -> dict[str, Any]:
    """Call a tool two times, at once; the answer of the second."""
    first, second = await asyncio.gather(agent.call_tool(tool, arguments), agent.call_tool(tool, arguments))
    answer_of(first)
    return answer_of(second)


@contextmanager
def worker(served: Served) -> Iterator[None]:
    """Run what is in the queue: the loss is best at a rate of 0.003."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(0.05):
            with served.database.write() as session:
                if (claimed := claim_next(session, "agents", "w", 600.0)) is None:
                    continue
                job = claimed.job
                rate = job.spec["training"]["learning_rate"]
                loss = abs(rate - 3e-3) * 100 + 1
                trained = StepTrained(2, 0, loss, rate, 1.0, 1.0, 1.0)
                events = [LineLogged("info", "rank 0", "a \x1b[31m line"), trained, Validated(2, 0, loss, True)]
                append_events(session, job.id, 1, [(datetime.now(UTC), event) for event in events], 600.0)
                finish(session, job.id, 1, JobState.SUCCEEDED)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(DEADLINE_S)


def test_an_agent_drives_a_sweep_to_its_best_job_and_doubles_nothing(served: Served) -> None:
    environment = {"APT_JOBS_URL": url_of(served), "APT_JOBS_API_KEY": served.key}
    server = mcp.StdioServerParameters(command=sys.executable, args=["-m", "apt_jobs", "mcp"], env=environment)

    async def drive() -> None:
        async with mcp.Client(server) as agent:
            assert {tool.name for tool in (await agent.list_tools()).tools} >= {"create_sweep", "submit_job", "cancel"}
            plan = await twice(agent, "create_sweep", sweep=SWEEP)
            assert (plan["submitted"], plan["num_jobs"]) == (False, 3)
            assert (await twice(agent, "list_sweeps"))["sweeps"] == []
            made = await twice(agent, "create_sweep", sweep=SWEEP, dry_run=False)
            sweep_id = made["sweep"]["id"]
            ended = await twice(agent, "get_sweep", sweep_id=sweep_id, wait_s=60)
            assert ended["state"] == "succeeded"
            best = ended["best"]["job_id"]
            assert ended["best"]["parameters"] == {"training.learning_rate": 3e-3}
            assert (await twice(agent, "get_job", job_id=best))["sweep_id"] == sweep_id
            assert (await twice(agent, "get_metrics", job_id=best))["train_loss"] == [1.0]
            compared = await twice(agent, "compare", job_ids=[row["jobs"][0]["id"] for row in ended["first_settings"]])
            assert compared["settings"]["training.learning_rate"][0] == 3e-3
            assert compared["metrics"]["train_loss"]["last"][0] == 1.0
            assert (await twice(agent, "get_logs", job_id=best))["lines"] == ["rank 0 a \x1b[31m line"]
            job = {"kind": "train", "queue": "nobody"}
            assert not (await twice(agent, "submit_job", job=job))["submitted"]
            submitted = (await twice(agent, "submit_job", job=job, dry_run=False))["job"]["id"]
            assert (await twice(agent, "cancel", kind="job", id=submitted))["job"]["state"] == "cancelled"
            ended_again = await agent.call_tool("cancel", {"kind": "sweep", "id": sweep_id})
            assert "has ended and cannot be cancelled" in ended_again.content[0].text  # type: ignore[union-attr]  # as below
            again = await twice(agent, "submit_job", job=job, dry_run=False, idempotency_key="another")
            assert again["job"]["id"] != submitted
            assert len((await twice(agent, "list_jobs", filter=f"sweep:{sweep_id}"))["jobs"]) == 3
            assert len((await twice(agent, "list_jobs"))["jobs"]) == 5
            await refuses(agent)

    with worker(served):
        asyncio.run(drive())
    with Client(url_of(served), served.key) as client:
        assert len(client.sweeps()) == 1


async def refuses(agent: mcp.Client) -> None:
    """What goes wrong is a sentence for the agent, never a traceback."""
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("get_job", {"job_id": "job_none"}, "no job"),
        ("get_job", {"job_id": "../keys"}, "no job"),
        ("submit_job", {"job": {"kind": "train", "nonsense": 1}}, "nonsense"),
        ("create_sweep", {"sweep": {**SWEEP, "parameters": {}}}, "parameters"),
        ("create_sweep", {"sweep": {**SWEEP, "metric": 7}, "dry_run": False}, "metric"),
        ("list_jobs", {"filter": "nonsense:x"}, "no field"),
        ("compare", {"job_ids": ["job_a"]}, "at least 2"),
        ("compare", {"job_ids": ["job_a", "job_b"]}, "compare"),
        ("list_jobs", {"limit": 1_000}, "less than or equal to 50"),
        ("cancel", {"kind": "sweep", "id": "sweep_none"}, "no sweep"),
    ]
    for tool, arguments, words in wrong:
        result = await agent.call_tool(tool, arguments)
        assert result.is_error
        assert words in result.content[0].text  # type: ignore[union-attr]  # of text, or the test fails
        assert "Traceback" not in result.content[0].text  # type: ignore[union-attr]  # as above


def test_by_http_each_caller_has_the_role_of_its_key(served: Served) -> None:
    with served.database.write() as session:
        viewer = create_key(session, "agent", Role.VIEWER)
    port = some_port()
    environment = {**os.environ, "APT_JOBS_URL": url_of(served), "APT_JOBS_API_KEY": "unused"}
    command = [sys.executable, "-m", "apt_jobs", "mcp", "--http", "--port", str(port)]

    async def use() -> None:
        key = {"authorization": f"Bearer {viewer}"}
        async with (
            HttpClient(headers=key, trust_env=False) as http,
            mcp.Client(streamable_http_client(f"http://127.0.0.1:{port}/mcp", http_client=http)) as agent,
        ):
            answer_of(await agent.call_tool("list_jobs", {}))
            result = await agent.call_tool("submit_job", {"job": {"kind": "train"}, "dry_run": False})
            assert result.is_error
            assert "viewer" in result.content[0].text  # type: ignore[union-attr]  # of text, or the test fails

    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            until(lambda: status(port) is not None or process.poll() is not None)
            assert status(port) == 401
            assert status(port, authorization="Bearer x", host="evil.example") in (400, 403, 421)
            assert status(port, authorization="Bearer x", origin="https://evil.example") in (400, 403)
            asyncio.run(use())
        finally:
            process.kill()


def status(port: int, **headers: str) -> int | None:
    try:
        return httpx.post(f"http://127.0.0.1:{port}/mcp", json={}, headers=headers, trust_env=False).status_code
    except httpx.TransportError:
        return None


@pytest.mark.parametrize(
    "answer",
    [
        {"text": "x" * 1_000_000},
        {"rows": [{"a": "y" * 100} for _ in range(10_000)]},
        {f"key {number}": number for number in range(100_000)},
        {"deep": [[[[[["z" * 10_000] * 50] * 50]]]]},
    ],
    ids=["a long text", "many rows", "many keys", "deep"],
)
def test_an_answer_is_bounded_and_says_so(answer: dict[str, Any]) -> None:
    cut = bounded(answer)
    assert cut["is_cut"]
    assert len(json.dumps(cut)) <= MAX_CHARS
    assert bounded({"a": 1}) == {"a": 1}
