"""Batches through crashes, expiry and two processes at once, on both databases, with generations that are cheap."""

import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from apt_jobs.artifacts.files import file_path, publish_file, temporary_path
from apt_jobs.db.batches import get_batch, request_batch_cancel
from apt_jobs.db.dialect_models import Batch, BatchRequest, FileRow
from apt_jobs.db.engine import Database
from apt_jobs.db.files import get_file
from apt_jobs.db.job_groups import claim_due, finish_succeeded
from apt_jobs.db.models import Job
from apt_jobs.jobs.ids import new_batch_id, new_file_id
from apt_jobs.operations.delete_job import delete_job
from apt_jobs.settings import Settings
from apt_jobs.web.openai import batch_loop
from apt_jobs.web.openai.batch_loop import advance
from tests.unit.generation.tiny_model import llama_config, save_model

NUM_LINES = 30
OWNER = "key:one"


class KilledError(BaseException):
    """As kill -9: nothing is caught, nothing is committed."""


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    found = Settings(data_dir=tmp_path / "data", database_url=SecretStr(database_url), max_queued_jobs=20)
    save_model(found.local_models_dir / "tiny", llama_config())
    return found


def new_batch(database: Database, settings: Settings, num_lines: int = NUM_LINES, *, tail: str = "\n\n") -> str:
    lines = [
        json.dumps(
            {
                "custom_id": f"line-{number}",
                "method": "POST",
                "url": "/v1/completions",
                "body": {"model": "absent" if number % 10 == 9 else "tiny", "prompt": f"{number}", "max_tokens": 1},
            }
        )
        for number in range(num_lines)
    ]
    file_id, temporary = new_file_id(), temporary_path(settings, "input")
    temporary.write_text("\n\n".join(lines) + tail)
    size = temporary.stat().st_size
    publish_file(temporary, settings, file_id)
    batch = Batch(
        id=new_batch_id(),
        owner=OWNER,
        endpoint="/v1/completions",
        input_file_id=file_id,
        completion_window="24h",
        expires_at=datetime.now(UTC) + timedelta(hours=24),
    )
    with database.write() as session:
        session.add(FileRow(id=file_id, owner=OWNER, filename="in.jsonl", purpose="batch", size_bytes=size))
        session.add(batch)
    return batch.id


def work(database: Database, limit: int = 5) -> None:
    """Do jobs as a generation worker does."""
    with database.write() as session:
        claimed = claim_due(session, "generate", "worker", 60.0, "generate", limit)
    with database.write() as session:
        results = {
            (one.job.id, one.job.attempt): {
                "outputs": [f"answer to {one.job.spec['texts'][0]}"],
                "model": "tiny",
                "finish_reasons": ["length"],
                "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3},
            }
            for one in claimed
        }
        if results:
            finish_succeeded(session, results)


def state(database: Database, batch_id: str) -> Batch:
    with database.read() as session:
        return get_batch(session, batch_id, None)


def answers(database: Database, settings: Settings, batch: Batch) -> dict[str, dict[str, Any]]:
    """All answers of an ended batch by their custom id, each of which is there once."""
    found: list[dict[str, Any]] = []
    for file_id in (batch.output_file_id, batch.error_file_id):
        if file_id is not None:
            with database.read() as session:
                row = get_file(session, file_id, OWNER)
            content = file_path(settings, file_id).read_bytes()
            assert len(content) == row.size_bytes
            found += [json.loads(line) for line in content.splitlines()]
    by_id = {row["custom_id"]: row for row in found}
    assert len(by_id) == len(found)
    return by_id


def require_whole(database: Database, settings: Settings, batch_id: str) -> None:
    """A completed batch has an answer of each line, and nothing of it is left but its jobs and files."""
    batch = state(database, batch_id)
    assert (batch.state, batch.num_completed, batch.num_failed) == ("completed", 27, 3)
    found = answers(database, settings, batch)
    for number in range(NUM_LINES):
        response = found[f"line-{number}"]["response"]
        if number % 10 == 9:
            assert response["status_code"] == 404
        else:
            assert response["body"]["choices"][0]["text"] == f"answer to {number}"
    assert batch.num_prompt_tokens == 54
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 27
        assert session.scalar(select(func.count()).select_from(BatchRequest)) == 0
    for path in settings.files_dir.iterdir():  # what a process that was killed left is a day old
        os.utime(path, (0, 0))
    batch_loop.sweep(database, settings)
    kept = {batch.input_file_id, batch.output_file_id, batch.error_file_id}
    assert {path.name for path in settings.files_dir.iterdir()} == kept


