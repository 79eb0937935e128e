"""Webhooks through a real service and a real receiver: what is sent, to whom, how often, and what is refused."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr
from sqlalchemy import select, update
from typer.testing import CliRunner

from apt_jobs import cli
from apt_jobs.client import AsyncClient
from apt_jobs.db.clock import now_plus
from apt_jobs.db.jobs import finish
from apt_jobs.db.models import Schedule, WorkerRow
from apt_jobs.db.webhook_models import Delivery, Webhook
from apt_jobs.db.webhooks import MAX_TRIES
from apt_jobs.db.workers import record_worker
from apt_jobs.events.kinds import IncidentChanged
from apt_jobs.jobs.states import JobState
from apt_jobs.operations.webhooks import new_secret
from apt_jobs.settings import Settings
from apt_jobs.web import webhook_loop
from tests.conftest import some_port
from tests.integration.web.receiver import Receiver, drip, hang, redirect
from tests.integration.web.served import Served, until

HOW_TO = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "webhooks.md"
ENDS = ["job.succeeded", "job.failed", "job.cancelled", "job.dead"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path, valkey_server_url: str) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "apt_jobs.sqlite3").write_bytes(sqlite_template.read_bytes())
    settings = Settings(
        data_dir=folder,
        redis_url=SecretStr(valkey_server_url),
        webhook_allow_targets=("127.0.0.1", "localhost"),
        webhook_retry_wait_s=0.05,
        webhook_timeout_s=2.0,
        alert_services=("json",),  # apprise's own webhooks
    )
    service = Served(settings, direct=True)
    with pytest.MonkeyPatch.context() as quicker:
        quicker.setattr(webhook_loop, "LOOK_EVERY_S", 0.05)
        quicker.setattr(webhook_loop, "CONDITIONS_EVERY_S", 0.2)
        service.start()
        yield service
        service.stop()
    service.close()


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    """A client with an admin's key; the webhooks that a test made are deleted."""
    with served.rest_client() as client:
        yield client
        for row in client.get("/api/webhooks").json()["data"]:
            client.delete(f"/api/webhooks/{row['id']}")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def hook(http: httpx.Client, receiver: Receiver, *events: str, **fields: Any) -> str:
    """Make a webhook to a receiver, which knows its key."""
    body = {"name": "ops", "url": receiver.url, "events": list(events or ENDS), **fields}
    answer = http.post("/api/webhooks", json=body)
    assert answer.status_code == 201, answer.text
    receiver.secret = answer.json()["secret"]
    return str(answer.json()["id"])


def end(served: Served, job_id: str, state: JobState = JobState.FAILED, reason: str | None = "no luck") -> None:
    with served.database.write() as session:
        finish(session, job_id, 1, state, reason=reason, error={"message": "it broke"} if reason else None)


