"""Streams of a job that ends: every event, an `end` message, and the end of the connection. Nobody waits for more."""

import threading
from typing import Any

import httpx
import orjson
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from apt_jobs.db.jobs import finish
from apt_jobs.db.steering import request_retry
from apt_jobs.events.binary import SUBPROTOCOL
from apt_jobs.events.kinds import LineLogged
from apt_jobs.jobs.states import JobState
from tests.integration.web.served import DEADLINE_S, Listener, Served

ENDS = [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.DEAD]


def end(served: Served, job_id: str, state: JobState = JobState.SUCCEEDED) -> None:
    """End the job as its supervisor does, and publish it."""
    with served.database.write() as session:
        events = finish(session, job_id, 1, state, reason="it is over")
    served.publisher.publish(job_id, events)


def rest_of(connection: ClientConnection) -> tuple[list[Any], int | None, str]:
    """All messages until the server closes, with its code and reason."""
    messages: list[Any] = []

    def receive() -> None:
        while True:
            message = connection.recv(timeout=DEADLINE_S)
            messages.append(orjson.loads(message) if isinstance(message, str) else message)

    with pytest.raises(ConnectionClosed) as caught:
        receive()
    close = caught.value.rcvd
    return messages, close.code if close else None, close.reason if close else ""


@pytest.mark.parametrize("state", ENDS)
def test_a_socket_of_an_ended_job_tells_all_and_closes(served: Served, state: JobState) -> None:
    job_id = served.new_job()
    served.say_lines(job_id, 5_000)
    end(served, job_id, state)
    with served.connected(f"/ws/jobs/{job_id}") as connection:
        (hello, *frames, last), code, reason = rest_of(connection)
    listener = Listener()
    for frame in frames:
        listener.take(frame)
    assert listener.seq == hello["head"] == 5_003
    assert (last, code, state in reason) == ({"kind": "end", "state": state}, 1000, True)


@pytest.mark.parametrize(
    "query", ["?after=3", "?after=4", "?after=1000000", "?kind=anomaly", "?max_rate=0.1", "?kind=log"]
)
def test_a_socket_that_has_or_wants_less_ends_too(served: Served, query: str) -> None:
    job_id = served.new_job()
    served.say_lines(job_id, 1)
    end(served, job_id)
    with served.connected(f"/ws/jobs/{job_id}{query}") as connection:
        messages, code, _ = rest_of(connection)
    assert (messages[-1], code) == ({"kind": "end", "state": "succeeded"}, 1000)


@pytest.mark.parametrize("options", [{}, {"subprotocols": [SUBPROTOCOL]}])
@pytest.mark.parametrize("query", ["", "?max_rate=0.5", "?kind=metric&max_rate=0.5"])
def test_live_sockets_end_when_the_job_does(served: Served, query: str, options: dict[str, Any]) -> None:
    job_id = served.new_job()
    with (
        served.connected(f"/ws/jobs/{job_id}{query}", **options) as one,
        served.connected(f"/ws/jobs/{job_id}{query}", **options) as another,
    ):
        for connection in (one, another):
            assert "job" in orjson.loads(connection.recv(timeout=DEADLINE_S))
        served.say_lines(job_id, 100)
        end(served, job_id)
        for connection in (one, another):
            messages, code, _ = rest_of(connection)
            assert (messages[-1], code) == ({"kind": "end", "state": "succeeded"}, 1000)
            assert sum(message == messages[-1] for message in messages) == 1


def test_a_slow_client_gets_all_before_the_end(served: Served) -> None:
    job_id = served.new_job()
    with served.connected(f"/ws/jobs/{job_id}") as connection:
        connection.recv(timeout=DEADLINE_S)
        for _ in range(20):
            served.say_lines(job_id, 200, width=2_000)
        end(served, job_id)
        messages, code, _ = rest_of(connection)
    listener = Listener()
    for message in messages[:-1]:
        listener.take(message)
    assert (listener.seq, messages[-1]["kind"], code) == (4_003, "end", 1000)


