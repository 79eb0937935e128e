"""The loop that moves batches on: check the file, make jobs of its lines a window at a time, collect, write the files.

Each step is one transaction on the locked row of the batch, so any number of web processes may run it, and one that is
killed leaves a batch that the next pass of any other moves on. A line becomes a job in the transaction that notes how
far the file was read: never twice, never lost.
"""

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import IO, Any

import orjson
from sqlalchemy.orm import Session

from apt_jobs.artifacts.files import (
    delete_file,
    delete_orphans,
    file_path,
    old_files,
    publish_file,
    temporary_path,
)
from apt_jobs.db.batches import (
    active_batches,
    answered_requests,
    end_batch,
    ended_requests,
    get_batch,
    locked_batch,
    note_if_expired,
    num_open,
    num_waiting_jobs,
    open_job_ids,
    set_state,
)
from apt_jobs.db.dataset_pins import unfinished_job_with
from apt_jobs.db.dialect_models import Batch, BatchRequest, FileRow
from apt_jobs.db.engine import Database
from apt_jobs.db.files import delete_expired_files, without_row
from apt_jobs.errors import AptJobsError, InvalidReferences
from apt_jobs.events.kinds import StoredEvent
from apt_jobs.jobs.ids import new_file_id, new_job_id
from apt_jobs.operations.steer import cancel_job
from apt_jobs.operations.submit import submit_generations
from apt_jobs.settings import Settings
from apt_jobs.web.openai.batch_lines import (
    Answer,
    Asked,
    answer_of_job,
    ask,
    check_lines,
    not_made,
    refused_model,
)
from apt_jobs.web.openai.files import BATCH_OUTPUT
from apt_jobs.web.openai.json_lines import json_lines
from apt_jobs.web.openai.training_files import delete_published
from apt_jobs.web.service import Service

logger = logging.getLogger(__name__)

EVERY_S = 1.0
BUSY_EVERY_S = 0.2  # while something moves
SWEEP_EVERY_S = 600.0
MAX_BATCHES = 100  # that move at once; the others wait for them
MAX_OPEN = 512  # jobs of a batch at once
MAX_LINES = 200  # that become jobs in one transaction
MAX_COLLECTED = 500  # answers of one transaction
QUEUE_SHARE = 0.5  # of `max_queued_jobs` that batches fill: the rest is for those who wait


@dataclass(slots=True)
class Moved:
    """What one step did."""

    is_changed: bool = False
    has_jobs: bool = False
    events: list[StoredEvent] = field(default_factory=list)


async def batch_loop(service: Service) -> None:
    """Move all batches on, until the process ends."""
    swept_s = -SWEEP_EVERY_S
    while True:
        is_changed = False
        try:
            for batch_id in await service.read(active_batches, MAX_BATCHES):
                is_changed |= await _tried(service, batch_id)
            if time.monotonic() - swept_s >= SWEEP_EVERY_S:
                swept_s = time.monotonic()
                await asyncio.to_thread(sweep, service.database, service.settings)
        except AptJobsError as exc:
            logger.warning("batches wait", extra={"why": str(exc)})
        except Exception:  # a loop that ended would end all batches, unseen
            logger.exception("the loop of batches broke and will try again")
        await asyncio.sleep(BUSY_EVERY_S if is_changed else EVERY_S)


async def _tried(service: Service, batch_id: str) -> bool:
    try:
        moved = await asyncio.to_thread(advance, service.database, service.settings, batch_id)
    except (AptJobsError, OSError) as exc:
        logger.warning("a batch waits", extra={"batch_id": batch_id, "why": str(exc)})
        return False
    except Exception:  # one that breaks does not hold up the others
        logger.exception("a batch broke and will be tried again", extra={"batch_id": batch_id})
        return False
    if moved.has_jobs:
        service.wake_up_now.set()
    for event in moved.events:
        await service.publish(event.job_id, [event])
    return moved.is_changed


def advance(database: Database, settings: Settings, batch_id: str) -> Moved:
    """Move one batch on by one step.

    Raises:
        AptJobsError: the database, the disk or the queue has no room now.
        OSError: a file cannot be read or written.
    """
    with database.read() as session:
        batch = get_batch(session, batch_id, None)
    match batch.state:
        case "validating":
            return _validate(database, settings, batch)
        case "in_progress" | "cancelling":
            return _work(database, settings, batch)
        case "finalizing":
            return _finalize(database, settings, batch)
    return Moved()


