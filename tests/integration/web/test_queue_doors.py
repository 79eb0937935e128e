"""Every door checks the same things; lists say why jobs wait; `/readyz` is true only when a job would be taken."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, event, update

from apt_jobs.db.clock import now_plus
from apt_jobs.db.jobs import insert_job
from apt_jobs.db.models import Job, Schedule, ScheduleRun
from apt_jobs.db.workers import pause_worker, record_worker
from apt_jobs.jobs.spec import TrainSpec, parse_spec
from tests.integration.faulty_valkey import Valkey
from tests.integration.web.served import Served, until

pytestmark = pytest.mark.parametrize("served", ["direct"], indirect=True)
CRON = {"name": "nightly", "cron": "0 3 * * *"}
ABSENT: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dataset", {"kind": "train", "dataset": "absent"}),
    ("validation_dataset", {"kind": "train", "validation_dataset": "absent"}),
    ("validation_datasets/wiki", {"kind": "train", "validation_datasets": {"wiki": "absent"}}),
    ("datasets/1/name", {"kind": "train", "datasets": [{"name": "pydoc-topics"}, {"name": "absent"}]}),
    ("base_model", {"kind": "train", "base_model": "absent"}),
    ("base_model", {"kind": "train", "base_model": f"ckpt_{0:020d}"}),
    ("entry_point", {"kind": "train", "entry_point": "absent"}),
    ("model", {"kind": "generate", "texts": ["x"], "model": "absent"}),
)


def worker(served: Served, **fields: Any) -> None:
    values: dict[str, Any] = {
        "kind": "train",
        "queues": ["train"],
        "hostname": "here",
        "pid": 1,
        "version": "1",
        "gpus": [],
    }
    with served.database.write() as session:
        values |= {"name": "a", "current_job_id": None, "entry_points": ["own"]}
        record_worker(session, **(values | fields))


def test_every_door_refuses_what_does_not_exist_naming_the_field(served: Served, http: httpx.Client) -> None:
    worker(served)
    schedule = http.post("/api/schedules", json={**CRON, "job": {"kind": "train"}}).json()["id"]
    for field, job in ABSENT:
        body = {**CRON, "job": job}
        answers = {
            "POST /api/jobs": (http.post("/api/jobs", json=job), f"#/{field}"),
            "POST /api/schedules": (http.post("/api/schedules", json=body), f"#/job/{field}"),
            "PUT /api/schedules": (http.put(f"/api/schedules/{schedule}", json=body), f"#/job/{field}"),
        }
        with served.database.write() as session:  # it existed when the schedule was made
            session.execute(update(Schedule).values(spec=stored(job)))
        answers["run now"] = http.post(f"/api/schedules/{schedule}/run"), f"#/{field}"
        with served.database.write() as session:
            row = insert_job(session, TrainSpec(kind="train"))
            session.execute(update(Job).where(Job.id == row.id).values(spec=stored(job), state="failed"))
        answers["retry"] = http.post(f"/api/jobs/{row.id}/retry"), f"#/{field}"
        for door, (answer, pointer) in answers.items():
            assert answer.status_code == 422, (door, field, answer.text)
            assert [fault["pointer"] for fault in answer.json()["errors"]] == [pointer], (door, field)
        assert http.get(f"/api/jobs/{row.id}").json()["state"] == "failed"
        due_now(served, schedule, f"{field} 'absent'" if "ckpt" not in str(job) else "ckpt_")


def test_a_shape_beside_a_base_model_is_refused_by_field(served: Served, http: httpx.Client) -> None:
    (served.settings.local_models_dir / "tiny").mkdir(parents=True)
    (served.settings.local_models_dir / "tiny" / "config.json").write_text("{}")
    job = {"kind": "train", "base_model": "tiny", "model": {"d_model": 64, "num_layers": 2, "max_seq_len": 32}}
    answer = http.post("/api/jobs", json=job)
    assert answer.status_code == 422
    assert [fault["pointer"] for fault in answer.json()["errors"]] == ["#/model/d_model", "#/model/num_layers"]
    assert http.post("/api/jobs", json={**job, "model": {"max_seq_len": 32}}).status_code == 202
    with served.database.write() as session:  # one of an earlier version
        row = insert_job(session, TrainSpec(kind="train"))
        session.execute(update(Job).where(Job.id == row.id).values(spec=stored(job), state="failed"))
    assert http.post(f"/api/jobs/{row.id}/retry").status_code == 200


def test_a_job_comes_after_one_that_is_there_and_can_succeed(served: Served, http: httpx.Client) -> None:
    parent = http.post("/api/jobs", json={"kind": "train"}).json()["id"]
    body = {"kind": "train", "after": [{"job": parent}]}
    child = http.post("/api/jobs", json=body).json()["id"]
    held = http.get(f"/api/jobs/{child}").json()
    assert (held["waiting_for"], held["queue_position"]) == (f"comes after {parent} (queued)", None)
    assert http.get("/api/jobs").json()["data"][0]["waiting_for"] == held["waiting_for"]
    http.post(f"/api/jobs/{parent}/cancel").raise_for_status()
    ended = http.get(f"/api/jobs/{child}").json()
    assert (ended["state"], parent in ended["reason"]) == ("cancelled", True)
    for wrong in (body, {"kind": "generate", "texts": ["x"], "after": [{"job": f"job_{0:020d}"}]}):
        answer = http.post("/api/jobs", json=wrong)
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "#/after/0/job"), answer.text
        schedule = http.post("/api/schedules", json={**CRON, "job": wrong})
        assert (schedule.status_code, schedule.json()["errors"][0]["pointer"]) == (422, "#/job/after/0/job")


def stored(job: dict[str, Any]) -> dict[str, Any]:
    return parse_spec(job).model_dump(mode="json")


def due_now(served: Served, schedule: str, expected: str) -> None:
    """Let the schedule come due: its run is refused with the reason, and no job is made."""
    with served.database.write() as session:
        session.execute(update(Schedule).where(Schedule.id == schedule).values(next_due_at=now_plus(-1)))

    def reason() -> str | None:
        with served.database.read() as session:
            run = session.query(ScheduleRun).order_by(ScheduleRun.due_at.desc()).first()
            return None if run is None or run.outcome != "refused" else run.reason

    until(lambda: expected in (reason() or ""))


@pytest.mark.parametrize("known", [["own", "absent"], None])
def test_an_entry_point_that_a_worker_has_or_may_have_is_taken(
    served: Served, http: httpx.Client, known: list[str] | None
) -> None:
    job = {"kind": "train", "entry_point": "absent"}
    assert http.post("/api/jobs", json=job).status_code == 202  # no worker of the queue lives: one may come
    worker(served)
    assert http.post("/api/jobs", json=job).status_code == 422
    worker(served, name="b", entry_points=known)
    assert http.post("/api/jobs", json=job).status_code == 202


def test_lists_say_why_jobs_wait_and_workers_why_they_claim_nothing(served: Served, http: httpx.Client) -> None:
    first, second = (http.post("/api/jobs", json={"kind": "train"}).json()["id"] for _ in range(2))
    rows = {row["id"]: row for row in http.get("/api/jobs").json()["data"]}
    assert "no train worker serves the queue 'train'" in rows[first]["waiting_for"]
    worker(served)
    rows = {row["id"]: row for row in http.get("/api/jobs", params={"state": "queued"}).json()["data"]}
    assert (rows[first]["queue_position"], rows[second]["queue_position"]) == (1, 2)
    assert rows[second]["waiting_for"] == http.get(f"/api/jobs/{second}").json()["waiting_for"]
    assert "behind 1 job" in rows[second]["waiting_for"]
    with served.database.write() as session:
        pause_worker(session, "a", "no room", 60)
    (row,) = http.get("/api/workers").json()["data"]
    assert row["paused_reason"] == "no room"
    assert http.post("/api/workers/a/resume").json()["paused_reason"] is None


def test_readiness_is_one_cheap_check_for_any_number_of_requests(served: Served, http: httpx.Client) -> None:
    until(lambda: http.get("/readyz").status_code == 200)  # the first check of a busy machine may take its two seconds
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        with ThreadPoolExecutor(8) as pool:
            began = time.monotonic()
            codes = list(pool.map(lambda _: http.get("/readyz").status_code, range(200)))
            took_s = time.monotonic() - began
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert set(codes) == {200}
    assert sum(statement == "SELECT 1" for statement in statements) <= took_s + 2


def test_a_frozen_broker_makes_it_not_ready_within_seconds(served: Served, http: httpx.Client, valkey: Valkey) -> None:
    until(lambda: http.get("/readyz").status_code == 200)
    valkey.send(signal.SIGSTOP)
    try:
        until(lambda: http.get("/readyz").status_code == 503)
        began = time.monotonic()
        answer = http.get("/readyz")
        assert time.monotonic() - began < 10
        assert "broker" in answer.json()["detail"] or "checks take longer" in answer.json()["detail"]
    finally:
        valkey.send(signal.SIGCONT)
    until(lambda: http.get("/readyz").status_code == 200)


def test_a_disk_without_room_refuses_submissions_and_is_not_ready(
    served: Served, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apt_jobs.operations.data_directory.os.statvfs", lambda _path: Full)
    answer = http.post("/api/jobs", json={"kind": "train"})
    assert (answer.status_code, "bytes are free" in answer.json()["detail"]) == (507, True)
    until(lambda: http.get("/readyz").status_code == 503)
    assert "bytes are free" in http.get("/readyz").json()["detail"]
    monkeypatch.undo()
    until(lambda: http.get("/readyz").status_code == 200)
    assert http.post("/api/jobs", json={"kind": "train"}).status_code == 202


class Full:
    """What `os.statvfs` says of a full disk."""

    f_bavail = 0
    f_frsize = 4096
