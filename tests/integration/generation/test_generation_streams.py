"""Requests that arrive together, and streams: what comes, who leaves, a worker that dies. One stack for all."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from pydantic import SecretStr

from apt_jobs.settings import Settings
from tests.integration.generation.served import Generating, generating
from tests.integration.web.served import until

LONG = 3_500  # tokens: more than a test waits for


@pytest.fixture(scope="module")
def stack(
    tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path, valkey_server_url: str
) -> Iterator[Generating]:
    folder = tmp_path_factory.mktemp("generating")
    file = folder / "apt_jobs.sqlite3"
    file.write_bytes(sqlite_template.read_bytes())
    settings = Settings(
        data_dir=folder / "data",
        database_url=SecretStr(f"sqlite:///{file}"),
        redis_url=SecretStr(valkey_server_url.replace("db=0", "db=1")),  # the wake-ups of other tests are not ours
    )
    with generating(settings) as running, running.worker():
        yield running


def events_of(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    kind = ""
    for line in response.iter_lines():
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            yield kind, orjson.loads(value)


def streamed(stack: Generating, **body: Any) -> list[tuple[str, dict[str, Any]]]:
    with stack.client.stream("POST", "/api/generate", json={"model": "tiny", "stream": True, **body}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        return list(events_of(response))


def test_requests_that_arrive_together_are_answered_each_with_its_own_text(stack: Generating) -> None:
    texts = [f"The {number}" for number in range(24)]
    alone = [
        stack.client.post("/api/generate", json={"text": text, "model": "tiny", "max_length": 6}).json()
        for text in texts[:2]
    ]

    async def crowd() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=stack.client.base_url, headers=stack.served.headers, timeout=120) as web:
            bodies = [{"text": text, "model": "tiny", "max_length": 6} for text in texts]
            bodies += [{"text": "x", "model": "absent"}]  # its own fault, nobody else's
            return await asyncio.gather(*(web.post("/api/generate", json=body) for body in bodies))

    *answers, refused = asyncio.run(crowd())
    assert [answer.json()["input_text"] for answer in answers] == texts
    assert [answer.json()["generated_text"] for answer in answers[:2]] == [one["generated_text"] for one in alone]
    assert len({answer.json()["job_id"] for answer in answers}) == len(texts)
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "#/model")
    assert {stack.state(answer.json()["job_id"]) for answer in answers} == {"succeeded"}


@pytest.mark.parametrize("stop", [[], ["e"]])
def test_deltas_are_the_text_with_contiguous_numbers_and_one_end(stack: Generating, stop: list[str]) -> None:
    options = {"text": "The queue", "max_length": 30, "seed": 3, "temperature": 1.0, "stop": stop}
    events = streamed(stack, **options)
    whole = stack.client.post("/api/generate", json={"model": "tiny", **options}).json()
    assert [data["number"] for _, data in events] == list(range(len(events)))
    assert [kind for kind, _ in events] == ["delta"] * (len(events) - 1) + ["end"]
    end = events[-1][1]
    assert "".join(data["text"] for kind, data in events if kind == "delta") == end["generated_text"]
    assert {name: end[name] for name in ("generated_text", "finish_reason", "usage", "truncated")} == {
        name: whole[name] for name in ("generated_text", "finish_reason", "usage", "truncated")
    }


def test_the_accept_header_asks_for_a_stream_and_what_fails_at_once_has_its_status(stack: Generating) -> None:
    accept = {"accept": "text/event-stream"}
    body = {"text": "The", "model": "tiny", "max_length": 2}
    answer = stack.client.post("/api/generate", json=body, headers=accept)
    assert answer.headers["content-type"].startswith("text/event-stream")
    too_long = stack.client.post("/api/generate", json={**body, "text": "一" * 3_000}, headers=accept)
    assert (too_long.status_code, "tokens" in too_long.json()["detail"]) == (422, True)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_job(stack: Generating, stream: bool) -> None:
    labels = {row["id"] for row in stack.client.get("/api/jobs?limit=200").json()["data"]}
    body = {"text": "The", "model": "tiny", "max_length": LONG, "stream": stream}
    if stream:
        with stack.client.stream("POST", "/api/generate", json=body) as response:
            next(events_of(response))
    else:
        with pytest.raises(httpx.ReadTimeout):
            stack.client.post("/api/generate", json=body, timeout=0.5)
    left_at_s = time.monotonic()

    def ended() -> bool:
        rows = stack.client.get("/api/jobs?limit=200").json()["data"]
        [job] = [row for row in rows if row["id"] not in labels]
        return bool(job["state"] == "cancelled")

    until(ended, 20)
    assert time.monotonic() - left_at_s < 10  # a second on a quiet machine


def test_a_repeated_key_streams_the_text_of_the_first_request(stack: Generating) -> None:
    key = {"idempotency-key": "stream-1"}
    body = {"text": "The", "model": "tiny", "max_length": 8, "stream": True, "temperature": 1.0}
    texts = []
    for _ in range(2):
        with stack.client.stream("POST", "/api/generate", json=body, headers=key) as response:
            events = list(events_of(response))
        texts.append(("".join(data.get("text", "") for _, data in events), events[-1][1]["job_id"]))
    assert texts[0] == texts[1]


def test_the_stream_of_a_worker_that_dies_says_restarted_and_ends(
    make_settings: Callable[..., Settings], valkey_url: str, sqlite_url: str
) -> None:
    settings = make_settings(database_url=sqlite_url, redis_url=valkey_url, lease_s=3.0, heartbeat_s=0.5)
    events: list[tuple[str, dict[str, Any]]] = []
    with generating(settings) as running:
        with running.worker() as process:

            def read() -> None:
                body = {"text": "The", "model": "tiny", "max_length": 600, "stream": True}
                with running.client.stream("POST", "/api/generate", json=body) as response:
                    events.extend(events_of(response))

            reader = threading.Thread(target=read)
            reader.start()
            until(lambda: [row["state"] for row in running.client.get("/api/jobs").json()["data"]] == ["running"])
            process.kill()
        with running.worker():
            reader.join(100)
        assert not reader.is_alive()
    kinds = [kind for kind, _ in events]
    assert kinds[-1] == "end"
    begin = kinds.index("restarted") if "restarted" in kinds else -1
    assert "".join(data.get("text", "") for _, data in events[begin + 1 : -1]) == events[-1][1]["generated_text"]
    assert [data["number"] for _, data in events] == list(range(len(events)))