def _validate(database: Database, settings: Settings, batch: Batch) -> Moved:
    try:
        num_requests, errors = check_lines(file_path(settings, batch.input_file_id), batch.endpoint)
    except FileNotFoundError:
        missing = {"code": "file_not_found", "line": None, "message": "the content of the file is gone", "param": None}
        num_requests, errors = 0, [missing]
    with database.write() as session:
        row = locked_batch(session, batch.id)
        if row.state == "validating":
            if errors:
                set_state(session, row, "failed", errors=errors)
            else:
                set_state(session, row, "in_progress", num_requests=num_requests)
    return Moved(is_changed=True)


def _work(database: Database, settings: Settings, batch: Batch) -> Moved:
    """Collect answers, then make further jobs; or cancel them when the batch has to stop."""
    asked, read = _next_lines(database, settings, batch)
    with database.write() as session:
        row = locked_batch(session, batch.id)
        if row.state not in ("in_progress", "cancelling"):
            return Moved()
        note_if_expired(session, row)
        stopped = _why_stopped(row)
        moved = Moved(is_changed=_collect(session, row, stopped) > 0)
        if stopped is not None:
            for job_id in open_job_ids(session, row.id, MAX_COLLECTED):
                moved.events += cancel_job(session, job_id, f"{row.id}: {stopped}")[1]
        elif row.num_bytes_read == batch.num_bytes_read:
            moved.has_jobs = _make_jobs(session, settings, row, asked)
            row.num_lines_read, row.num_bytes_read = read
            session.flush()
        is_read = row.num_bytes_read >= file_path(settings, row.input_file_id).stat().st_size
        if (is_read or stopped is not None) and num_open(session, row.id) == 0:
            set_state(session, row, "finalizing")
            moved.is_changed = True
        moved.is_changed |= moved.has_jobs or bool(moved.events)
    return moved


def _next_lines(database: Database, settings: Settings, batch: Batch) -> tuple[list[Asked], tuple[int, int]]:
    """Return the next lines that may become jobs, and the line and byte up to which the file is read then."""
    number, offset = batch.num_lines_read, batch.num_bytes_read
    if batch.state != "in_progress":
        return [], (number, offset)
    with database.read() as session:
        room = min(
            MAX_LINES,
            MAX_OPEN - num_open(session, batch.id),
            int(settings.max_queued_jobs * QUEUE_SHARE) - num_waiting_jobs(session),
        )
    file = file_path(settings, batch.input_file_id)
    lines = list(islice(json_lines(file, offset=offset, number=number), max(room, 0)))
    if lines:
        number, offset = lines[-1].number, lines[-1].end
    if len(lines) < room:  # the end, with what empty lines it has
        offset = file.stat().st_size
    return [ask(line, batch.endpoint, batch.id) for line in lines], (number, offset)


def _make_jobs(session: Session, settings: Settings, batch: Batch, asked: Sequence[Asked]) -> bool:
    """Store lines as requests, with the jobs of those that can be one; whether there are any."""
    specs = {new_job_id(): (one, one.spec) for one in asked if one.spec is not None}
    outcomes = submit_generations(session, settings, {job_id: spec for job_id, (_, spec) in specs.items()})
    job_ids: dict[int, str] = {}
    answers: dict[int, Answer] = {one.line.number: one.answer for one in asked if one.answer is not None}
    for job_id, outcome in outcomes.items():
        one = specs[job_id][0]
        if isinstance(outcome, InvalidReferences):
            answers[one.line.number] = refused_model(one.model, batch.id, one.line.number)
        elif isinstance(outcome, AptJobsError):
            raise outcome  # nothing of this step is stored; it is tried again
        else:
            job_ids[one.line.number] = job_id
    session.add_all(
        BatchRequest(
            batch_id=batch.id,
            line=one.line.number,
            custom_id=one.custom_id,
            model=one.model,
            job_id=job_ids.get(one.line.number),
            is_failed=True if one.line.number in answers else None,
            answer=answers.get(one.line.number),
        )
        for one in asked
    )
    batch.num_failed += len(answers)
    session.flush()
    return bool(job_ids)