def test_an_end_that_the_live_wire_lost_is_found(served: Served) -> None:
    job_id = served.new_job()
    with served.connected(f"/ws/jobs/{job_id}") as connection:
        connection.recv(timeout=DEADLINE_S)
        with served.database.write() as session:
            finish(session, job_id, 1, JobState.FAILED, reason="unpublished")
        messages, code, _ = rest_of(connection)
    assert (messages[-1], code) == ({"kind": "end", "state": "failed"}, 1000)


def test_a_socket_of_many_jobs_hears_of_each_end_and_stays(served: Served) -> None:
    ended, running = served.new_job(), served.new_job()
    end(served, ended)
    with served.connected("/ws/jobs") as connection:
        for job_id in (ended, running):
            connection.send(orjson.dumps({"subscribe": job_id, "after": 0}).decode())
        found = ends_of(connection, 1)
        assert found == [{"job_id": ended, "kind": "end", "state": "succeeded"}]
        end(served, running, JobState.FAILED)
        assert ends_of(connection, 1) == [{"job_id": running, "kind": "end", "state": "failed"}]
        with served.database.write() as session:
            events = request_retry(session, running)[1]
        served.publisher.publish(running, events)
        connection.send(orjson.dumps({"unsubscribe": running}).decode())
        while "unsubscribed" not in orjson.loads(connection.recv(timeout=DEADLINE_S)):
            pass


def ends_of(connection: ClientConnection, count: int) -> list[Any]:
    found: list[Any] = []
    while len(found) < count:
        message = orjson.loads(connection.recv(timeout=DEADLINE_S))
        if message.get("kind") == "end":
            found.append(message)
    return found


def test_server_sent_events_end(served: Served) -> None:
    ended, running = served.new_job(), served.new_job()
    served.say_lines(ended, 3)
    end(served, ended)
    assert events_of(served, ended)[-1] == ("end", {"kind": "end", "state": "succeeded"})
    assert [kind for kind, _ in events_of(served, ended)] == ["state", "state", "log", "log", "log", "state", "end"]
    assert [kind for kind, _ in events_of(served, ended, last_id="6")] == ["end"]
    ending = threading.Timer(0.5, end, (served, running, JobState.CANCELLED))
    ending.start()
    assert events_of(served, running)[-1] == ("end", {"kind": "end", "state": "cancelled"})
    ending.join()


def events_of(served: Served, job_id: str, last_id: str | None = None) -> list[tuple[str, Any]]:
    """The events of a stream that ends."""
    headers = {**served.headers, "accept": "text/event-stream"}
    if last_id is not None:
        headers["last-event-id"] = last_id
    url = f"http://127.0.0.1:{served.settings.port}/api/jobs/{job_id}/events"
    text = httpx.get(url, headers=headers, timeout=DEADLINE_S, trust_env=False).text
    found = []
    for event in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in event.splitlines())
        if "event" in fields:
            found.append((fields["event"], orjson.loads(fields["data"])))
    return found


def test_the_newest_lines_of_a_long_log_come_first(served: Served) -> None:
    job_id = served.new_job()
    for start in range(0, 12_000, 2_000):
        served.say(job_id, *(LineLogged("info", "rank 0", f"line {start + number}") for number in range(2_000)))
    url = f"http://127.0.0.1:{served.settings.port}/api/jobs/{job_id}/logs"
    with httpx.Client(headers=served.headers, timeout=DEADLINE_S, trust_env=False) as client:
        page = client.get(url).json()
        assert [page["data"][0]["message"], page["data"][-1]["message"]] == ["line 11000", "line 11999"]
        assert page["has_more"]
        lines: list[str] = []
        while True:
            lines = [event["message"] for event in page["data"]] + lines
            if not page["has_more"]:
                break
            page = client.get(url, params={"before": page["data"][0]["seq"], "limit": 10_000}).json()
        assert lines == [f"line {number}" for number in range(12_000)]
        first = client.get(url, params={"after": 0, "limit": 2}).json()
        assert [event["message"] for event in first["data"]] == ["line 0", "line 1"]
        assert client.get(url, params={"after": 0, "before": 9}).status_code == 422