def deliveries(http: httpx.Client, webhook_id: str, **query: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = http.get(f"/api/webhooks/{webhook_id}/deliveries", params=query).json()["data"]
    return rows


def submit(http: httpx.Client, **fields: Any) -> str:
    return str(http.post("/api/jobs", json={"kind": "train", **fields}).json()["id"])


def test_the_end_of_a_job_is_sent_signed_and_logged(served: Served, http: httpx.Client, receiver: Receiver) -> None:
    webhook_id = hook(http, receiver)
    job_id = served.new_job()
    end(served, job_id)
    until(lambda: receiver.messages)
    (message,) = receiver.messages
    assert message["type"] == "job.failed"
    assert message["data"]["job_id"] == job_id
    assert message["data"]["reason"] == "no luck"
    assert message["data"]["error"] == "it broke"
    assert receiver.headers[0]["host"] == f"127.0.0.1:{receiver.port}"
    until(lambda: deliveries(http, webhook_id, state="delivered"))
    (row,) = deliveries(http, webhook_id)
    assert (row["id"], row["status"], row["num_tries"]) == (receiver.ids()[0], 204, 1)
    assert served.database.dialect == "sqlite"


def test_children_that_end_with_their_parent_are_sent_too(http: httpx.Client, receiver: Receiver) -> None:
    hook(http, receiver)
    parent = submit(http)
    child = submit(http, after=[{"job": parent, "on": "success"}])
    http.post(f"/api/jobs/{parent}/cancel")
    until(lambda: len(receiver.messages) == 2)
    assert {message["data"]["job_id"] for message in receiver.messages} == {parent, child}


def test_a_filter_and_the_list_of_events_say_what_is_sent(http: httpx.Client, receiver: Receiver) -> None:
    hook(http, receiver, "job.cancelled", filter="label:team=a priority>3")
    for fields in ({"labels": {"team": "b"}, "priority": 5}, {"labels": {"team": "a"}, "priority": 1}):
        http.post(f"/api/jobs/{submit(http, **fields)}/cancel")
    wanted = submit(http, labels={"team": "a"}, priority=5)
    http.post(f"/api/jobs/{wanted}/cancel")
    until(lambda: receiver.messages)
    assert [message["data"]["job_id"] for message in receiver.messages] == [wanted]


def test_an_incident_is_sent_once_as_it_opens(served: Served, http: httpx.Client, receiver: Receiver) -> None:
    hook(http, receiver, "incident.opened")
    job_id = served.new_job()
    fields: dict[str, Any] = {
        "incident": 1, "anomaly": "nan", "group": "all layers", "began_step": 7, "step": 7, "num_steps": 1,
        "layers": ("a",), "num_layers": 1, "ranks": (), "origin": None, "value": None, "expected_low": None,
        "expected_high": None, "message": "layer a is not finite",
    }  # fmt: skip
    served.say(job_id, *(IncidentChanged(phase=phase, **fields) for phase in ("begun", "updated", "ended")))
    until(lambda: receiver.messages)
    assert receiver.messages[0]["data"]["incident"]["message"] == "layer a is not finite"
    assert receiver.types() == ["incident.opened"]


def test_a_lost_worker_and_a_long_queue_are_sent_once_each(
    served: Served, http: httpx.Client, receiver: Receiver
) -> None:
    fields: dict[str, Any] = {"queues": ["q"], "hostname": "h", "pid": 1, "version": "1", "gpus": []}
    with served.database.write() as session:
        for name in ("worker-lost", "worker-alive"):
            record_worker(session, name=name, kind="train", current_job_id=None, **fields)
    webhook_id = hook(http, receiver, "worker.lost", "queue.too_long", queue_above=2, filter="queue:q")
    with served.database.write() as session:
        session.execute(update(Webhook).values(created_at=now_plus(-3_600)))
        session.execute(update(WorkerRow).where(WorkerRow.name == "worker-lost").values(heartbeat_at=now_plus(-600)))
    jobs = [submit(http, queue="q") for _ in range(3)]
    submit(http, queue="other"), submit(http, queue="other"), submit(http, queue="other")
    until(lambda: len(receiver.messages) == 2)
    by_type = {message["type"]: message["data"] for message in receiver.messages}
    assert by_type["worker.lost"]["worker"] == "worker-lost"
    assert by_type["queue.too_long"] == {"queue": "q", "queued": 3, "limit": 2}
    http.post("/api/jobs/cancel", json={"ids": jobs})
    with served.database.write() as session:
        session.execute(update(WorkerRow).values(heartbeat_at=now_plus(0)))
    assert len(deliveries(http, webhook_id)) == 2


def test_missed_due_times_are_sent_as_one(served: Served, http: httpx.Client, receiver: Receiver) -> None:
    hook(http, receiver, "schedule.missed", filter="label:team=a")
    ids = []
    for team in ("a", "b"):
        body = {
            "name": team,
            "cron": "0 * * * *",
            "catch_up": "skip",
            "job": {"kind": "train", "labels": {"team": team}},
        }
        ids.append(http.post("/api/schedules", json=body).json()["id"])
    with served.database.write() as session:
        missed = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=4)
        session.execute(update(Schedule).values(next_due_at=missed))
    until(lambda: receiver.messages)
    (message,) = receiver.messages
    assert message["data"]["schedule_id"] == ids[0]
    assert message["data"]["num_due_times"] in (4, 5)
    assert message["data"]["outcome"] == "missed"
    for schedule_id in ids:
        http.delete(f"/api/schedules/{schedule_id}")


def test_a_target_that_fails_is_tried_again_then_given_up(
    served: Served, http: httpx.Client, receiver: Receiver
) -> None:
    receiver.status = 500
    webhook_id = hook(http, receiver)
    http.post(f"/api/jobs/{submit(http)}/cancel")
    until(lambda: len(receiver.messages) >= 3)
    assert len(set(receiver.ids())) == 1
    assert http.get(f"/api/webhooks/{webhook_id}").json()["failing_since_at"]
    with served.database.write() as session:  # the last try
        session.execute(update(Delivery).values(num_tries=MAX_TRIES - 1, next_try_at=now_plus(0)))
    until(lambda: deliveries(http, webhook_id, state="failed"))
    (row,) = deliveries(http, webhook_id)
    assert (row["status"], row["error"], row["next_try_at"]) == (500, "it answered 500", None)
    receiver.status = 204
    replayed = http.post(f"/api/webhooks/{webhook_id}/deliveries/{row['id']}/replay")
    assert (replayed.status_code, replayed.json()["state"]) == (202, "waiting")
    until(lambda: deliveries(http, webhook_id, state="delivered"))
    assert http.get(f"/api/webhooks/{webhook_id}").json()["failing_since_at"] is None


