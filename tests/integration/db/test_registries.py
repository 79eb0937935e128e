"""Checkpoints, workers and service values on real databases."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import update

from apt_jobs.db import checkpoints, workers
from apt_jobs.db.clock import now_plus
from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import finish
from apt_jobs.db.models import Checkpoint, WorkerRow
from apt_jobs.db.service_values import DEFAULT_MODEL, get_value, set_value
from apt_jobs.errors import NotFound
from apt_jobs.jobs.states import JobState
from apt_jobs.jobs.training_options import TrainingOptions
from tests.integration.db.steps import running, saved, store


def id_of(checkpoint: Checkpoint | None) -> str | None:
    return None if checkpoint is None else checkpoint.id


def record(database: Database, name: str = "w1", pid: int = 1, **fields: Any) -> None:
    values: dict[str, Any] = {
        "kind": "train",
        "queues": ["train"],
        "hostname": "host",
        "version": "1",
        "gpus": [{"index": 0, "name": "GPU"}],
        "current_job_id": None,
    }
    with database.write() as session:
        workers.record_worker(session, name=name, pid=pid, **{**values, **fields})


def test_checkpoints_are_listed_newest_first_in_pages(database: Database) -> None:
    job, other = running(database), running(database)
    store(database, job, *[saved(f"{number}", step=number) for number in range(4)])
    store(database, other, saved("9", step=1))
    with database.read() as session:
        page, more = checkpoints.list_checkpoints(session, limit=2)
        assert ([row.id for row in page], more) == (["ckpt_9", "ckpt_3"], True)
        page, more = checkpoints.list_checkpoints(session, after="ckpt_3", limit=10)
        assert ([row.id for row in page], more) == (["ckpt_2", "ckpt_1", "ckpt_0"], False)
        page, more = checkpoints.list_checkpoints(session, job_id=other.id)
        assert ([row.id for row in page], more) == (["ckpt_9"], False)


def test_the_newest_and_the_best_are_found(database: Database) -> None:
    job, other = running(database), running(database)
    with database.read() as session:
        assert checkpoints.newest_checkpoint(session) is None
        assert checkpoints.newest_of_job(session, job.id) is None
        assert checkpoints.best_of_job(session, job.id) is None
    store(database, job, saved("a", step=10, val_loss=1.0, is_best=True), saved("b", step=20, val_loss=3.0))
    store(database, job, saved("c", step=30, val_loss=None))
    store(database, other, saved("d", step=5))
    with database.read() as session:
        assert id_of(checkpoints.newest_checkpoint(session)) == "ckpt_d"
        assert id_of(checkpoints.newest_of_job(session, job.id)) == "ckpt_c"
        assert id_of(checkpoints.best_of_job(session, job.id)) == "ckpt_a"
    with database.write() as session:
        assert checkpoints.delete_checkpoint_row(session, "ckpt_a").filename == "folder/a"
    with database.read() as session:
        assert id_of(checkpoints.best_of_job(session, job.id)) == "ckpt_b"


def test_the_model_of_a_job_is_its_best_checkpoint_when_it_has_ended_and_asked_for_that(
    sqlite_database: Database,
) -> None:
    def models() -> list[str | None]:
        with sqlite_database.read() as session:
            return [id_of(checkpoints.model_of_job(session, job.id)) for job in jobs]

    asks = TrainingOptions(load_best_model_at_end=True)
    jobs = [running(sqlite_database, training=asks), running(sqlite_database)]
    assert models() == [None, None]
    for name, job in zip("ab", jobs, strict=True):
        best = saved(f"{name}-best", step=10, val_loss=1.0, is_best=True)
        store(sqlite_database, job, best, saved(f"{name}-last", step=20, val_loss=2.0))
    assert models() == ["ckpt_a-last", "ckpt_b-last"]  # it goes on from there
    with sqlite_database.write() as session:
        for job in jobs:
            finish(session, job.id, job.attempt, JobState.SUCCEEDED)
    assert models() == ["ckpt_a-best", "ckpt_b-last"]


def test_a_missing_checkpoint_is_not_found(database: Database) -> None:
    with pytest.raises(NotFound, match="ckpt_gone"), database.read() as session:
        checkpoints.get_checkpoint(session, "ckpt_gone")
    with pytest.raises(NotFound, match="ckpt_gone"), database.write() as session:
        checkpoints.delete_checkpoint_row(session, "ckpt_gone")


def test_a_worker_records_and_refreshes_itself(database: Database) -> None:
    record(database)
    with database.write() as session:
        (first,) = workers.list_workers(session)
    with database.write() as session:
        session.execute(update(WorkerRow).values(heartbeat_at=now_plus(-100), started_at=now_plus(-500)))
        assert workers.list_workers(session, alive_within_s=30) == []
    record(database, current_job_id="job_x")
    with database.read() as session:
        (again,) = workers.list_workers(session, alive_within_s=30)
    assert (again.current_job_id, again.queues, again.gpus) == ("job_x", ["train"], [{"index": 0, "name": "GPU"}])
    assert again.started_at < first.started_at  # the same process: it began when the row says
    record(database, pid=2)
    with database.read() as session:
        (restarted,) = workers.list_workers(session)
    assert restarted.started_at > again.started_at


def test_a_worker_is_forgotten_quietly(database: Database) -> None:
    record(database, "w1")
    record(database, "w2")
    with database.write() as session:
        workers.remove_worker(session, "w1")
        workers.remove_worker(session, "w1")
    with database.read() as session:
        assert [row.name for row in workers.list_workers(session)] == ["w2"]


def test_a_service_value_is_set_changed_and_removed(database: Database) -> None:
    for value in ("ckpt_a", "ckpt_b", None, None):
        with database.write() as session:
            set_value(session, DEFAULT_MODEL, value)
        with database.read() as session:
            assert get_value(session, DEFAULT_MODEL) == value


def test_a_service_value_may_be_set_by_many_at_once(database: Database) -> None:
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        with database.write() as session:
            set_value(session, DEFAULT_MODEL, f"model-{number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    with database.read() as session:
        assert str(get_value(session, DEFAULT_MODEL)).startswith("model-")