def test_a_batch_goes_through_a_queue_that_is_smaller_than_it(database: Database, settings: Settings) -> None:
    batch_id = new_batch(database, settings)
    while state(database, batch_id).state != "completed":
        advance(database, settings, batch_id)
        with database.read() as session:
            waiting = session.scalar(select(func.count()).select_from(Job).where(Job.state == "queued")) or 0
        assert waiting <= settings.max_queued_jobs * batch_loop.QUEUE_SHARE
        work(database)
    require_whole(database, settings, batch_id)


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_that_is_killed_at_any_commit_answers_each_line_once(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    batch_id = new_batch(database, settings)
    write = database.write

    @contextmanager
    def deadly() -> Iterator[Session]:
        with write() as session:
            yield session
            if chance.random() < 0.4:
                raise KilledError  # before the commit
        if chance.random() < 0.4:
            raise KilledError  # after it

    while state(database, batch_id).state != "completed":
        with monkeypatch.context() as patch:
            patch.setattr(database, "write", deadly)
            try:
                advance(database, settings, batch_id)
            except KilledError:
                pass
        work(database)
    require_whole(database, settings, batch_id)


def test_two_processes_move_one_batch_without_a_line_twice(database: Database, settings: Settings) -> None:
    batch_id = new_batch(database, settings)
    with ThreadPoolExecutor(3) as pool:
        while state(database, batch_id).state != "completed":
            for done in [pool.submit(advance, database, settings, batch_id) for _ in range(3)]:
                done.result()
            work(database)
    require_whole(database, settings, batch_id)


@pytest.mark.parametrize("how", ["expired", "cancelled"])
def test_a_batch_that_stops_keeps_what_is_done_and_says_of_the_rest_why(
    database: Database, settings: Settings, how: str
) -> None:
    batch_id = new_batch(database, settings)
    for _ in range(2):
        advance(database, settings, batch_id)
    work(database, 3)
    with database.write() as session:
        claim_due(session, "generate", "worker", 60.0, "generate", 1)  # one runs
        if how == "expired":
            session.get_one(Batch, batch_id).expires_at = datetime.now(UTC) - timedelta(seconds=1)
        else:
            request_batch_cancel(session, batch_id, OWNER)
    advance(database, settings, batch_id)
    assert state(database, batch_id).state == ("in_progress" if how == "expired" else "cancelling")
    with database.write() as session:
        (running,) = session.scalars(select(Job).where(Job.state == "running"))
        assert running.cancel_requested_at is not None
        result = {
            "outputs": ["late"],
            "finish_reasons": ["stop"],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
        finish_succeeded(session, {(running.id, running.attempt): result})  # it was quicker than the cancel
    while state(database, batch_id).state not in ("expired", "cancelled"):
        advance(database, settings, batch_id)
    batch = state(database, batch_id)
    assert batch.state == how
    assert (batch.expired_at if how == "expired" else batch.cancelled_at) is not None
    found = answers(database, settings, batch)
    assert len(found) == NUM_LINES
    done = [row for row in found.values() if row["error"] is None and row["response"]["status_code"] == 200]
    assert (len(done), batch.num_completed, batch.num_failed) == (4, 4, 26)
    assert {row["error"]["code"] for row in found.values() if row["error"]} == {f"batch_{how}"}


def test_a_batch_is_cancelled_before_it_began(database: Database, settings: Settings) -> None:
    batch_id = new_batch(database, settings)
    with database.write() as session:
        request_batch_cancel(session, batch_id, OWNER)
    for _ in range(2):
        advance(database, settings, batch_id)
    batch = state(database, batch_id)
    assert (batch.state, batch.output_file_id, batch.error_file_id, batch.num_failed) == ("cancelled", None, None, 0)


def test_a_job_that_was_deleted_is_an_error_of_its_line(database: Database, settings: Settings) -> None:
    batch_id = new_batch(database, settings, 1, tail="")
    for _ in range(2):
        advance(database, settings, batch_id)
    work(database)
    with database.read() as session:
        job_id = session.scalars(select(Job.id)).one()
    delete_job(database, settings, job_id)
    while state(database, batch_id).state != "completed":
        advance(database, settings, batch_id)
    (row,) = answers(database, settings, state(database, batch_id)).values()
    assert row["response"]["body"]["error"]["code"] == "job_deleted"


def test_a_file_that_is_gone_fails_the_batch(database: Database, settings: Settings) -> None:
    batch_id = new_batch(database, settings)
    file_path(settings, state(database, batch_id).input_file_id).unlink()
    advance(database, settings, batch_id)
    batch = state(database, batch_id)
    assert batch.state == "failed"
    assert batch.errors is not None
    assert batch.errors[0]["code"] == "file_not_found"