def test_a_target_that_fails_for_a_day_is_disabled_and_can_be_enabled(
    served: Served, http: httpx.Client, receiver: Receiver
) -> None:
    receiver.status = 500
    webhook_id = hook(http, receiver)
    with served.database.write() as session:
        session.execute(update(Webhook).values(failing_since_at=now_plus(-86_401)))
    http.post(f"/api/jobs/{submit(http)}/cancel")
    until(lambda: not http.get(f"/api/webhooks/{webhook_id}").json()["enabled"])
    answer = http.get(f"/api/webhooks/{webhook_id}").json()
    assert answer["disabled_reason"] == "nothing was delivered for 24 hours; the last failure: it answered 500"
    http.post(f"/api/jobs/{submit(http)}/cancel")
    (row,) = deliveries(http, webhook_id)  # of the job that ended meanwhile nothing is kept
    assert http.post(f"/api/webhooks/{webhook_id}/deliveries/{row['id']}/replay").status_code == 409
    receiver.status = 204
    assert http.post(f"/api/webhooks/{webhook_id}/test").status_code == 202  # it is sent all the same
    until(lambda: "webhook.test" in receiver.types())
    answer = http.patch(f"/api/webhooks/{webhook_id}", json={"enabled": True}).json()
    assert (answer["enabled"], answer["failing_since_at"]) == (True, None)
    until(lambda: len(deliveries(http, webhook_id, state="delivered")) == 2)


@pytest.mark.parametrize(
    ("respond", "status", "error"),
    [
        (hang, None, "no whole answer within 2 s"),
        (redirect, 307, "it answered 307; redirects are not followed: give the address that it leads to"),
        (drip, 200, None),
    ],
)
def test_what_a_target_does_is_bounded(
    http: httpx.Client, receiver: Receiver, respond: Any, status: int | None, error: str | None
) -> None:
    receiver.respond = respond
    webhook_id = hook(http, receiver)
    quick = Receiver()
    hook(http, quick)
    http.post(f"/api/jobs/{submit(http)}/cancel")
    until(lambda: quick.messages)  # whatever another target does
    quick.close()
    until(lambda: deliveries(http, webhook_id)[0]["duration_ms"] is not None)
    row = deliveries(http, webhook_id)[0]
    assert (row["status"], row["error"]) == (status, error)
    assert len(row["answer"] or "") <= 1_000
    if respond is redirect:
        assert len(receiver.messages) == row["num_tries"]


@pytest.mark.parametrize("host", ["127.0.0.2", "2130706434", "0x7f.2", "127.2", "[::ffff:127.0.0.2]", "[::1]"])
def test_nothing_is_sent_to_an_address_that_is_not_allowed_however_it_is_written(
    served: Served, http: httpx.Client, receiver: Receiver, host: str
) -> None:
    webhook_id = hook(http, receiver)
    with served.database.write() as session:
        session.execute(update(Webhook).values(url=f"http://{host}:{receiver.port}/"))
    http.post(f"/api/webhooks/{webhook_id}/test")
    until(lambda: deliveries(http, webhook_id)[0]["error"])
    assert "APT_JOBS_WEBHOOK_ALLOW_TARGETS" in deliveries(http, webhook_id)[0]["error"]
    assert receiver.messages == []


