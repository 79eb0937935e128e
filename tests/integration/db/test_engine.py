"""Connections to real databases: isolation, durability settings, and what a broken database says."""

import socket
import sqlite3
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
from sqlalchemy import insert, text, update
from sqlalchemy.exc import IntegrityError, InternalError

from apt_jobs.db import engine as engine_module
from apt_jobs.db import jobs
from apt_jobs.db.engine import Database
from apt_jobs.db.listing import list_jobs
from apt_jobs.db.models import Job, ServiceValue
from apt_jobs.db.upgrade import downgrade_database
from apt_jobs.errors import InvalidInput, OutOfSpace, Unavailable
from apt_jobs.jobs.spec import GenerateSpec
from tests.conftest import execute_on
from tests.integration.db.steps import job_of, submit


def test_sqlite_runs_with_the_settings_that_a_durable_queue_needs(sqlite_database: Database) -> None:
    wanted = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 10_000}
    with sqlite_database.write() as session:
        found = {name: session.execute(text(f"PRAGMA {name}")).scalar() for name in wanted}
    assert found == wanted


def test_what_a_write_did_before_an_error_is_undone(database: Database) -> None:
    job_id = submit(database)

    def break_in_the_middle() -> None:
        with database.write() as session:
            session.execute(update(Job).values(name="half done"))
            raise KeyError("a bug")

    with pytest.raises(KeyError):
        break_in_the_middle()
    assert job_of(database, job_id).name is None


def test_a_reader_sees_one_moment(database: Database) -> None:
    job_id = submit(database)
    with database.read() as session:
        assert jobs.count_by_state(session)["queued"] == 1
        with ThreadPoolExecutor(1) as pool:
            pool.submit(submit, database).result()
        assert jobs.count_by_state(session)["queued"] == 1
        assert list_jobs(session)[0][0].id == job_id
    with database.read() as session:
        assert jobs.count_by_state(session)["queued"] == 2


def test_nothing_is_written_by_reading(database: Database) -> None:
    job_id = submit(database)
    refused = pytest.raises(InternalError, match="read-only") if database.dialect == "postgresql" else nullcontext()
    with refused, database.read() as session:
        session.execute(update(Job).values(name="by a reader"))
    assert job_of(database, job_id).name is None


def test_many_writers_never_see_a_locked_database(database: Database) -> None:
    start = threading.Barrier(8)

    def work(_: int) -> None:
        start.wait()
        for _ in range(10):
            submit(database)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    with database.read() as session:
        assert jobs.count_by_state(session)["queued"] == 80


def test_a_locked_database_is_unavailable_after_the_wait(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(engine_module, "BUSY_TIMEOUT_S", 0)
    database = Database(sqlite_url)
    other = sqlite3.connect(tmp_path / "apt_jobs.sqlite3", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="locked"):
        submit(database)
    other.execute("ROLLBACK")
    other.close()
    submit(database)
    database.dispose()


def test_a_full_disk_is_named_and_loses_nothing(sqlite_database: Database) -> None:
    job_id = submit(sqlite_database)

    def fill() -> None:
        with sqlite_database.write() as session:
            pages = session.execute(text("PRAGMA page_count")).scalar()
            session.execute(text(f"PRAGMA max_page_count={pages}"))
            jobs.insert_job(session, GenerateSpec(kind="generate", texts=["x" * 30_000] * 20))

    with pytest.raises(OutOfSpace, match="free disk space"):
        fill()
    assert job_of(sqlite_database, job_id).state == "queued"
    with sqlite_database.read() as session:
        assert len(list_jobs(session)[0]) == 1


def test_a_server_that_ends_a_connection_is_unavailable_and_then_back(postgres_url: str) -> None:
    database = Database(postgres_url)

    def lose_the_connection() -> None:
        with database.write() as session:
            backend = session.execute(text("SELECT pg_backend_pid()")).scalar()
            execute_on(postgres_url, f"SELECT pg_terminate_backend({backend})")
            jobs.count_by_state(session)

    with pytest.raises(Unavailable, match="does not answer"):
        lose_the_connection()
    submit(database)
    database.dispose()


def test_an_unreachable_server_is_unavailable_and_its_password_is_not_shown() -> None:
    with socket.socket() as taken:  # bound, never listening: the connection is refused
        taken.bind(("127.0.0.1", 0))
        database = Database(f"postgresql://someone:hunter2@127.0.0.1:{taken.getsockname()[1]}/nothing")
        with pytest.raises(Unavailable, match="does not answer") as caught:
            database.ping()
    shown = "".join(traceback.format_exception(caught.value)) + repr(database) + str(database.url)
    assert "hunter2" not in shown
    database.dispose()


def test_a_database_that_was_not_migrated_says_what_to_do(database: Database) -> None:
    database.ping()
    downgrade_database(database, "base")
    with pytest.raises(Unavailable, match="apt-jobs migrate"), database.read() as session:
        list_jobs(session)


def test_the_text_of_an_error_holds_no_values(database: Database) -> None:
    with database.write() as session:
        session.add(ServiceValue(key="k", value="a"))
    with pytest.raises(IntegrityError) as caught, database.write() as session:
        session.execute(insert(ServiceValue).values(key="k", value="canary"))
    assert "canary" not in "".join(traceback.format_exception(caught.value)).replace('value="canary"', "")


@pytest.mark.parametrize("after", [2**63, -(2**70)])
def test_a_number_that_no_column_holds_is_bad_input(database: Database, after: int) -> None:
    with pytest.raises(InvalidInput, match="cannot hold"), database.read() as session:
        session.scalar(Job.__table__.select().where(Job.last_seq == after))


def test_a_busy_pool_is_unavailable_after_a_wait(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "POOL_SIZE", 1)
    monkeypatch.setattr(engine_module, "POOL_TIMEOUT_S", 0.05)
    database = Database(sqlite_url)

    def read_inside(depth: int) -> None:
        with database.read() as session:
            session.execute(text("SELECT 1"))
            if depth:
                read_inside(depth - 1)

    read_inside(1)
    with pytest.raises(Unavailable, match="all 2 connections"):
        read_inside(2)
    database.ping()
    database.dispose()
