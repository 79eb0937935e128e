"""Other ways to watch: some kinds, fewer frames, the binary form, many jobs over one socket, server-sent events."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import orjson
import pytest
from sqlalchemy.orm import Session
from websockets.sync.client import ClientConnection

from apt_jobs.client.client import Client
from apt_jobs.db.jobs import get_job
from apt_jobs.db.models import Job
from apt_jobs.events.binary import SUBPROTOCOL, decode_binary
from apt_jobs.events.kinds import AnomaliesFound, GradientsRecorded, LayerAnomaly, LineLogged, StepTrained
from tests.integration.web.served import DEADLINE_S, Listener, Served, closed_with

ANOMALY = AnomaliesFound(1, (LayerAnomaly("head", "nan", float("nan")),))


def trained(step: int) -> StepTrained:
    return StepTrained(step, 0, float(step), 0.1, 1.0, 10.0, 100.0)


def frames(connection: ClientConnection, last_seq: int) -> Iterator[dict[str, Any]]:
    """Frames with events, up to `last_seq`."""
    seq = 0
    while seq < last_seq:
        message = connection.recv(timeout=DEADLINE_S)
        frame = decode_binary(message) if isinstance(message, bytes) else orjson.loads(message)
        if "events" in frame:
            seq = frame["first_seq"] + frame["count"] - 1
            yield frame


def ask(connection: ClientConnection, message: Any) -> dict[str, Any]:
    """The answer to a message; events before it are dropped."""
    connection.send(message if isinstance(message, str | bytes) else orjson.dumps(message).decode())
    while True:
        answer: dict[str, Any] = orjson.loads(connection.recv(timeout=DEADLINE_S))
        if answer.keys() & {"subscribed", "unsubscribed", "error"}:
            return answer


def test_a_filter_lets_only_its_kinds_through(served: Served) -> None:
    job_id = served.new_job()
    served.say(job_id, *(trained(step) for step in range(600)), ANOMALY)
    with served.connected(f"/ws/jobs/{job_id}?kind=anomaly&kind=state") as connection:
        connection.recv(timeout=DEADLINE_S)
        served.say(job_id, trained(700))
        last_seq = served.say(job_id, ANOMALY, trained(701), ANOMALY)
        events = [event for frame in frames(connection, last_seq) for event in frame["events"]]
    assert [event["kind"] for event in events] == ["state", "state", "anomaly", "anomaly", "anomaly"]


def test_a_rate_folds_what_repeats_and_delays_nothing_that_matters(served: Served) -> None:
    job_id = served.new_job()
    with served.connected(f"/ws/jobs/{job_id}?after=2&max_rate=0.2") as connection:
        connection.recv(timeout=DEADLINE_S)
        for step in range(1, 101):
            last_seq = served.say(job_id, trained(step))
        began = time.monotonic()
        last_seq = served.say(job_id, ANOMALY)
        found = list(frames(connection, last_seq))
        assert time.monotonic() - began < 4.0, "an anomaly waits for no turn"
    events = [event for frame in found for event in frame["events"]]
    assert len(found) <= 3
    assert events[-1]["kind"] == "anomaly"
    folded = events[-2]
    assert (folded["kind"], folded["step"]) == ("metric", 100)
    assert folded["conflated"]["max"]["train_loss"] == 100.0


@pytest.mark.parametrize("query", ["kind=nonsense", "max_rate=0", "max_rate=1000", "max_rate=x", "max_rate=nan"])
def test_a_wrong_wish_is_refused(served: Served, query: str) -> None:
    with served.connected(f"/ws/jobs/{served.new_job()}?{query}") as connection:
        assert closed_with(connection) == 4400


def test_the_binary_form_carries_the_same_events(served: Served) -> None:
    job_id = served.new_job()
    norms = GradientsRecorded(7, (0.5, float("nan")), (1,))
    served.say(job_id, norms)
    with served.connected(f"/ws/jobs/{job_id}", subprotocols=[SUBPROTOCOL]) as connection:
        assert connection.subprotocol == SUBPROTOCOL
        last_seq = served.say(job_id, norms, trained(8))
        events = [event for frame in frames(connection, last_seq) for event in frame["events"]]
    with served.connected(f"/ws/jobs/{job_id}") as connection:
        assert events == [event for frame in frames(connection, last_seq) for event in frame["events"]]


def test_the_python_client_hears_every_event_once(served: Served) -> None:
    job_id = served.new_job()
    last_seq = served.say(job_id, *(GradientsRecorded(step, (0.5, 1.0), ()) for step in range(300)))
    with Client(f"http://127.0.0.1:{served.settings.port}", served.key) as client:
        seqs = []
        for event in client.events(job_id):
            seqs.append(event["seq"])
            if event["seq"] == last_seq:
                break
    assert seqs == list(range(1, last_seq + 1))
    assert event["norms"] == [0.5, 1.0]


def test_many_jobs_share_a_socket(served: Served) -> None:
    jobs = [served.new_job() for _ in range(5)]
    listeners = {job_id: Listener() for job_id in jobs}
    with served.connected("/ws/jobs") as connection:
        for job_id in jobs:
            served.say_lines(job_id, 300)
            connection.send(orjson.dumps({"subscribe": job_id, "after": 0}).decode())
        last_seqs = {job_id: served.say_lines(job_id, 100) for job_id in jobs}
        while any(listeners[job_id].seq < last_seqs[job_id] for job_id in jobs):
            frame = orjson.loads(connection.recv(timeout=DEADLINE_S))
            listeners[frame["job_id"]].take(frame)
        assert ask(connection, {"unsubscribe": jobs[0]}) == {"job_id": jobs[0], "unsubscribed": jobs[0]}
        served.say_lines(jobs[0], 1)
        last_seq = served.say_lines(jobs[1], 1)
        while listeners[jobs[1]].seq < last_seq:
            frame = orjson.loads(connection.recv(timeout=DEADLINE_S))
            assert frame["job_id"] != jobs[0]
            listeners[frame["job_id"]].take(frame)


def test_a_wildcard_follows_the_jobs_that_run_and_those_that_come(served: Served) -> None:
    running = served.new_job()
    with served.connected("/ws/jobs") as connection:
        assert ask(connection, {"subscribe": "*"})["subscribed"] == running
        assert orjson.loads(connection.recv(timeout=DEADLINE_S)) == {"subscribed": "*", "jobs": [running]}
        coming = served.new_job()
        on_message: dict[str, list[str]] = {running: [], coming: []}
        served.say_lines(running, 1)
        while not on_message[running] or len(on_message[coming]) < 2:
            frame = orjson.loads(connection.recv(timeout=DEADLINE_S))
            on_message[frame["job_id"]] += [event["kind"] for event in frame.get("events", ())]
    assert on_message == {running: ["log"], coming: ["state", "state"]}


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ("nonsense", "JSON"),
        (b"\xff\x00", "JSON"),
        ("[1]", "dictionary"),
        ({"shout": "job_a"}, "subscribe"),
        ({"subscribe": 7}, "subscribe"),
        ({"subscribe": "job_none"}, "job_none"),
        ({"subscribe": "x" * 1000}, "subscribe"),
        ({"subscribe": "job_a", "after": -1}, "after"),
        ({"subscribe": "job_a", "kinds": ["nonsense"]}, "kinds"),
        ({"subscribe": "job_a", "max_rate": 0}, "max_rate"),
        ({"unsubscribe": "job_a"}, "job_a"),
    ],
)
def test_a_wrong_message_is_answered_and_ends_nothing(served: Served, message: Any, why: str) -> None:
    job_id = served.new_job()
    with served.connected("/ws/jobs") as connection:
        assert ask(connection, {"subscribe": job_id})["subscribed"] == job_id
        assert why in ask(connection, message)["error"]
        assert job_id in ask(connection, {"subscribe": job_id})["error"], "it listens already"
        last_seq = served.say_lines(job_id, 1)
        assert [frame["job_id"] for frame in frames(connection, last_seq)] == [job_id]


def test_a_socket_listens_to_a_bounded_number_of_jobs(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt_jobs.web.live.multiplexed_socket.MAX_SUBSCRIPTIONS", 3)
    jobs = [served.new_job() for _ in range(4)]
    with served.connected("/ws/jobs") as connection:
        answers = [ask(connection, {"subscribe": job_id}) for job_id in jobs]
    assert [answer.get("subscribed") for answer in answers] == [*jobs[:3], None]
    assert "at most 3 jobs" in answers[3]["error"]


@contextmanager
def event_source(served: Served, job_id: str, **headers: str) -> Iterator[Callable[[], dict[str, str]]]:
    """An EventSource's view: call it for the next event."""
    url = f"http://127.0.0.1:{served.settings.port}/api/jobs/{job_id}/events"
    headers = {**served.headers, "accept": "text/event-stream", **headers}
    with httpx.stream("GET", url, headers=headers, timeout=DEADLINE_S, trust_env=False) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.iter_lines()

        def next_event() -> dict[str, str]:
            event: dict[str, str] = {}
            for line in lines:
                if line:
                    name, _, value = line.partition(": ")
                    event[name] = value
                elif "id" in event:
                    return event
                else:
                    event = {}
            raise AssertionError("the stream ended")

        yield next_event


