"""The outbox and its tries on both databases: written with the change, claimed by one, repeated when that one dies."""

import json
from typing import Any

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.engine import Database
from apt_jobs.db.job_groups import claim_due, finish_succeeded
from apt_jobs.db.jobs import claim, finish, insert_job
from apt_jobs.db.models import Schedule, WorkerRow
from apt_jobs.db.schedules import fire_due
from apt_jobs.db.webhook_conditions import apply_changes, find_changes
from apt_jobs.db.webhook_models import Delivery, Webhook, WebhookCondition
from apt_jobs.db.webhook_outbox import MAX_WAITING, enqueue
from apt_jobs.db.webhooks import (
    MAX_CLAIMS,
    MAX_TRIES,
    DeliveryRules,
    Try,
    TryResult,
    claim_deliveries,
    delete_webhook,
    due_deliveries,
    prune_deliveries,
    record_try,
)
from apt_jobs.db.workers import record_worker
from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.jobs.states import JobState

RULES = DeliveryRules(retry_wait_s=60.0, disable_after_s=3_600.0)
ENDS = ["job.succeeded", "job.failed", "job.cancelled", "job.dead"]


def hook(database: Database, webhook_id: str = "wh_1", **fields: Any) -> str:
    values = {"name": "x", "kind": "webhook", "url": "https://x.example/", "encrypted": "", "events": ENDS, **fields}
    with database.write() as session:
        session.add(Webhook(id=webhook_id, **values))
    return webhook_id


def ended_job(database: Database, state: JobState = JobState.FAILED, **fields: Any) -> str:
    with database.write() as session:
        job_id = insert_job(session, TrainSpec(kind="train", **fields)).id
        claim(session, job_id, "w", 60.0)
        finish(session, job_id, 1, state, reason="a NUL \0 and half a pair \ud800")
    return job_id


def rows(database: Database) -> list[Delivery]:
    with database.read() as session:
        return list(session.scalars(select(Delivery).order_by(Delivery.id)))


def take(database: Database, max_at_once: int = 4) -> list[Try]:
    with database.read() as session:
        due = due_deliveries(session, {}, max_at_once)
    with database.write() as session:
        return claim_deliveries(session, due, 30.0)


def record(database: Database, attempt: Try, result: TryResult) -> str | None:
    with database.write() as session:
        return record_try(session, attempt, result, RULES)


def test_a_delivery_is_kept_or_lost_with_the_change(database: Database) -> None:
    hook(database)
    with database.write() as session:
        job_id = insert_job(session, TrainSpec(kind="train")).id
        claim(session, job_id, "w", 60.0)
    with database.write() as session:
        finish(session, job_id, 1, JobState.FAILED)
        session.rollback()
    assert rows(database) == []
    ended_job(database)
    (row,) = rows(database)
    assert (row.event, row.state, row.num_tries) == ("job.failed", "waiting", 0)
    assert "\0" not in row.body


def test_filters_are_those_of_lists_of_jobs(database: Database) -> None:
    hook(database, filter='label:team=a training.learning_rate<1e-2 "night" -queue:slow')
    wanted: dict[str, Any] = {"labels": {"team": "a"}, "name": "nightly", "training": {"learning_rate": 1e-3}}
    ended_job(database, **wanted)
    others: list[dict[str, Any]] = [
        {"labels": {}},
        {"name": "day"},
        {"queue": "slow"},
        {"training": {"learning_rate": 1}},
    ]
    for wrong in others:
        ended_job(database, **{**wanted, **wrong})
    assert len(rows(database)) == 1


def test_jobs_that_end_together_are_sent_each(database: Database) -> None:
    hook(database)
    with database.write() as session:
        ids = [insert_job(session, TrainSpec(kind="train")).id for _ in range(3)]
        claimed = claim_due(session, "train", "w", 60.0, "train", 3)
        finish_succeeded(session, {(one.job.id, 1): {} for one in claimed})
    assert {json.loads(row.body)["data"]["job_id"] for row in rows(database)} == set(ids)


def test_a_delivery_is_claimed_by_one_and_again_when_its_lease_is_over(database: Database) -> None:
    hook(database)
    ended_job(database)
    with database.read() as session:
        due = due_deliveries(session, {}, 4)
    (first,) = take(database)
    with database.write() as session:
        assert claim_deliveries(session, due, 30.0) == []  # found by another process before it was claimed
    assert take(database) == []
    with database.write() as session:  # the process died within the try
        session.execute(update(Delivery).values(next_try_at=now_plus(0)))
    (second,) = take(database)
    assert second.delivery.id == first.delivery.id
    assert record(database, first, TryResult(500, 1, "late")) is None  # it has lost the delivery
    assert record(database, second, TryResult(204, 1)) == "delivered"
    assert rows(database)[0].status == 204


def test_tries_wait_longer_and_longer_and_end(sqlite_database: Database) -> None:
    hook(sqlite_database)
    ended_job(sqlite_database)
    waits = []
    for _ in range(MAX_TRIES):
        (attempt,) = take(sqlite_database)
        state = record(sqlite_database, attempt, TryResult(500, 1, "it answered 500", "x"))
        with sqlite_database.write() as session:
            now = session.scalars(select(now_plus(0))).one()
            waits.append(round((rows(sqlite_database)[0].next_try_at - now).total_seconds() / 60))
            session.execute(update(Delivery).values(next_try_at=now_plus(0)))
    assert state == "failed"
    assert waits[:4] == [1, 2, 4, 8]
    assert waits[-2] == 720
    assert take(sqlite_database) == []


