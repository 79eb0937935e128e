"""The event log on real databases: contiguous `seq`, one transaction with the rows that events imply, fenced."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import event as engine_event

from apt_jobs.db import checkpoints, jobs, steering
from apt_jobs.db import events as event_log
from apt_jobs.db.engine import Database
from apt_jobs.db.models import Attempt, Job
from apt_jobs.errors import Fenced, NotFound
from apt_jobs.events.codec import decode_payload, encode_payload, encode_stored, splice_stored
from apt_jobs.events.kinds import CheckpointRemoved, CheckpointSaved, Event, GradientsRecorded, LineLogged, Validated
from apt_jobs.jobs.states import JobState
from tests.integration.db.steps import (
    LEASE_S,
    due_now,
    expire_lease,
    job_of,
    lose_worker,
    running,
    saved,
    started,
    store,
    store_at,
    submit,
    trained,
)


def line(text: str) -> LineLogged:
    return LineLogged("info", "rank 0", text)


def seqs(database: Database, job_id: str) -> list[int]:
    with database.read() as session:
        return [row.seq for row in event_log.events_after(session, job_id, 0, 100_000)]


def attempt_of(database: Database, job: Job) -> Attempt:
    with database.read() as session:
        return jobs.list_attempts(session, job.id)[job.attempt - 1]


def test_a_batch_continues_the_jobs_numbering(database: Database) -> None:
    job = running(database)
    first = store(database, job, line("a"), line("b"))
    second = store(database, job, line("c"))
    assert [event.seq for event in (*first.stored, *second.stored)] == [3, 4, 5]
    assert job_of(database, job.id).last_seq == 5
    assert seqs(database, job.id) == [1, 2, 3, 4, 5]


def test_an_empty_batch_is_a_heartbeat(database: Database) -> None:
    job = running(database)
    assert store(database, job) == event_log.Appended([], jobs.StopRequests(cancel=False, pause=False))
    assert job_of(database, job.id).last_seq == 2


def test_what_was_published_is_what_the_database_shows(database: Database) -> None:
    job = running(database)
    at = datetime(2026, 3, 4, 5, 6, 7, 89_999, tzinfo=UTC)
    events: list[Event] = [
        started(),
        GradientsRecorded(1, (float("nan"), float("inf"), 0.5), (0, 1)),
        line("中文 \0 \u2028"),
    ]
    appended = store_at(database, job, [(at, event) for event in events])
    with database.read() as session:
        rows = event_log.events_after(session, job.id, 2, 10)
    shown = [splice_stored(row.seq, row.kind, row.attempt, row.at, row.payload) for row in rows]
    assert shown == [encode_stored(event) for event in appended.stored]
    assert [row.payload for row in rows] == [encode_payload(event) for event in events]
    assert repr(decode_payload(rows[1].kind, rows[1].payload)) == repr(events[1])


def test_a_fenced_batch_leaves_no_trace(database: Database) -> None:
    job = running(database)
    expire_lease(database, job.id)
    with pytest.raises(Fenced):
        store(database, job, line("too late"), saved("late", step=1))
    assert seqs(database, job.id) == [1, 2]
    with database.read() as session:
        assert checkpoints.list_checkpoints(session) == ([], False)


def test_a_batch_that_breaks_in_the_middle_leaves_no_trace(database: Database) -> None:
    job = running(database)

    def store_and_die() -> None:
        with database.write() as session:
            event_log.append_events(session, job.id, 1, [(datetime.now(UTC), line("a"))], LEASE_S)
            raise RuntimeError("relay died")

    with pytest.raises(RuntimeError, match="relay died"):
        store_and_die()
    store(database, job, line("b"))
    assert seqs(database, job.id) == [1, 2, 3]


def test_numbers_are_contiguous_when_many_write_at_once(database: Database) -> None:
    job = running(database)
    start = threading.Barrier(4)

    def relay() -> list[int]:
        return [event.seq for _ in range(15) for event in store(database, job, line("a"), line("b"), line("c")).stored]

    def service() -> list[int]:
        stored = []
        for number in range(15):
            with database.write() as session:
                event = CheckpointRemoved(f"ckpt_{number}", "deleted by a user")
                stored.append(event_log.append_service_event(session, job.id, event).seq)
        return stored

    def together(work: Callable[[], list[int]]) -> list[int]:
        start.wait()
        return work()

    with ThreadPoolExecutor(4) as pool:
        given = [seq for part in pool.map(together, [relay, service, relay, service]) for seq in part]
    assert sorted(given) == list(range(3, 3 + 2 * 15 * 3 + 2 * 15))
    assert seqs(database, job.id) == list(range(1, 3 + 2 * 15 * 3 + 2 * 15))


def test_a_batch_of_fifty_takes_a_few_statements(database: Database) -> None:
    job = running(database)
    statements: list[str] = []

    def count(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        statements.append(statement)

    engine_event.listen(database.engine, "before_cursor_execute", count)
    store(database, job, *[trained(step) for step in range(1, 51)])
    writes = [statement for statement in statements if not statement.startswith("BEGIN")]
    assert len(writes) == 6, writes  # fence, segments, chunk, segment, job, attempt


def test_progress_follows_the_events(database: Database) -> None:
    job = running(database)
    store(database, job, started(num_steps=100), trained(1, 3.0), trained(2, 2.5), Validated(2, 0, 2.6, is_best=True))
    store(database, job, Validated(3, 0, float("nan"), is_best=False))
    row = job_of(database, job.id)
    assert (row.step, row.num_steps) == (2, 100)
    assert row.progress == {
        "step": 2,
        "epoch": 0,
        "train_loss": 2.5,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_s": 1000.0,
        "val_loss": "NaN",
        "best_val_loss": 2.6,
        "eta_s": pytest.approx(9.8),
        "num_parameters": 1000,
        "num_trainable_parameters": None,
        "steps_per_epoch": 10,
    }
    attempt = attempt_of(database, job)
    assert (attempt.resumed_from_step, attempt.last_step) == (0, 2)


def test_a_resumed_attempt_sets_the_progress_back(database: Database) -> None:
    job = running(database)
    store(database, job, started(), trained(57))
    lose_worker(database, job.id)
    with database.write() as session:
        claimed = jobs.claim(session, job.id, "worker-b", LEASE_S)
    assert claimed is not None
    store(database, claimed.job, started(resumed_from_step=40))
    row = job_of(database, job.id)
    assert row.progress is not None
    assert (row.step, row.progress["step"], row.progress["eta_s"]) == (40, 40, None)
    first, second = attempt_of(database, job), attempt_of(database, claimed.job)
    assert (first.last_step, second.resumed_from_step, second.last_step) == (57, 40, None)


def test_a_checkpoint_event_and_its_row_are_one(database: Database) -> None:
    job = running(database)
    store(database, job, saved("a", step=10, is_best=True))
    store(database, job, saved("b", step=20, is_best=True), saved("c", step=30, val_loss=float("nan"), train_loss=None))
    with database.read() as session:
        rows = {row.id: row for row in checkpoints.list_checkpoints(session, job_id=job.id)[0]}
    assert {name: row.is_best for name, row in rows.items()} == {"ckpt_a": False, "ckpt_b": True, "ckpt_c": False}
    assert (rows["ckpt_c"].val_loss, rows["ckpt_c"].train_loss, rows["ckpt_c"].attempt) == (None, None, 1)
    store(database, job, CheckpointRemoved("ckpt_a", "keep_checkpoints"))
    with database.read() as session:
        assert {row.id for row in checkpoints.list_checkpoints(session)[0]} == {"ckpt_b", "ckpt_c"}


def test_a_job_cannot_remove_another_jobs_checkpoint(database: Database) -> None:
    owner, other = running(database), running(database)
    store(database, owner, saved("a", step=10))
    store(database, other, CheckpointRemoved("ckpt_a", "keep_checkpoints"))
    with database.read() as session:
        assert checkpoints.get_checkpoint(session, "ckpt_a").job_id == owner.id


def test_a_new_checkpoint_ends_a_row_of_attempts_without_one(database: Database) -> None:
    job = running(database, max_attempts=9)
    with database.write() as session:
        jobs.finish_faulted(session, job.id, job.attempt, "a rank died")
        due_now(session, job.id)
    assert job_of(database, job.id).num_job_faults_without_checkpoint == 1
    with database.write() as session:
        claimed = jobs.claim(session, job.id, "worker-b", LEASE_S)
    assert claimed is not None
    store(database, claimed.job, saved("a", step=10))
    assert job_of(database, job.id).num_job_faults_without_checkpoint == 0


def test_events_are_read_after_a_seq_in_pieces_and_by_kind(database: Database) -> None:
    job = running(database)
    store(database, job, started(), *[trained(step) for step in range(1, 6)], line("end"))
    with database.read() as session:
        assert [row.seq for row in event_log.events_after(session, job.id, 4, 3)] == [5, 6, 7]
        assert event_log.events_after(session, job.id, 99, 3) == []
        metrics = event_log.events_after(session, job.id, 0, 100, kinds=["metric"])
        assert [row.step for row in metrics] == [1, 2, 3, 4, 5]


def test_the_instant_of_an_event_survives_in_milliseconds(database: Database) -> None:
    job = running(database)
    at = datetime(2026, 1, 1, 2, 3, 4, 567_000, tzinfo=UTC)
    eastern = at.astimezone(timezone(timedelta(hours=8)))
    store_at(database, job, [(at, line("a")), (eastern, line("b"))])
    with database.read() as session:
        rows = event_log.events_after(session, job.id, 2, 10)
    assert [row.at for row in rows] == [at, at]
    assert all(row.at.utcoffset() == timedelta(0) for row in rows)


def test_heads_are_those_of_the_jobs_that_exist(database: Database) -> None:
    waiting, job = submit(database, queue="other"), running(database)
    with database.read() as session:
        assert event_log.head_seqs(session, [waiting, job.id, "job_gone"]) == {waiting: 1, job.id: 2}
        assert event_log.head_seqs(session, []) == {}


def test_the_service_may_write_to_an_ended_job_but_not_to_a_missing_one(database: Database) -> None:
    job = running(database)
    with database.write() as session:
        jobs.finish(session, job.id, 1, JobState.SUCCEEDED)
        stored = event_log.append_service_event(session, job.id, CheckpointRemoved("ckpt_a", "deleted by a user"))
    assert (stored.seq, stored.attempt) == (4, 1)
    with pytest.raises(NotFound, match="job_gone"), database.write() as session:
        event_log.append_service_event(session, "job_gone", line("a"))


def test_deleting_a_job_takes_its_checkpoints_and_attempts_along(database: Database) -> None:
    job = running(database)
    store(database, job, saved("a", step=1))
    with database.write() as session:
        jobs.finish(session, job.id, 1, JobState.SUCCEEDED)
        steering.delete_job(session, job.id)
    with database.read() as session:
        assert checkpoints.list_checkpoints(session) == ([], False)
        assert jobs.list_attempts(session, job.id) == []


def test_one_checkpoint_event_cannot_be_stored_twice(database: Database) -> None:
    job = running(database)
    event: CheckpointSaved = saved("a", step=1)
    store(database, job, event)
    with pytest.raises(Exception, match="checkpoints"):
        store(database, job, event)
    assert job_of(database, job.id).last_seq == 3