def _collect(session: Session, batch: Batch, stopped: str | None) -> int:
    """Store the answers of jobs that have ended; how many."""
    ended = ended_requests(session, batch.id, MAX_COLLECTED)
    for request, job in ended:
        request.is_failed, request.answer = answer_of_job(job, request.model, batch.endpoint, stopped)
        if request.is_failed:
            batch.num_failed += 1
            continue
        usage = request.answer["response"]["body"]["usage"]
        batch.num_completed += 1
        batch.num_prompt_tokens += usage["prompt_tokens"]
        batch.num_completion_tokens += usage.get("completion_tokens", 0)
    session.flush()
    return len(ended)


def _finalize(database: Database, settings: Settings, batch: Batch) -> Moved:
    """Write the files, then end the batch. Two processes may do both: the second finds it ended."""
    output, errors = _Output(settings, batch, "output"), _Output(settings, batch, "errors")
    with output, errors:
        num_not_made = _write_answers(database, settings, batch, output, errors)
    rows = [one.publish() if one.num_lines else None for one in (output, errors)]
    with database.write() as session:
        row = locked_batch(session, batch.id)
        is_ours = row.state == "finalizing"
        if is_ours:
            end_batch(session, row, output=rows[0], errors=rows[1], num_not_made=num_not_made)
    if not is_ours:  # else they are kept; whether a commit that failed came through, only the sweep finds out
        for one in rows:
            if one is not None:
                delete_file(settings, one.id)
    return Moved(is_changed=True)


def _write_answers(database: Database, settings: Settings, batch: Batch, output: "_Output", errors: "_Output") -> int:
    """Write the answers in the order of the lines, and those of lines of which no job was made; how many these are."""
    after, num_not_made = 0, 0
    while True:
        with database.read() as session:
            rows = answered_requests(session, batch.id, after, MAX_COLLECTED)
        for row in rows:
            (errors if row.is_failed else output).write(row.line, row.custom_id, row.answer or {})
        if not rows:
            break
        after = rows[-1].line
    stopped = _why_stopped(batch)
    if stopped is not None and batch.in_progress_at is not None:
        file = file_path(settings, batch.input_file_id)
        for line in json_lines(file, offset=batch.num_bytes_read, number=batch.num_lines_read):
            errors.write(line.number, (line.value or {})["custom_id"], not_made(stopped))
            num_not_made += 1
    return num_not_made


class _Output:
    """A file that a batch makes."""

    def __init__(self, settings: Settings, batch: Batch, what: str) -> None:
        self.num_lines = 0
        self._settings, self._batch, self._what = settings, batch, what
        self._id = new_file_id()
        self._path: Path = temporary_path(settings, self._id)
        self._file: IO[bytes] | None = None
        self._num_bytes = 0

    def __enter__(self) -> "_Output":
        self._file = self._path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._num_bytes = self._file.tell()
        self._file.close()
        if not self.num_lines:
            self._path.unlink(missing_ok=True)

    def write(self, line: int, custom_id: str, answer: dict[str, Any]) -> None:
        """Add one answer."""
        assert self._file is not None
        identity = {"id": f"batch_req_{self._batch.id.removeprefix('batch_')}_{line}", "custom_id": custom_id}
        self._file.write(orjson.dumps(identity | answer, option=orjson.OPT_APPEND_NEWLINE))
        self.num_lines += 1

    def publish(self) -> FileRow:
        """Give the file its name; its row."""
        publish_file(self._path, self._settings, self._id)
        lifetime_s = self._batch.output_lifetime_s
        return FileRow(
            id=self._id,
            owner=self._batch.owner,
            filename=f"{self._batch.id}_{self._what}.jsonl",
            purpose=BATCH_OUTPUT,
            size_bytes=self._num_bytes,
            expires_at=None if lifetime_s is None else datetime.now(UTC) + timedelta(seconds=lifetime_s),
        )


def _why_stopped(batch: Batch) -> str | None:
    if batch.cancelling_at is not None:
        return "batch_cancelled"
    return "batch_expired" if batch.expired_at is not None else None


def sweep(database: Database, settings: Settings) -> None:
    """Delete files that have expired, and contents that have no row."""
    with database.write() as session:
        expired = {file_id: unfinished_job_with(session, file_id) for file_id in delete_expired_files(session)}
    for file_id, job_id in expired.items():
        delete_file(settings, file_id)
        if job_id is None:
            delete_published(settings, file_id)
    old = old_files(settings)
    with database.read() as session:
        orphans = without_row(session, old)
    delete_orphans(settings, orphans)