def test_server_sent_events_resume_after_their_last_id(served: Served) -> None:
    job_id = served.new_job()
    last_seq = served.say(job_id, LineLogged("info", "rank 0", "two\nlines"), trained(1))
    with event_source(served, job_id) as next_event:
        events = [next_event() for _ in range(last_seq)]
        assert [int(event["id"]) for event in events] == list(range(1, last_seq + 1))
        assert [event["event"] for event in events] == ["state", "state", "log", "metric"]
        assert orjson.loads(events[2]["data"])["message"] == "two\nlines"
    served.say_lines(job_id, 400)
    with event_source(served, job_id, **{"last-event-id": str(last_seq)}) as next_event:
        assert [int(next_event()["id"]) for _ in range(400)] == list(range(last_seq + 1, last_seq + 401))
        assert int(next_event_after(served, job_id, next_event)["id"]) == last_seq + 401


def test_the_head_of_a_greeting_is_not_newer_than_its_job(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = served.new_job()
    last_seq = served.say_lines(job_id, 1)
    with event_source(served, job_id, **{"last-event-id": str(last_seq)}) as next_event:

        def overtaken(session: Session, job_id: str) -> Job:
            """The stream moves on after the row was read."""
            job = get_job(session, job_id)
            next_event_after(served, job_id, next_event)
            return job

        monkeypatch.setattr("apt_jobs.web.live.job_socket.get_job", overtaken)
        with served.connected(f"/ws/jobs/{job_id}?after={last_seq}") as connection:
            hello = orjson.loads(connection.recv(timeout=DEADLINE_S))
            assert hello["head"] == hello["job"]["last_seq"] == last_seq
            Listener(last_seq).receive(connection, last_seq + 1)


def next_event_after(served: Served, job_id: str, next_event: Callable[[], dict[str, str]]) -> dict[str, str]:
    served.say_lines(job_id, 1)
    return next_event()


@pytest.mark.parametrize(("last_id", "status"), [("-1", 400), ("x", 400), ("9" * 40, 400)])
def test_a_wrong_last_id_is_refused(served: Served, last_id: str, status: int) -> None:
    url = f"http://127.0.0.1:{served.settings.port}/api/jobs/{served.new_job()}/events"
    headers = {**served.headers, "accept": "text/event-stream", "last-event-id": last_id}
    assert httpx.get(url, headers=headers, trust_env=False).status_code == status
