"""`Idempotency-Key`: one name space for each owner and route, on every route that creates."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from apt_jobs.db.access import Role, create_key
from apt_jobs.db.clock import now_plus
from apt_jobs.db.engine import Database
from apt_jobs.db.idempotency import LIFETIME_S, IdempotencyKey, create_once, known_resource, sweep_expired
from apt_jobs.db.models import IdempotencyKeyRow
from apt_jobs.errors import IdempotencyMismatch
from tests.security.attacked import AttackedWeb

JOB: dict[str, Any] = {"kind": "train", "training": {"max_steps": 1}}
SCHEDULE: dict[str, Any] = {"name": "nightly", "cron": "@daily", "job": JOB}
RUBBISH = ["", "x" * 256, "x" * 3_000, "tab\there", "ümlaut"]


def _post(client: httpx.Client, path: str, key: str, **options: Any) -> httpx.Response:
    if "content" in options:
        options["headers"] = {"content-type": "text/plain"}
    headers = {"idempotency-key": key, **options.pop("headers", {})}
    return client.post(path, headers=[(n, v.encode("latin-1")) for n, v in headers.items()], **options)


def _creating(client: httpx.Client, name: str) -> list[tuple[str, dict[str, Any]]]:
    """Every route that creates, with a body that it takes."""
    schedule = client.post("/api/schedules", json={**SCHEDULE, "name": name}).json()["id"]
    prompt = {"text": "a", "model": "nothing"}
    return [
        ("/api/jobs", {"json": JOB}),
        ("/api/schedules", {"json": SCHEDULE}),
        (f"/api/schedules/{schedule}/run", {}),
        (f"/api/datasets?name={name}", {"content": b"text " * 100}),
        ("/api/generate", {"json": prompt}),
        ("/api/batch_generate", {"json": {"texts": ["a"], "model": "nothing"}}),
        ("/api/checkpoints/load", {"json": {"checkpoint_id": "ckpt_00000000000000000000"}}),
    ]


@pytest.mark.parametrize("key", RUBBISH)
def test_what_is_no_key_is_refused_on_every_route_that_takes_one(web: AttackedWeb, key: str) -> None:
    with web.client(web.keys[Role.ADMIN]) as client:
        for path, options in _creating(client, f"rubbish-{RUBBISH.index(key)}"):
            answer = _post(client, path, key, **options)
            assert answer.status_code == 400, (path, answer.text)
            assert "Idempotency-Key" in answer.json()["detail"]


def test_a_repeated_request_creates_nothing_and_is_marked(web: AttackedWeb) -> None:
    with web.client(web.keys[Role.ADMIN]) as client:
        for path, options in _creating(client, "repeated")[:4]:
            first, again = (_post(client, path, "once", **dict(options)) for _ in range(2))
            assert first.is_success, (path, first.text)
            assert (again.status_code, again.headers["location"]) == (first.status_code, first.headers["location"]), (
                path
            )
            assert "idempotent-replayed" not in first.headers
            assert again.headers["idempotent-replayed"] == "true", path
            same = ("id", "name")
            assert [first.json().get(name) for name in same] == [again.json().get(name) for name in same]


def test_a_key_with_another_body_is_refused(web: AttackedWeb) -> None:
    with web.client(web.keys[Role.ADMIN]) as client:
        assert _post(client, "/api/jobs", "other body", json=JOB).status_code == 202
        assert _post(client, "/api/jobs", "other body", json={**JOB, "priority": 1}).status_code == 422
        assert _post(client, "/api/schedules", "other body", json=SCHEDULE).status_code == 201
        assert _post(client, "/api/schedules", "other body", json={**SCHEDULE, "cron": "@hourly"}).status_code == 422
        assert _post(client, "/api/datasets?name=other-1", "other body", content=b"a text").status_code == 201
        assert _post(client, "/api/datasets?name=other-1", "other body", content=b"another").status_code == 422
        assert _post(client, "/api/datasets?name=other-2", "other body", content=b"a text").status_code == 422


def test_two_owners_may_choose_the_same_key(web: AttackedWeb) -> None:
    with web.database.write() as session:
        teams = [create_key(session, f"team {number}", Role.SUBMITTER) for number in range(2)]
    ids = []
    for team in teams:
        with web.client(team) as client:
            answers = [_post(client, "/api/jobs", "nightly-2026-11-29", json=JOB) for _ in range(2)]
            assert {answer.status_code for answer in answers} == {202}
            ids.append({answer.json()["id"] for answer in answers})
    assert [len(found) for found in ids] == [1, 1]
    assert ids[0].isdisjoint(ids[1])
    with web.client(teams[0]) as client:  # another body tells nothing of the other team's job
        detail = _post(client, "/api/jobs", "nightly-2026-11-29", json={**JOB, "priority": 2}).json()["detail"]
    assert not any(job_id in detail for job_id in ids[1])


def test_a_key_whose_job_was_deleted_says_so(web: AttackedWeb) -> None:
    with web.client(web.keys[Role.ADMIN]) as client:
        job_id = _post(client, "/api/jobs", "deleted", json=JOB).json()["id"]
        client.post(f"/api/jobs/{job_id}/cancel")
        assert client.delete(f"/api/jobs/{job_id}").status_code == 204
        answer = _post(client, "/api/jobs", "deleted", json=JOB)
    assert (answer.status_code, "deleted" in answer.json()["detail"]) == (409, True)


def test_a_key_is_forgotten_after_a_day(database: Database) -> None:
    key = IdempotencyKey("key:a", "/api/jobs", "k", "0" * 64)
    made = iter(["first", "second", "third"])
    create: Callable[[], str] = made.__next__
    with database.write() as session:
        assert create_once(session, key, create) == ("first", False)
        assert create_once(session, key, create) == ("first", True)
    _age(database, LIFETIME_S + 1)
    other_body = IdempotencyKey("key:a", "/api/jobs", "k", "1" * 64)
    with database.write() as session:
        assert known_resource(session, key) is None
        assert create_once(session, other_body, create) == ("second", False)
        assert sweep_expired(session) == 0
    with pytest.raises(IdempotencyMismatch), database.write() as session:
        create_once(session, key, create)
    _age(database, LIFETIME_S + 1)
    with database.write() as session:
        assert sweep_expired(session) == 1


def test_what_could_not_be_created_leaves_the_key_unused(database: Database) -> None:
    key = IdempotencyKey("key:a", "/api/jobs", "k", "0" * 64)

    def fail() -> str:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), database.write() as session:
        create_once(session, key, fail)
    with database.write() as session:
        assert create_once(session, key, lambda: "made") == ("made", False)


def _age(database: Database, seconds: float) -> None:
    with database.write() as session:
        session.execute(update(IdempotencyKeyRow).values(created_at=now_plus(-seconds)))
