"""A place in a log: what is new, when a job is over, when it has to be looked at."""

import json
from typing import Any

import pytest

from apt_jobs.client.answers import JobAnswer
from apt_jobs.client.following import MAX_FAILURES, SILENCE_S, Follower, SseDecoder
from apt_jobs.errors import InvalidInput, NotFound, Unavailable


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def event(seq: int, kind: str = "log", **values: Any) -> dict[str, Any]:
    return {"seq": seq, "kind": kind, **values}


def frame(*events: dict[str, Any], first_seq: int | None = None, count: int | None = None) -> str:
    first = events[0]["seq"] if first_seq is None else first_seq
    return json.dumps({"first_seq": first, "count": len(events) if count is None else count, "events": events})


def job(state: str, last_seq: int) -> JobAnswer:
    return JobAnswer({"id": "job_1", "state": state, "last_seq": last_seq})


def test_events_come_once_and_in_order() -> None:
    follower = Follower("job_1", after=1)
    assert [row["seq"] for row in follower.receive_message(frame(event(1), event(2), event(3)))] == [2, 3]
    assert follower.receive_message(frame(event(2), event(3))) == []
    assert follower.receive_sse("log", json.dumps(event(4))) == [event(4)]
    assert follower.socket_path == "/ws/jobs/job_1?after=4"


def test_frames_of_some_kinds_cover_every_place() -> None:
    follower = Follower("job_1", kinds=("log", "state"))
    follower.receive_message(frame(event(3), first_seq=1, count=9))
    assert follower.cursor == 9
    follower.receive_message(frame(first_seq=10, count=5))
    assert follower.stream_path == "/api/jobs/job_1/events?after=14&kind=log&kind=state"


@pytest.mark.parametrize("is_socket", [True, False])
def test_an_end_ends(is_socket: bool) -> None:
    follower, end = Follower("job_1"), '{"kind":"end","state":"succeeded"}'
    assert (follower.receive_message(end) if is_socket else follower.receive_sse("end", end)) == []
    assert follower.is_over


def test_a_job_that_ended_before_the_client_came_is_over_when_all_is_read() -> None:
    follower = Follower("job_1")
    greeting = {"head": 2, "job": job("cancelled", 2), "layers": []}
    follower.receive_message(json.dumps(greeting))
    assert not follower.is_due_for_a_look
    follower.receive_message(frame(event(1), event(2)))
    assert follower.is_due_for_a_look
    assert follower.receive_job(job("cancelled", 2)) is False
    assert follower.is_over


def test_a_place_beyond_the_end_is_over_at_once() -> None:
    follower = Follower("job_1", after=99)
    follower.receive_message(json.dumps({"head": 2, "job": job("failed", 2), "layers": []}))
    assert follower.is_due_for_a_look
    follower.receive_job(job("failed", 2))
    assert follower.is_over


def test_a_state_that_ends_makes_the_client_look_and_a_retried_job_goes_on() -> None:
    follower = Follower("job_1")
    follower.receive_message(frame(event(1, "state", state="failed")))
    assert follower.is_due_for_a_look
    follower.receive_job(job("queued", 2))
    assert (follower.is_over, follower.is_due_for_a_look) == (False, False)


def test_a_silence_makes_the_client_look_and_read_what_the_stream_does_not_bring() -> None:
    clock = Clock()
    follower = Follower("job_1", clock=clock)
    follower.receive_message('{"head": 3}')  # the service's heartbeat is no event
    assert not follower.is_due_for_a_look
    clock.now += SILENCE_S
    assert follower.is_due_for_a_look
    assert follower.receive_job(job("running", 3)) is False
    assert not follower.is_due_for_a_look
    clock.now += SILENCE_S
    assert follower.receive_job(job("dead", 3)) is True
    assert follower.receive_page([event(1), event(2)], has_more=True) == [event(1), event(2)]
    assert follower.receive_page([event(3)], has_more=False) == [event(3)]
    assert follower.is_over


def test_time_that_a_caller_gives_ends() -> None:
    clock = Clock()
    follower = Follower("job_1", timeout_s=3.0, clock=clock)
    assert follower.wait_s == 3.0
    clock.now += 3.0
    assert follower.is_expired
    assert follower.wait_s > 0


def test_failures_are_bounded_and_an_event_forgives_them() -> None:
    follower = Follower("job_1")
    for _ in range(MAX_FAILURES):
        follower.note_failure("http://x", OSError("gone"))
    follower.receive_message(frame(event(1)))
    for _ in range(MAX_FAILURES):
        follower.note_failure("http://x", OSError("gone"))
    with pytest.raises(Unavailable, match="gone"):
        follower.note_failure("http://x", OSError("gone"))


@pytest.mark.parametrize("message", ["", "no JSON", "[1]", "null", b"\x09\x00"])
def test_a_message_that_is_none_of_ours_is_said_so(message: str | bytes) -> None:
    with pytest.raises(InvalidInput):
        Follower("job_1").receive_message(message)


def test_an_id_that_can_be_none_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(NotFound):
        Follower("../keys")


def test_server_sent_events_are_cut_by_line_feeds_only() -> None:
    text = 'retry: 1000\n\nid: 1\nevent: log\ndata: {"a":"\u2028\x0b\x85"}\n\n: heartbeat\n\n'
    text += "event: end\r\ndata: {}\r\n\r\n"
    whole = [("log", '{"a":"\u2028\x0b\x85"}'), ("end", "{}")]
    assert SseDecoder().feed(text.encode()) == whole
    decoder, events = SseDecoder(), []
    for byte in text.encode():
        events += decoder.feed(bytes([byte]))
    assert events == whole


def test_data_of_several_lines_is_joined_and_a_name_without_data_is_forgotten() -> None:
    assert SseDecoder().feed(b"event: a\n\ndata: 1\ndata:2\n\n") == [("message", "1\n2")]


def test_an_endless_line_is_refused() -> None:
    decoder, part = SseDecoder(), b"x" * (16 << 20)
    for _ in range(4):
        decoder.feed(part)
    with pytest.raises(InvalidInput, match="more than"):
        decoder.feed(part)
