"""Pause, resume, retry, time limits, drained workers, limited queues and schedules, on a running stack."""

import json
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from apt_jobs.client.client import Client
from apt_jobs.db.models import Schedule
from apt_jobs.errors import Conflict, InvalidInput, NotFound
from tests.acceptance.stack import LONG, SOON_DONE, TINY, Stack, attempts_of, marked, until

WHILE_S = 60.0


def states(client: Client, job_id: str) -> list[str]:
    events = client._json("GET", f"/api/jobs/{job_id}/events", params={"kind": "state"})["data"]
    return [event["state"] for event in events]


def steps(client: Client, job_id: str) -> list[int]:
    return list(client.metrics(job_id, points=10_000)["steps"])


def shortened(max_steps: int) -> dict[str, Any]:
    return {**LONG, "training": {**LONG["training"], "max_steps": max_steps}}


def test_a_paused_training_saves_its_step_frees_the_worker_and_goes_on_there(client: Client) -> None:
    job = client.submit(shortened(150))
    until(lambda: (client.get(job["id"])["step"] or 0) >= 10)
    assert client.pause(job["id"])["state"] == "pausing"
    assert client.pause(job["id"])["state"] in ("pausing", "paused")
    paused = until(lambda: (row := client.get(job["id"]))["state"] == "paused" and row)
    assert paused["reason"] == f"paused by a user; saved at step {paused['step']}"
    assert marked(job["id"]) == []
    other = client.wait(client.submit(SOON_DONE)["id"])  # the worker is free
    assert other["state"] == "succeeded"
    assert client.resume(job["id"])["state"] == "queued"
    ended = client.wait(job["id"])
    first, second = attempts_of(client, job["id"])
    assert (ended["state"], second["resumed_from_step"], first["steps_lost"]) == ("succeeded", paused["step"], 0)
    assert steps(client, job["id"]) == list(range(1, 151))


def test_a_cancelled_training_is_retried_from_its_checkpoint(client: Client) -> None:
    job = client.submit(shortened(60))
    until(lambda: client.checkpoints(job["id"]))
    began = time.monotonic()
    client.cancel(job["id"])
    until(lambda: client.get(job["id"])["state"] == "cancelled")
    assert time.monotonic() - began < 15.0  # the promise; a machine has to be very slow to break it
    assert marked(job["id"]) == []
    saved = client.checkpoints(job["id"])[0]["global_step"]
    client.retry(job["id"])
    ended = client.wait(job["id"])
    second = attempts_of(client, job["id"])[1]
    assert (ended["state"], second["resumed_from_step"]) == ("succeeded", saved)
    with pytest.raises(Conflict, match="is succeeded"):
        client.retry(job["id"])
    with pytest.raises(Conflict, match="is succeeded"):
        client.pause(job["id"])


def test_a_time_limit_saves_and_fails_in_words(client: Client) -> None:
    job = client.wait(client.submit({**LONG, "time_limit_s": 6.0})["id"])
    assert (job["state"], job["error"]["error"]) == ("failed", "TimeLimit")
    assert job["reason"].startswith("the job's time limit was reached; saved at step ")
    assert client.checkpoints(job["id"])[0]["global_step"] == job["step"]


def test_a_drained_worker_hands_its_job_back_and_claims_nothing_until_resumed(client: Client) -> None:
    job = client.submit(shortened(150))
    until(lambda: (client.get(job["id"])["step"] or 0) >= 5)
    name = next(row["name"] for row in client.workers() if row["kind"] == "train" and row["queues"] == ["train"])
    assert client.steer_worker(name, "drain")["drained"]
    handed_back = until(lambda: (row := client.get(job["id"]))["state"] == "queued" and row)
    assert "the worker was drained; saved at step" in handed_back["reason"]
    waiting = client.submit(SOON_DONE)
    time.sleep(3.0)  # as long as an idle worker takes to look by itself
    assert {client.get(row["id"])["state"] for row in (job, waiting)} == {"queued"}
    assert not client.steer_worker(name, "resume")["drained"]
    ended = client.wait(job["id"])
    assert (ended["state"], client.wait(waiting["id"])["state"]) == ("succeeded", "succeeded")
    assert attempts_of(client, job["id"])[0]["steps_lost"] <= 1
    assert steps(client, job["id"]) == list(range(1, 151))


