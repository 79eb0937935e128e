"""Many jobs at once: lists by filter, order and fields; steered by ids or a filter; one that is waited for."""

import time
from typing import Any

import httpx
import pytest

from apt_jobs.db import jobs
from apt_jobs.db.access import Role, create_key
from apt_jobs.jobs.states import JobState
from tests.integration.db.steps import claim
from tests.integration.web.served import Served

pytestmark = pytest.mark.parametrize("served", ["direct"], indirect=True)

NAMES_NONE: tuple[dict[str, Any], ...] = (
    {},
    {"ids": []},
    {"ids": ["x"] * 1_001},
    {"ids": ["x"], "filter": "a"},
    {"filter": ""},
    {"filter": " "},
    {"filter": "nope:x"},
)


@pytest.fixture
def three(http: httpx.Client) -> list[str]:
    """Ids of jobs that wait, of priority 0, 2 and 1."""
    bodies = [{"kind": "train", "name": name, "priority": value} for name, value in (("b", 0), ("c", 2), ("a", 1))]
    return [http.post("/api/jobs", json=body).json()["id"] for body in bodies]


def listed(http: httpx.Client, **query: Any) -> list[Any]:
    rows: list[Any] = http.get("/api/jobs", params=query).raise_for_status().json()["data"]
    return rows


def test_a_list_has_an_order_and_pages_in_it(http: httpx.Client, three: list[str]) -> None:
    first, second, third = three
    orders = {"priority": [first, third, second], "-name": [second, first, third], "created_at": sorted(three)}
    for sort, expected in orders.items():
        found: list[str] = []
        while page := listed(http, sort=sort, limit=2, **({"after": found[-1]} if found else {})):
            found += [row["id"] for row in page]
        assert found == expected, sort
    assert [row["id"] for row in listed(http, sort="-step", state="queued", filter="priority>0")] == [
        *sorted([second, third], reverse=True)
    ]
    assert http.get("/api/jobs", params={"sort": "name", "after": "job_gone"}).status_code == 422


def test_a_list_has_the_fields_that_were_asked_for(http: httpx.Client, three: list[str]) -> None:
    assert listed(http, fields="id,state", filter="priority=2 -kind:generate") == [{"id": three[1], "state": "queued"}]
    assert http.get(f"/api/jobs/{three[0]}", params={"fields": "name"}).json() == {"name": "b"}


@pytest.mark.parametrize(
    "query", [{"filter": "nope:x"}, {"filter": "x" * 10_000}, {"sort": "nope"}, {"fields": "id,nope"}, {"fields": ""}]
)
def test_a_query_that_cannot_be_is_named(http: httpx.Client, query: dict[str, str]) -> None:
    answer = http.get("/api/jobs", params=query)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, next(iter(query)))


def test_many_jobs_are_steered_and_each_refusal_says_why(served: Served, http: httpx.Client, three: list[str]) -> None:
    first, second, third = three
    running = claim(served.database)
    assert running.id == second
    paused = http.post("/api/jobs/pause", json={"filter": "priority<2"}).json()
    assert (paused["matched"], paused["changed"], paused["refused"]) == (2, 2, [])
    assert http.post("/api/jobs/pause", json={"filter": "priority<2"}).json()["changed"] == 0
    assert http.post("/api/jobs/resume", json={"ids": [first]}).json()["changed"] == 1
    cancelled = http.post("/api/jobs/cancel", json={"ids": [*three, first, "job_nope"]}).json()
    assert (cancelled["matched"], cancelled["changed"]) == (4, 3)
    assert [one["id"] for one in cancelled["refused"]] == ["job_nope"]
    assert http.post("/api/jobs/retry", json={"ids": [third]}).json()["changed"] == 1
    deleted = http.post("/api/jobs/delete", json={"ids": three}).json()
    assert (deleted["matched"], deleted["changed"]) == (3, 1)
    assert {one["id"] for one in deleted["refused"]} == {second, third}
    assert all("cancel it first" in one["why"] for one in deleted["refused"])
    assert sorted(row["id"] for row in listed(http)) == sorted([second, third])


@pytest.mark.parametrize("body", NAMES_NONE)
def test_what_names_no_jobs_changes_none(http: httpx.Client, three: list[str], body: dict[str, Any]) -> None:
    for verb in ("cancel", "pause", "resume", "retry", "delete"):
        assert http.post(f"/api/jobs/{verb}", json=body).status_code == 422
    assert {row["state"] for row in listed(http)} == {"queued"}


def test_only_an_admin_deletes(served: Served, http: httpx.Client, three: list[str]) -> None:
    with served.database.write() as session:
        key = create_key(session, "submitter", Role.SUBMITTER)
    answer = http.post("/api/jobs/delete", json={"ids": three}, headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 403


def test_a_job_is_waited_for(served: Served, http: httpx.Client, three: list[str]) -> None:
    began = time.monotonic()
    assert http.get(f"/api/jobs/{three[0]}", params={"wait": 0.2}).json()["state"] == "queued"
    assert time.monotonic() - began >= 0.2
    job = claim(served.database)
    with served.database.write() as session:
        jobs.finish(session, job.id, job.attempt, JobState.SUCCEEDED)
    assert http.get(f"/api/jobs/{job.id}", params={"wait": 60}).json()["state"] == "succeeded"
    assert http.get("/api/jobs/job_nope", params={"wait": 60}).status_code == 404
    assert http.get(f"/api/jobs/{job.id}", params={"wait": 61}).status_code == 422
