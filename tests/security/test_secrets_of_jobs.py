"""Secrets of jobs over REST: written by admins, read by nobody, refused without being repeated."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from apt_jobs.db.access import Role, create_key
from apt_jobs.settings import Settings
from tests.integration.web.served import Served

TOKEN = "hf_0123456789abc"


@pytest.fixture
def served(sqlite_url: str, valkey_server_url: str, make_settings: Callable[..., Settings]) -> Iterator[Served]:
    service = Served(make_settings(database_url=sqlite_url, redis_url=valkey_server_url), direct=False)
    service.start()
    yield service
    service.stop()
    service.close()


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.rest_client() as client:
        yield client


def test_a_secret_is_set_listed_by_name_replaced_and_deleted(served: Served, client: httpx.Client) -> None:
    for value in (TOKEN, f"{TOKEN}_2"):
        answer = client.put("/api/secrets/HF_TOKEN", json={"value": value})
        assert (answer.status_code, answer.json()["name"], TOKEN in answer.text) == (200, "HF_TOKEN", False)
    listed = client.get("/api/secrets")
    assert [row["name"] for row in listed.json()["data"]] == ["HF_TOKEN"]
    assert TOKEN not in listed.text
    job = {"kind": "train", "entry_point": "mine", "secrets": ["HF_TOKEN"]}
    assert client.post("/api/jobs", json=job).status_code == 202
    assert client.delete("/api/secrets/HF_TOKEN").status_code == 204
    assert client.delete("/api/secrets/HF_TOKEN").status_code == 404
    refused = client.post("/api/jobs", json=job).json()
    assert [(fault["pointer"], fault["seen"]) for fault in refused["errors"]] == [("#/secrets", "'HF_TOKEN'")]
    for method in ("GET", "POST"):
        assert client.request(method, "/api/secrets/HF_TOKEN").status_code == 405


@pytest.mark.parametrize(
    "body",
    [
        {"value": [TOKEN]},
        {"value": {"is": TOKEN}},
        {"value": TOKEN, "more": TOKEN},
        {"values": TOKEN},
        {"value": TOKEN + "\0"},
        {"value": "short"},
        {"value": TOKEN * 2_000},
    ],
)
def test_what_is_refused_is_not_repeated(client: httpx.Client, body: dict[str, Any]) -> None:
    answer = client.put("/api/secrets/HF_TOKEN", json=body)
    assert answer.status_code == 422
    assert TOKEN not in answer.text
    assert "'short'" not in answer.text


@pytest.mark.parametrize("name", ["PATH", "LD_PRELOAD", "APT_JOBS_DATA_DIR", "PYTHONSTARTUP", "a%20b", "1A", "A%3DB"])
def test_a_name_that_no_job_may_set_is_refused(client: httpx.Client, name: str) -> None:
    assert client.put(f"/api/secrets/{name}", json={"value": TOKEN}).status_code == 422


def test_submitters_see_names_and_change_nothing(served: Served, client: httpx.Client) -> None:
    with served.database.write() as session:
        submitter = {"authorization": f"Bearer {create_key(session, 'submitter', Role.SUBMITTER)}"}
    assert client.get("/api/secrets", headers=submitter).status_code == 200
    assert client.put("/api/secrets/A", json={"value": TOKEN}, headers=submitter).status_code == 403
    assert client.delete("/api/secrets/A", headers=submitter).status_code == 403