def test_tries_that_nobody_records_end(sqlite_database: Database) -> None:
    hook(sqlite_database)
    ended_job(sqlite_database)
    with sqlite_database.write() as session:
        session.execute(update(Delivery).values(num_tries=MAX_CLAIMS))
    assert take(sqlite_database) == []
    assert rows(sqlite_database)[0].state == "failed"


def test_a_target_that_is_gone_is_disabled_at_once(sqlite_database: Database) -> None:
    hook(sqlite_database)
    ended_job(sqlite_database), ended_job(sqlite_database)
    attempt, _ = take(sqlite_database)
    assert record(sqlite_database, attempt, TryResult(410, 1, "it answered 410")) == "failed"
    ended_job(sqlite_database)
    assert len(rows(sqlite_database)) == 2  # nothing more is kept, and nothing more is sent
    with sqlite_database.write() as session:
        session.execute(update(Delivery).values(next_try_at=now_plus(0)))
    assert take(sqlite_database) == []


def test_one_webhook_takes_only_its_part(sqlite_database: Database) -> None:
    for webhook_id in ("wh_1", "wh_2"):
        hook(sqlite_database, webhook_id)
    for _ in range(6):
        ended_job(sqlite_database)
    assert sorted(attempt.webhook.id for attempt in take(sqlite_database, 2)) == ["wh_1", "wh_1", "wh_2", "wh_2"]
    with sqlite_database.read() as session:
        assert len(due_deliveries(session, {"wh_1": 4}, 4)) == 4


def test_what_waits_for_one_target_is_bounded(sqlite_database: Database) -> None:
    hook(sqlite_database)
    with sqlite_database.write() as session:
        session.execute(
            Delivery.__table__.insert(),  # type: ignore[attr-defined]  # a Table, typed as any FromClause
            [
                {"id": f"msg_{number}", "webhook_id": "wh_1", "event": "x", "body": "{}", "state": "waiting",
                 "num_tries": 0}
                for number in range(MAX_WAITING)
            ],
        )  # fmt: skip
        assert enqueue(session, "wh_1", "job.failed", {}) is None


def test_the_log_is_pruned_by_age_number_and_owner(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt_jobs.db.webhooks.MAX_LOGGED", 2)
    hook(database)
    for _ in range(4):
        ended_job(database)
    with database.write() as session:
        session.execute(update(Delivery).values(state="delivered"))
        assert prune_deliveries(session, 3_600.0) == 2
        last = select(func.max(Delivery.id)).scalar_subquery()
        session.execute(update(Delivery).where(Delivery.id == last).values(created_at=now_plus(-4_000)))
        assert prune_deliveries(session, 3_600.0) == 1
        session.execute(update(Delivery).values(webhook_id="wh_gone"))
        assert prune_deliveries(session, 3_600.0) == 1


def test_conditions_are_sent_once_and_again_after_they_were_over(database: Database) -> None:
    hook(database, events=["worker.lost", "queue.too_long"], queue_above=2, created_at=now_plus(-3_600))
    fields: dict[str, Any] = {"queues": ["q"], "hostname": "h", "pid": 1, "version": "1", "gpus": []}
    with database.write() as session:
        record_worker(session, name="w", kind="train", current_job_id=None, **fields)
        for _ in range(3):
            insert_job(session, TrainSpec(kind="train", queue="q"))
    assert look(database) == ["queue.too_long"]
    beat(database, -600)
    assert look(database) == ["worker.lost"]
    assert look(database) == []
    beat(database, 0)
    assert look(database) == []
    beat(database, -600)
    assert look(database) == ["worker.lost"]


def test_of_two_processes_that_find_a_condition_one_sends_it(database: Database) -> None:
    hook(database, events=["queue.too_long"], queue_above=0)
    with database.write() as session:
        insert_job(session, TrainSpec(kind="train"))
    with database.read() as session:
        first, second = find_changes(session, 30.0), find_changes(session, 30.0)
    with database.write() as session:
        assert [apply_changes(session, first), apply_changes(session, second)] == [1, 0]
    with database.write() as session:
        delete_webhook(session, "wh_1")
    with database.read() as session:
        assert session.scalars(select(WebhookCondition)).all() == []
    assert rows(database) == []


def test_a_refused_due_time_is_sent(sqlite_database: Database) -> None:
    hook(sqlite_database, events=["schedule.missed"])
    schedule = {"id": "sched_1", "name": "x", "cron": "0 0 1 1 *", "time_zone": "UTC", "overlap": "skip"}
    spec = TrainSpec(kind="train").model_dump(mode="json")
    with sqlite_database.write() as session:
        session.add(Schedule(**schedule, catch_up="latest", spec=spec, next_due_at=now_plus(-1)))
    with sqlite_database.write() as session:
        fire_due(session, 10, refuse)
    (row,) = rows(sqlite_database)
    assert '"outcome": "refused"' in row.body


def refuse(_session: Session, _spec: object) -> None:
    raise InvalidInput("its data set was deleted")


def look(database: Database) -> list[str]:
    with database.read() as session:
        changes = find_changes(session, 30.0)
    with database.write() as session:
        apply_changes(session, changes)
    return [event for _, event, _ in changes.begun]


def beat(database: Database, seconds: float) -> None:
    with database.write() as session:
        session.execute(update(WorkerRow).values(heartbeat_at=now_plus(seconds)))