@pytest.mark.parametrize("first", ["127.0.0.1", "127.0.0.2"])
def test_a_name_is_looked_up_once_for_a_try(
    served: Served, http: httpx.Client, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """A name server that changes its answer between a check and a connection."""
    known, answers = socket.getaddrinfo, [first, "127.0.0.2" if first == "127.0.0.1" else "127.0.0.1"]
    asked: list[str] = []

    def rebinding(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if host != "rebound.example":
            return known(host, port, *args, **options)
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers[(len(asked) - 1) % 2], port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    webhook_id = hook(http, receiver)
    with served.database.write() as session:
        session.execute(update(Webhook).values(url=f"http://rebound.example:{receiver.port}/"))
    http.post(f"/api/webhooks/{webhook_id}/test")
    until(lambda: deliveries(http, webhook_id, state="delivered"))
    (row,) = deliveries(http, webhook_id)
    assert len(receiver.messages) == 1
    assert len(asked) == row["num_tries"] == (1 if first == "127.0.0.1" else 2)  # the first try of the other is refused
    assert receiver.headers[0]["host"] == f"rebound.example:{receiver.port}"


def test_a_process_without_the_key_of_the_secrets_blames_no_target(
    served: Served, http: httpx.Client, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    webhook_id = hook(http, receiver)
    with served.database.write() as session:
        row = session.scalars(select(Webhook)).one()
        kept, row.encrypted = row.encrypted, Fernet(Fernet.generate_key()).encrypt(b"x").decode()
    http.post(f"/api/webhooks/{webhook_id}/test")
    until(lambda: "does not decrypt" in str([vars(record) for record in caplog.records]))
    assert deliveries(http, webhook_id)[0]["state"] == "waiting"
    assert http.get(f"/api/webhooks/{webhook_id}").json()["failing_since_at"] is None
    with served.database.write() as session:  # another process takes it when the lease is over
        session.execute(update(Webhook).values(encrypted=kept))
        session.execute(update(Delivery).values(next_try_at=now_plus(0)))
    until(lambda: receiver.messages)


def test_apprise_sends_words_and_its_url_is_never_shown(http: httpx.Client, receiver: Receiver) -> None:
    body = {"name": "chat", "kind": "apprise", "url": f"json://user:hunter22@127.0.0.1:{receiver.port}/x"}
    answer = http.post("/api/webhooks", json={**body, "events": ["job.cancelled"]})
    assert answer.status_code == 201
    assert (answer.json()["url"], answer.json()["secret"]) == (None, None)
    job_id = submit(http, name="nightly")
    http.post(f"/api/jobs/{job_id}/cancel")
    webhook_id = answer.json()["id"]
    until(lambda: deliveries(http, webhook_id, state="delivered"))
    words = f"{receiver.messages[0]['title']} {receiver.messages[0]['message']}"
    assert "job nightly cancelled" in words
    assert f"/jobs/{job_id}" in words
    assert "hunter22" not in http.get("/api/webhooks").text + http.get(f"/api/webhooks/{webhook_id}/deliveries").text


def test_the_key_is_shown_once_and_a_repeated_request_makes_one(http: httpx.Client, receiver: Receiver) -> None:
    body = {"name": "ops", "url": receiver.url, "events": ["worker.lost"]}
    first, second = (http.post("/api/webhooks", json=body, headers={"idempotency-key": "one"}) for _ in range(2))
    assert first.json()["secret"].startswith("whsec_")
    assert second.json()["id"] == first.json()["id"]
    assert second.json()["secret"] is None
    assert "whsec_" not in http.get("/api/webhooks").text
    own = "whsec_" + "QUJD" * 8
    assert http.post("/api/webhooks", json={**body, "secret": own}).json()["secret"] == own


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"url": "http://169.254.169.254/latest"}, "link-local"),
        ({"url": "http://[::ffff:10.0.0.1]/"}, "IPv4 address written as IPv6"),
        ({"url": "ftp://receiver.example/"}, "neither https:// nor http://"),
        ({"url": "https://user:hunter22@receiver.example/"}, "user name"),
        ({"url": "https://[::1"}, "cannot be read"),
        ({"secret": "whsec_hunter22"}, "no key of signatures"),
        ({"filter": "nonsense:x"}, "no field"),
        ({"events": ["queue.too_long"]}, "queue_above"),
        ({"queue_above": 3}, "queue_above"),
        ({"events": []}, "at least 1"),
        ({"events": ["job.exploded"]}, "job.succeeded"),
        ({"kind": "apprise", "url": "slack://hunter22"}, "not allowed"),
        ({"kind": "apprise", "url": "json://"}, "cannot read"),
        ({"name": " "}, "at least 1"),
        ({"extra": 1}, "extra"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_words_that_hold_no_secret(
    http: httpx.Client, fields: dict[str, Any], words: str
) -> None:
    body = {"name": "ops", "url": "https://receiver.example/", "events": ["job.failed"], **fields}
    answer = http.post("/api/webhooks", json=body)
    assert answer.status_code == 422
    assert words in answer.text
    assert "hunter22" not in answer.text
    assert http.get("/api/webhooks").json()["data"] == []


def test_a_webhook_is_changed_field_by_field(http: httpx.Client, receiver: Receiver) -> None:
    webhook_id = hook(http, receiver, filter="queue:a")
    address = f"/api/webhooks/{webhook_id}"
    assert http.patch(address, json={}).status_code == 422
    assert http.patch(address, json={"url": "http://10.0.0.1/"}).status_code == 422
    answer = http.patch(address, json={"filter": None, "name": "new", "enabled": False}).json()
    assert (answer["filter"], answer["name"], answer["enabled"]) == (None, "new", False)
    assert answer["disabled_reason"] == "an administrator disabled it"
    assert answer["url"] == receiver.url
    for method, path in (("GET", ""), ("PATCH", ""), ("POST", "/test"), ("GET", "/deliveries"), ("DELETE", "")):
        gone = http.request(method, f"/api/webhooks/wh_none{path}", json={"name": "x"} if method == "PATCH" else None)
        assert gone.status_code == 404, (method, path)


def test_the_command_line_does_all_of_it(
    served: Served, http: httpx.Client, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APT_JOBS_URL", f"http://127.0.0.1:{served.settings.port}")
    monkeypatch.setenv("APT_JOBS_API_KEY", served.key)

    def run(*arguments: str, given: str | None = None, status: int = 0) -> str:
        result = CliRunner().invoke(cli.app, ["webhooks", *arguments], input=given)
        assert result.exit_code == status, result.output
        return result.output

    made = run("create", "ops", receiver.url, "-e", "job.failed", "-e", "worker.lost", "--filter", "queue:a")
    receiver.secret = re.search(r"whsec_\S+", made)[0]  # type: ignore[index]  # it is there, or the test fails
    webhook_id = made.split()[0]
    assert "delivered in" in run("test", webhook_id)
    assert webhook_id in run("ls")
    delivery_id = json.loads(run("deliveries", webhook_id, "--json"))[0]["id"]
    assert delivery_id in run("deliveries", webhook_id, "--state", "delivered")
    run("replay", webhook_id, delivery_id)
    until(lambda: receiver.ids() == [delivery_id] * 2)
    run("disable", webhook_id)
    assert "disabled" in run("ls")
    run("enable", webhook_id)
    assert json.loads(run("inspect", webhook_id))["events"] == ["job.failed", "worker.lost"]
    receiver.status = 500
    assert "was not delivered: it answered 500" in run("test", webhook_id, status=1)
    run("delete", webhook_id)
    assert "is sent job.failed" in run(
        "create", "chat", "-", "-e", "job.failed", given=f"json://127.0.0.1:{receiver.port}"
    )


def test_the_client_for_asyncio_does_all_of_it(served: Served, http: httpx.Client, receiver: Receiver) -> None:
    async def use() -> None:
        async with AsyncClient(f"http://127.0.0.1:{served.settings.port}", served.key) as client:
            hook = await client.create_webhook("ops", receiver.url, ["job.failed"], idempotency_key="once")
            assert await client.webhooks() == [await client.webhook(hook["id"])]
            delivery = await client.test_webhook(hook["id"])
            assert [row["id"] for row in await client.webhook_deliveries(hook["id"])] == [delivery["id"]]
            await client.replay_webhook_delivery(hook["id"], delivery["id"])
            assert not (await client.update_webhook(hook["id"], {"enabled": False}))["enabled"]
            await client.delete_webhook(hook["id"])

    asyncio.run(use())


def test_the_receiver_of_the_documentation_takes_what_is_signed(
    served: Served, http: httpx.Client, tmp_path: Path
) -> None:
    [script] = re.findall(r'```python title="receiver.py"\n(.*?)```', HOW_TO.read_text(), re.DOTALL)
    port, secret = some_port(), new_secret()
    body = {"name": "docs", "url": f"http://127.0.0.1:{port}/", "events": ["job.cancelled"]}
    ids = [http.post("/api/webhooks", json={**body, "secret": key}).json()["id"] for key in (secret, new_secret())]
    environment = {**os.environ, "WEBHOOK_SECRET": secret, "PORT": str(port)}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            job_id = submit(http)
            http.post(f"/api/jobs/{job_id}/cancel")
            until(lambda: deliveries(http, ids[0], state="delivered"))
            until(lambda: deliveries(http, ids[1])[0]["status"])
            assert deliveries(http, ids[1])[0]["error"] == "it answered 400"
            assert process.stdout is not None
            assert job_id in process.stdout.readline().decode()
        finally:
            process.kill()
