"""The REST interface against its own OpenAPI document, as schemathesis tries it; and bodies meant to hurt."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

from apt_jobs.db.access import Role, create_key
from apt_jobs.db.engine import Database
from apt_jobs.db.upgrade import upgrade_database
from apt_jobs.settings import Settings
from apt_jobs.web.app import document
from tests.conftest import some_port

START_DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def web(valkey_server_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Role], httpx.Client]]:
    """A web process without workers; call it with a role for a client."""
    chosen = Settings(data_dir=tmp_path_factory.mktemp("web"), port=some_port())
    database = Database(chosen.database)
    upgrade_database(database)
    with database.write() as session:
        keys = {role: create_key(session, f"test {role}", role) for role in Role}
    database.dispose()
    environment = {
        **os.environ,
        "APT_JOBS_DATA_DIR": str(chosen.root),
        "APT_JOBS_REDIS_URL": valkey_server_url,
        "APT_JOBS_PORT": str(chosen.port),
        "APT_JOBS_REQUEST_TIMEOUT_S": "2",
    }
    command = [sys.executable, "-m", "apt_jobs", "web"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        base = f"http://127.0.0.1:{chosen.port}"
        _wait_until_ready(base)
        clients = {  # made once: a client of its own for each of thousands of cases takes longer than the case
            role: httpx.Client(base_url=base, headers={"authorization": f"Bearer {key}"}, timeout=30, trust_env=False)
            for role, key in keys.items()
        }
        yield clients.__getitem__
        for opened in clients.values():
            opened.close()
        process.terminate()


def _wait_until_ready(base: str) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while True:
        try:
            httpx.get(f"{base}/readyz", trust_env=False).raise_for_status()
            return
        except httpx.HTTPError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


schema = schemathesis.openapi.from_dict(document())
_rejection = schema.config.checks.negative_data_rejection
_rejection.expected_statuses = [*_rejection.expected_statuses, "413"]  # a list of too many items may be too large first


# Generation needs a worker: tests/acceptance/test_stack.py has one.
@schema.exclude(
    path=["/api/generate", "/api/batch_generate", "/v1/completions", "/v1/chat/completions", "/v1/embeddings"]
).parametrize()
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_answers_are_those_of_the_document(case: "schemathesis.Case[Any]", web: Callable[[Role], httpx.Client]) -> None:
    client = web(Role.ADMIN)
    case.call_and_validate(
        base_url=str(client.base_url),
        headers={"authorization": client.headers["authorization"]},
        # With a valid key beside it a wrong cookie does not matter; tests/security asks who may enter, for every route.
        # And a schema cannot know which models and data sets exist: naming others is refused.
        excluded_checks=[ignored_auth, positive_data_acceptance],
    )


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"kind": NaN}', 400),
        (b"[" * 10_000, 400),
        (b'{"a":' * 40 + b"1" + b"}" * 40, 400),
        (b" " * 4_200_000, 413),
        (b"[]", 422),
        (b"null", 422),
        (b'"train"', 422),
        (b"\xff\xfe", 400),
    ],
)
def test_a_bad_body_has_a_clear_answer(web: Callable[[Role], httpx.Client], content: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    answer = web(Role.ADMIN).post("/api/jobs", content=content, headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert answer.json()["detail"]


def test_one_key_makes_one_job_and_another_body_is_refused(web: Callable[[Role], httpx.Client]) -> None:
    client = web(Role.SUBMITTER)
    body: dict[str, Any] = {"kind": "train"}
    headers = {"idempotency-key": "nightly"}
    first, again = (client.post("/api/jobs", json=body, headers=headers) for _ in range(2))
    assert (first.status_code, first.json()["id"]) == (202, again.json()["id"])
    assert client.post("/api/jobs", json={**body, "priority": 1}, headers=headers).status_code == 422


def test_generation_without_a_worker_says_so_at_once(web: Callable[[Role], httpx.Client]) -> None:
    answer = web(Role.SUBMITTER).post("/api/generate", json={"text": "a"})
    assert (answer.status_code, "no generation worker" in answer.json()["detail"]) == (503, True)
    assert answer.headers["retry-after"]
