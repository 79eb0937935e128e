"""Promise 18: a generation that was answered ends. Streams and a batch, while worker, web and Valkey are killed.

A stream ends with its whole text, begins again after `restarted`, or breaks off with the web process; its job ends in
any case. No line of the batch is lost, none is answered twice.
"""

import json
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select

from apt_jobs.db.models import Job
from apt_jobs.jobs.states import TERMINAL_STATES
from tests.faults.forked import Forker
from tests.faults.record import Campaign, campaign, count
from tests.faults.service import DEADLINE_S, Service, service, until
from tests.faults.test_submissions import is_up, rest
from tests.unit.generation.tiny_model import llama_config, save_model

NUM_CLIENTS = count(6, 200)
NUM_ROUNDS = count(1, 5)  # of each dialect; each kills all three
NUM_LINES = count(10, 100)  # of the batch of a round
NUM_TOKENS = 300
SILENCE_S = 60.0  # a comment comes every second
BODY = {"model": "tiny", "text": "The queue is", "max_length": NUM_TOKENS, "temperature": 0, "stream": True}
VICTIMS = ("generate", "web", "valkey")


@dataclass(slots=True)
class Client:
    """One stream, as its reader saw it."""

    job_id: str | None = None  # none: it was not answered
    text: str = ""
    ended: str = "broke off"  # or `end`, `error`, `hangs`
    whole: str = ""
    num_restarts: int = 0
    has_begun: threading.Event = field(default_factory=threading.Event)

    def read(self, client: httpx.Client) -> None:
        """Read to the end, whatever comes."""
        try:
            with client.stream("POST", "/api/generate", json=BODY, timeout=SILENCE_S) as answer:
                if answer.status_code == httpx.codes.OK:
                    self.job_id = answer.headers["location"].rpartition("/")[2]
                    for line in answer.iter_lines():
                        self._receive(line)
        except httpx.ReadTimeout:
            self.ended = "hangs"
        except httpx.HTTPError:
            pass
        self.has_begun.set()

    def _receive(self, line: str) -> None:
        if line.startswith("event: "):
            self.ended = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = json.loads(line.removeprefix("data: "))
            if self.ended == "delta":
                self.text += data["text"]
                self.has_begun.set()
            elif self.ended == "restarted":
                self.text, self.num_restarts = "", self.num_restarts + 1
            elif self.ended == "end":
                self.whole = data["generated_text"]


def test_what_was_answered_ends_whatever_is_killed(tmp_path: Path, process_test_url: str, forker: Forker) -> None:
    folder = tmp_path / "s"
    with (
        campaign(18, "kill -9 of worker, web and Valkey under streams and a batch") as found,
        service(folder, process_test_url, forker) as running,
    ):
        found.on(running.database.dialect)
        chance = random.Random(found.seed)
        save_model(folder / "models" / "tiny", llama_config(max_position_embeddings=1_024))
        running.start_web()
        running.start("generate", ["worker", "generate", "--name", "generate-1"], OMP_NUM_THREADS="1")
        with rest(running) as client:
            until(lambda: any(row["alive"] for row in client.get("/api/workers").json()["data"]))
            right = client.post("/api/generate", json={**BODY, "stream": False}).json()["generated_text"]
            for _ in range(NUM_ROUNDS):
                play_round(running, client, found, chance, right)
        found.violations += unended(running)


def play_round(running: Service, client: httpx.Client, found: Campaign, chance: random.Random, right: str) -> None:
    """Kill all three, each under clients of its own, beside one batch."""
    batch_id = start_batch(client)
    for victim in VICTIMS:
        clients = [Client() for _ in range(NUM_CLIENTS)]
        with httpx.Client(
            base_url=client.base_url,
            headers=client.headers,
            trust_env=False,
            limits=httpx.Limits(max_connections=NUM_CLIENTS),
        ) as crowd:
            threads = [threading.Thread(target=one.read, args=(crowd,), daemon=True) for one in clients]
            for thread in threads:
                thread.start()
            until(lambda clients=clients: any(one.has_begun.is_set() for one in clients))  # type: ignore[misc]  # mypy infers no type for a default in a lambda
            time.sleep(chance.uniform(0.0, 0.5))
            running.restart(victim)
            found.fault(victim)
            began = time.monotonic()
            for thread in threads:
                thread.join(DEADLINE_S)
            until(lambda: is_up(client))
        found.recovered(time.monotonic() - began)
        found.trials += sum(one.job_id is not None for one in clients)
        until(lambda clients=clients: all(has_ended(running, one) for one in clients))  # type: ignore[misc]  # as above
        found.violations += [f"{victim}: {fault}" for one in clients for fault in faults_of(one, right)]
    found.violations += faults_of_batch(client, batch_id)


def has_ended(running: Service, client: Client) -> bool:
    """Return whether the job of an answered client has ended."""
    return client.job_id is None or running.state(client.job_id) in TERMINAL_STATES


def faults_of(client: Client, right: str) -> list[str]:
    """Return what a stream should not have been."""
    if client.job_id is None:
        return []
    job_id, faults = client.job_id, []
    if client.ended not in ("end", "error", "delta", "restarted", "broke off"):
        faults.append(f"the stream of {job_id} {client.ended}")
    if client.ended == "end" and not client.whole == client.text == right:
        faults.append(f"the stream of {job_id} ended with {client.text!r}, not {right!r}")
    if not right.startswith(client.text):
        faults.append(f"the stream of {job_id} said {client.text!r}, no beginning of {right!r}")
    return faults


def start_batch(client: httpx.Client) -> str:
    """Submit a batch."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 60, "temperature": 0}
    lines = [
        {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}
        for number in range(NUM_LINES)
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    file = client.post("/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch"})
    file.raise_for_status()
    asked = {"input_file_id": file.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = client.post("/v1/batches", json=asked)
    batch.raise_for_status()
    return str(batch.json()["id"])


def faults_of_batch(client: httpx.Client, batch_id: str) -> list[str]:
    """Wait for a batch; return the lines that were lost, doubled or failed."""

    def ended() -> dict[str, str] | None:
        batch: dict[str, str] = client.get(f"/v1/batches/{batch_id}").json()
        return batch if batch["status"] in ("completed", "failed", "expired", "cancelled") else None

    batch = until(ended)
    if batch["status"] != "completed" or batch.get("error_file_id"):
        return [f"the batch {batch_id} ended as {batch['status']}, errors in {batch.get('error_file_id')}"]
    content = client.get(f"/v1/files/{batch['output_file_id']}/content").text
    answered = sorted(json.loads(line)["custom_id"] for line in content.splitlines())
    expected = sorted(f"line-{number}" for number in range(NUM_LINES))
    return [] if answered == expected else [f"the batch {batch_id} answered {answered}, not {expected}"]


def unended(running: Service) -> list[str]:
    """Return the states of jobs that have not ended."""
    with running.database.read() as session:
        query = select(Job.state, func.count()).where(Job.state.not_in(TERMINAL_STATES)).group_by(Job.state)
        return [f"{number} jobs are {state}" for state, number in session.execute(query)]


@pytest.mark.parametrize(
    ("seen", "is_right"),
    [
        (Client("job_1", "abc", "end", "abc"), True),
        (Client("job_1", "ab", "end", "abc"), False),
        (Client("job_1", "abcab", "broke off"), False),
        (Client("job_1", "ab", "hangs"), False),
        (Client("job_1", "a", "delta"), True),
        (Client(None), True),
    ],
)
def test_the_judge_finds_gaps_doubles_and_hangs(seen: Client, is_right: bool) -> None:
    assert (faults_of(seen, "abc") == []) is is_right
