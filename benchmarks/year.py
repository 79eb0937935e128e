"""A year of jobs in simulation: each day some end, and retention removes those of 30 days ago (`make bench ONLY=year`).

`APT_JOBS_BENCH_JOBS_A_DAY=10000` is the full year of 3,650,000 jobs; the default is 100 a day. A row compares the last
month with the third one, from which on as much goes as comes: bytes of the database and of the files, and the time of
the first page of the list and of a scrape. All are flat when the ratio is about 1.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from sqlalchemy import insert, text

from apt_jobs.artifacts.folders import size_bytes_of
from apt_jobs.db.clock import now_plus
from apt_jobs.db.engine import Database
from apt_jobs.db.job_counts import MAX_FOLDED, fold_counts
from apt_jobs.db.listing import list_jobs
from apt_jobs.db.models import Attempt, Checkpoint, EventRow, Job
from apt_jobs.operations.data_directory import mark_data_directory
from apt_jobs.operations.retention import apply_retention
from apt_jobs.retention_policy import RetentionPolicy
from apt_jobs.settings import Settings
from benchmarks.queue import SPEC, databases, metrics_of
from benchmarks.rows import Row, paired_row

JOBS_A_DAY = int(os.environ.get("APT_JOBS_BENCH_JOBS_A_DAY", "100"))
KEPT_DAYS = 30
MONTHS = 12
FILES_EVERY = 20  # one of so many jobs has a checkpoint and a run folder
NUM_CALLS = 20
DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Day:
    """What there is at the end of a day."""

    num_jobs: int
    database_bytes: int
    file_bytes: int
    list_s: float
    scrape_s: float


def rows() -> Iterator[Row]:
    """Yield rows `year/<dialect>/<what>`."""
    for dialect in ("sqlite", "postgres"):
        with tempfile.TemporaryDirectory() as folder, databases(dialect, Path(folder)) as (database, _, _process):
            settings = Settings(data_dir=Path(folder) / "service", database_url=SecretStr("sqlite:///unused"))
            days = list(simulate(database, settings, JOBS_A_DAY, MONTHS * 30, KEPT_DAYS, look_every=5))
        early, late = days[12:18], days[-6:]  # the third month, and the last
        for what in ("num_jobs", "database_bytes", "file_bytes", "list_s", "scrape_s"):
            ours, peer = [[getattr(day, what) for day in some] for some in (late, early)]
            unit = "s" if what.endswith("_s") else "bytes" if what.endswith("bytes") else "jobs"
            yield paired_row(f"year/{dialect}/{what}", ours, peer, "the third month", unit)


def simulate(
    database: Database, settings: Settings, jobs_a_day: int, num_days: int, kept_days: float, *, look_every: int
) -> Iterator[Day]:
    """Let jobs end on each of `num_days` days, and yield what there is after every `look_every` of them.

    The database's clock is real: a simulated day lies in its past, and the policy's days are counted from there.
    """
    mark_data_directory(settings, database)
    for day in range(1, num_days + 1):
        days_ago = float(num_days - day)
        _add_day(database, settings, day, jobs_a_day, days_ago)
        policy = RetentionPolicy(days=days_ago + kept_days)
        while not apply_retention(database, settings, policy).is_complete:
            pass
        _fold(database)
        if day % look_every == 0:
            yield _look(database, settings)


def _add_day(database: Database, settings: Settings, day: int, jobs_a_day: int, days_ago: float) -> None:
    spec = SPEC.model_dump(mode="json")
    for begin in range(0, jobs_a_day, 1_000):
        ids = [f"job_{day:05d}{number:015d}" for number in range(begin, min(begin + 1_000, jobs_a_day))]
        with database.write() as session:
            job = {"kind": "train", "spec": spec, "state": "succeeded", "max_attempts": 3, "queue": "train"}
            at = now_plus(-days_ago * DAY_S)
            named = [{**job, "id": job_id, "name": f"run {job_id}", "labels": {"team": "a"}} for job_id in ids]
            session.execute(insert(Job).values(finished_at=at, created_at=at), named)
            attempts = [{"job_id": job_id, "attempt": 1, "worker": "w"} for job_id in ids]
            session.execute(insert(Attempt).values(started_at=at), attempts)
            events: list[dict[str, Any]] = [
                {"job_id": job_id, "seq": seq, "attempt": 1, "kind": "log", "payload": b'{"message": "a line"}'}
                for job_id in ids
                for seq in range(1, 6)
            ]
            session.execute(insert(EventRow).values(at=at), events)
            with_files = ids[::FILES_EVERY]
            session.execute(insert(Checkpoint).values(created_at=at), [_checkpoint(job_id) for job_id in with_files])
        for job_id in with_files:
            for folder in (settings.checkpoints_dir / job_id / "step-1", settings.runs_dir / job_id / "attempt-1"):
                folder.mkdir(parents=True)
                (folder / "file").write_bytes(bytes(1_000))


def _checkpoint(job_id: str) -> dict[str, Any]:
    name = {"id": f"ckpt_{job_id[4:]}", "job_id": job_id, "filename": f"{job_id}/step-1"}
    return {**name, "attempt": 1, "step": 1, "epoch": 0, "size_bytes": 1_000, "is_best": False}


def _fold(database: Database) -> None:
    while True:
        with database.write() as session:
            if fold_counts(session) < MAX_FOLDED:
                return


def _look(database: Database, settings: Settings) -> Day:
    with database.read() as session:
        num_jobs = session.scalar(text("SELECT count(*) FROM jobs")) or 0
        if database.dialect == "sqlite":
            pages = "SELECT (page_count - freelist_count) * page_size FROM "
            size = text(f"{pages} pragma_page_count, pragma_freelist_count, pragma_page_size")
        else:
            size = text("SELECT pg_database_size(current_database())")
        database_bytes = int(session.scalar(size) or 0)
    scrape = metrics_of(database, settings)
    file_bytes = sum(size_bytes_of(folder) for folder in (settings.checkpoints_dir, settings.runs_dir))
    return Day(num_jobs, database_bytes, file_bytes, _median_s(lambda: _list(database)), _median_s(scrape))


def _list(database: Database) -> None:
    with database.read() as session:
        list_jobs(session, states=["succeeded"], limit=50)


def _median_s(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(NUM_CALLS):
        began_s = time.process_time()
        call()
        times.append(time.process_time() - began_s)
    return statistics.median(times)
