"""`PATCH /api/jobs/{id}`: what may be edited when, and two who edit at once."""

from typing import Any

import httpx
import pytest

from apt_jobs.db.queues import queues_with_due_jobs
from tests.integration.db.steps import claim
from tests.integration.web.served import Served

pytestmark = pytest.mark.parametrize("served", ["direct"], indirect=True)


def submitted(http: httpx.Client, **fields: Any) -> str:
    job_id: str = http.post("/api/jobs", json={"kind": "train", **fields}).json()["id"]
    return job_id


def test_a_job_that_waits_gets_another_name_and_place(served: Served, http: httpx.Client) -> None:
    job_id = submitted(http, labels={"team": "a", "old": "x"})
    changes = {"name": "n", "labels": {"new": "y", "old": None}, "notes": "why", "priority": 5, "queue": "fast"}
    answer = http.patch(f"/api/jobs/{job_id}", json=changes).raise_for_status()
    edited = {**changes, "labels": {"team": "a", "new": "y"}}
    assert {field: answer.json()[field] for field in edited} == edited
    assert {field: answer.json()["spec"][field] for field in edited if field != "notes"} == {
        field: value for field, value in edited.items() if field != "notes"
    }
    assert http.patch(f"/api/jobs/{job_id}", json={"notes": None}).json()["notes"] is None
    with served.database.read() as session:
        assert queues_with_due_jobs(session) == ["fast"]
    assert claim(served.database, "fast").id == job_id


def test_a_job_that_runs_keeps_its_place(served: Served, http: httpx.Client) -> None:
    job_id = submitted(http)
    claim(served.database)
    assert http.patch(f"/api/jobs/{job_id}", json={"name": "n", "notes": "x", "priority": 0}).status_code == 200
    for changes in ({"priority": 1}, {"queue": "fast"}, {"name": "m", "queue": "fast"}):
        refused = http.patch(f"/api/jobs/{job_id}", json=changes)
        assert (refused.status_code, "while a job waits only" in refused.json()["detail"]) == (409, True)
    assert http.get(f"/api/jobs/{job_id}").json()["name"] == "n"


def test_of_two_who_edit_at_once_the_second_is_refused(http: httpx.Client) -> None:
    path = f"/api/jobs/{submitted(http)}"
    etag = http.get(path).headers["etag"]
    first = http.patch(path, json={"name": "one"}, headers={"if-match": etag})
    second = http.patch(path, json={"name": "two"}, headers={"if-match": etag})
    assert (first.status_code, second.status_code) == (200, 412)
    assert http.get(path).json()["name"] == "one"
    assert http.get(path).headers["etag"] == first.headers["etag"] != etag
    for matching in (f'"x", {first.headers["etag"]}', "*"):
        assert http.patch(path, json={"notes": matching}, headers={"if-match": matching}).status_code == 200
        first = http.get(path)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, 422),
        ({"state": "succeeded"}, 422),
        ({"priority": 101}, 422),
        ({"priority": None}, 422),
        ({"queue": "a b"}, 422),
        ({"queue": None}, 422),
        ({"name": "x" * 201}, 422),
        ({"name": "a\u0000b"}, 422),
        ({"notes": "x" * 10_001}, 422),
        ({"labels": {f"l{number}": "x" for number in range(33)}}, 422),
        ({"labels": None}, 422),
    ],
)
def test_what_no_job_can_be_is_refused(http: httpx.Client, changes: dict[str, Any], status: int) -> None:
    assert http.patch(f"/api/jobs/{submitted(http)}", json=changes).status_code == status
    assert http.patch("/api/jobs/job_nope", json={"name": "x"}).status_code == 404
