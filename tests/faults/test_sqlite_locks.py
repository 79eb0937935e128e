"""Promise 12: SQLite under many writing processes never shows "database is locked"."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from sqlalchemy import select

from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import heartbeat
from apt_jobs.db.models import Job
from tests.faults.record import campaign, count
from tests.integration.db.steps import running

PROCESSES = 8


def failures_of(url: str, job_id: str, number: int) -> list[str]:
    """What went wrong in so many transactions of one process."""
    database, failures = Database(url), []
    for _ in range(number):
        try:
            with database.write() as session:
                heartbeat(session, job_id, 1, 3600.0)
        except Exception as exc:
            failures.append(str(exc))
    database.dispose()
    return failures


def test_many_writers_are_never_told_that_the_database_is_locked(sqlite_url: str) -> None:
    each = count(100, 10_000)
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload([__name__])  # one import for all of them
    database = Database(sqlite_url)
    with (
        campaign(12, f"transactions of {PROCESSES} processes at once on one SQLite file") as found,
        ProcessPoolExecutor(PROCESSES, forkserver) as pool,
    ):
        found.on(database.dialect)
        job = running(database)
        for writer in [pool.submit(failures_of, sqlite_url, job.id, each) for _ in range(PROCESSES)]:
            found.violations += writer.result()
        found.trials = PROCESSES * each
        with database.read() as session:
            assert session.scalars(select(Job.state)).one() == "running"
    database.dispose()
