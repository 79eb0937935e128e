"""Following a job ends with the job: by WebSocket and by server-sent events, with both clients."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from apt_jobs.client import Client, following
from apt_jobs.errors import Denied, NotFound
from apt_jobs.jobs.states import JobState
from tests.integration.client.conftest import Serve
from tests.integration.client.jobs import Follow, alter_job, end_job, follow_async, follow_sync, url_of
from tests.integration.web.served import DEADLINE_S, Served, until

PROMPT_S = 8.0  # less than a silence


@pytest.fixture(scope="module", params=["websocket", "server-sent events"])
def service(request: pytest.FixtureRequest, serve: Serve) -> Iterator[Served]:
    """A service, and one that refuses to upgrade to WebSockets."""
    with serve(**({} if request.param == "websocket" else {"ws": "none"})) as started:
        yield started


@pytest.fixture(params=[follow_sync, follow_async], ids=["sync", "async"])
def follow(request: pytest.FixtureRequest) -> Follow:
    function: Follow = request.param
    return function


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.DEAD])
def test_a_job_that_has_ended_is_followed_to_its_last_event(service: Served, follow: Follow, state: JobState) -> None:
    job_id = service.new_job()
    service.say_lines(job_id, 300)
    end_job(service, job_id, state, "why")
    began = time.monotonic()
    events = follow(url_of(service), service.key, job_id)
    assert [event["seq"] for event in events] == list(range(1, 304))
    assert events[-1]["state"] == state
    assert follow(url_of(service), service.key, job_id, after=303) == []
    assert follow(url_of(service), service.key, job_id, after=10_000) == []
    assert [event["kind"] for event in follow(url_of(service), service.key, job_id, kinds=["state"])] == ["state"] * 3
    assert time.monotonic() - began < 4 * PROMPT_S


def test_a_job_that_ends_meanwhile_ends_its_followers(service: Served, follow: Follow) -> None:
    job_id = service.new_job()
    heard: list[list[dict[str, Any]]] = []
    follower = threading.Thread(target=lambda: heard.append(follow(url_of(service), service.key, job_id)), daemon=True)
    follower.start()
    until(lambda: service.connections())
    last_seq = service.say_lines(job_id, 50)
    began = time.monotonic()
    end_job(service, job_id)
    follower.join(DEADLINE_S)
    assert time.monotonic() - began < PROMPT_S
    assert [event["seq"] for event in heard[0]] == list(range(1, last_seq + 2))


def test_an_end_that_no_event_and_no_frame_tells_is_found_after_a_silence(
    service: Served, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "SILENCE_S", 1.0)
    job_id = service.new_job()
    heard: list[list[dict[str, Any]]] = []
    follower = threading.Thread(target=lambda: heard.append(follow(url_of(service), service.key, job_id)), daemon=True)
    follower.start()
    until(lambda: service.connections())
    alter_job(service, job_id, state="dead", lease_owner=None, lease_until=None)
    follower.join(DEADLINE_S)
    assert len(heard[0]) == 2


def test_what_is_wrong_is_an_error_at_once(service: Served, follow: Follow) -> None:
    began = time.monotonic()
    with pytest.raises(NotFound):
        follow(url_of(service), service.key, "job_nothing")
    with pytest.raises(Denied):
        follow(url_of(service), "apt_wrong_key", service.new_job())
    assert time.monotonic() - began < PROMPT_S


def test_waiting_ends_with_the_job_or_with_the_time(service: Served) -> None:
    job_id = service.new_job()
    with Client(url_of(service), service.key) as client:
        with pytest.raises(TimeoutError, match="still running after 1 s"):
            client.wait(job_id, timeout_s=1.0)
        threading.Timer(0.5, end_job, (service, job_id, JobState.FAILED, "why")).start()
        job = client.get(job_id).wait()
    assert (job.state, job.reason, job.is_ended) == ("failed", "why", True)


def test_stored_events_are_those_that_are_there(service: Served) -> None:
    job_id = service.new_job()
    service.say_lines(job_id, 1_500)
    with Client(url_of(service), service.key) as client:
        assert [event["seq"] for event in client.stored_events(job_id)] == list(range(1, 1_503))
        assert len(list(client.stored_events(job_id, after=1_000, kinds=["log"]))) == 502


def test_pages_are_iterated(service: Served) -> None:
    made = [service.new_job() for _ in range(7)]
    with Client(url_of(service), service.key) as client:
        listed = [job.id for job in client.iter_jobs(limit=3)]
    assert listed[:7] == made[::-1]
    assert len(listed) == len(set(listed))