def test_a_drained_worker_leaves_wake_ups_to_the_others_of_its_queue(stack: Stack, client: Client) -> None:
    name = next(row["name"] for row in client.workers() if row["kind"] == "train" and row["queues"] == ["train"])
    client.steer_worker(name, "drain")
    second = stack.command("worker", "train", "--name=second", "--queue=train")
    try:
        until(lambda: any(row["name"] == "second" for row in client.workers()))
        for _ in range(3):
            job = client.wait(client.submit(SOON_DONE)["id"])
            waited = datetime.fromisoformat(job["claimed_at"]) - datetime.fromisoformat(job["created_at"])
            assert (job["state"], attempts_of(client, job["id"])[0]["worker"]) == ("succeeded", "second")
            assert waited < timedelta(seconds=30), "nobody looked for it"
    finally:
        second.send_signal(signal.SIGTERM)
        second.communicate(timeout=WHILE_S)
        client.steer_worker(name, "resume")


def test_a_paused_queue_waits_and_a_worker_that_is_not_there_is_not_found(client: Client) -> None:
    assert client.configure_queue("generate", paused=True)["paused"]
    job = client.submit({"kind": "generate", "texts": ["a"], "max_length": 1})
    time.sleep(3.0)
    assert client.get(job["id"])["state"] == "queued"
    client.configure_queue("generate", max_running=1)
    assert client.wait(job["id"])["state"] in ("succeeded", "failed")
    assert client.configure_queue("generate")["max_running"] is None
    with pytest.raises(NotFound, match="no worker"):
        client.steer_worker("no/such worker", "drain")
    with pytest.raises(InvalidInput, match="greater than or equal to 1"):
        client.configure_queue("generate", max_running=0)
    with pytest.raises(InvalidInput, match="no name of a queue"):
        client.configure_queue("a b")


def test_a_second_worker_with_the_same_name_is_refused(stack: Stack, client: Client) -> None:
    name = next(row["name"] for row in client.workers() if row["kind"] == "generate")
    second = stack.command("worker", "generate", f"--name={name}")
    _, errors = second.communicate(timeout=WHILE_S)
    assert second.returncode == 2
    assert f"a worker named '{name}' runs on" in errors


def test_a_schedule_fires_when_it_is_due_and_says_what_became_of_it(stack: Stack, client: Client) -> None:
    job = {"kind": "generate", "texts": ["a"], "max_length": 1}
    row = client.create_schedule(name="every day", cron="@daily", job=job, time_zone="Europe/Berlin")
    assert len(row["next_runs"]) == 5
    due = datetime.now(UTC) + timedelta(seconds=1)
    due = due.replace(microsecond=due.microsecond // 1000 * 1000)
    with stack.database() as database, database.write() as session:  # nobody waits for midnight
        session.execute(update(Schedule).where(Schedule.id == row["id"]).values(next_due_at=due))
    run = until(lambda: (client.schedule(row["id"])["runs"] or [None])[0])
    assert (run["outcome"], datetime.fromisoformat(run["due_at"])) == ("submitted", due)
    assert client.wait(run["job_id"])["schedule_id"] == row["id"]
    assert client.steer_schedule(row["id"], "pause")["paused"]
    extra = client.steer_schedule(row["id"], "run")
    assert client.wait(extra["id"])["kind"] == "generate"
    assert client.steer_schedule(row["id"], "resume")["next_run_at"] is not None
    client.delete_schedule(row["id"])
    with pytest.raises(NotFound):
        client.schedule(row["id"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cron": "* " * 60}, "#/cron"),
        ({"cron": "0 0 30 2 *"}, "#/cron: .*bad day-of-month"),
        ({"time_zone": "Mars/Olympus"}, "#/time_zone: .*no IANA time zone"),
        ({"job": {"kind": "train", "dataset": "nowhere"}}, "#/job/dataset"),
        ({"job": {"kind": "train", "surprise": 1}}, "#/job/surprise"),
        ({"overlap": "explode"}, "#/overlap"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused_by_field(client: Client, change: dict[str, Any], words: str) -> None:
    values = {"name": "bad", "cron": "@daily", "job": {"kind": "generate", "texts": ["a"]}}
    with pytest.raises(InvalidInput, match=words):
        client.create_schedule(**{**values, **change})
    assert client.schedules() == []


def test_schedules_are_made_on_the_command_line(stack: Stack, client: Client, tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps(TINY))
    created = stack.command("schedules", "create", "nightly run", "@nightly", str(file), "--time-zone=Asia/Kathmandu")
    printed, errors = created.communicate(timeout=WHILE_S)
    assert created.returncode == 0, errors
    (row,) = client.schedules()
    assert row["id"] in printed
    listed, _ = stack.command("schedules", "list", "--json").communicate(timeout=WHILE_S)
    assert json.loads(listed)[0]["next_run_at"].endswith("21:45:00.000Z")
    deleted = stack.command("schedules", "delete", row["id"])
    deleted.communicate(timeout=WHILE_S)
    assert (deleted.returncode, client.schedules()) == (0, [])
