"""Promise 12: SQLite under many writing processes never shows "database is locked"."""

import subprocess
import sys

from sqlalchemy import select

from apt_jobs.db.engine import Database
from apt_jobs.db.models import Job
from tests.faults.record import campaign, count
from tests.integration.db.steps import running

PROCESSES = 8
PROGRAM = """
import sys
from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import heartbeat
url, job_id, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
database, failures = Database(url), 0
for _ in range(number):
    try:
        with database.write() as session:
            heartbeat(session, job_id, 1, 3600.0)
    except Exception as exc:
        failures += 1
        print(exc)
print("failures", failures)
"""


def test_many_writers_are_never_told_that_the_database_is_locked(sqlite_url: str) -> None:
    each = count(100, 10_000)
    database = Database(sqlite_url)
    with campaign(12, f"transactions of {PROCESSES} processes at once on one SQLite file") as found:
        job = running(database)
        command = [sys.executable, "-c", PROGRAM, sqlite_url, job.id, str(each)]
        writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)]
        for writer in writers:
            printed, _ = writer.communicate()
            found.violations += [line for line in printed.splitlines() if line != "failures 0"]
        found.trials = PROCESSES * each
        found.on(database.dialect)
        with database.read() as session:
            assert session.scalars(select(Job.state)).one() == "running"
    database.dispose()
