"""Metrics of user scripts: what a call of `log()` costs the script, and what a long job costs who looks at it."""

import os
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from apt_jobs.db.engine import Database
from apt_jobs.db.events import append_events
from apt_jobs.db.jobs import claim, insert_job
from apt_jobs.db.series.custom_metrics import MetricLogs
from apt_jobs.db.upgrade import upgrade_database
from apt_jobs.events.kinds import MetricsLogged
from apt_jobs.jobs.handover import Handover
from apt_jobs.jobs.limits import MAX_STEP
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.run.current import Run
from benchmarks.rows import Row

NUM_METRICS = 20
NUM_CALLS, BLOCK_CALLS = 10_000, 500
LOG_LIMIT_US = 50.0
NUM_EVENTS = int(os.environ.get("APT_JOBS_BENCH_METRIC_EVENTS", "100000"))
BATCH_EVENTS = 2_000
LEASE_S = 3600.0
OPEN_LIMIT_S, POLL_LIMIT_S = 2.0, 0.2


def rows() -> Iterator[Row]:
    """`metrics/log`, `metrics/open`, `metrics/poll`."""
    with tempfile.TemporaryDirectory() as folder:
        log_us = _log_us(Path(folder))
        yield Row("metrics/log", log_us, LOG_LIMIT_US, f"the limit, {NUM_METRICS} names", log_us / LOG_LIMIT_US, "us")
        open_s, poll_s = _read_s(Path(folder))
        what = f"the limit, at {NUM_EVENTS:,} events x {NUM_METRICS} names"
        yield Row("metrics/open", open_s, OPEN_LIMIT_S, what, open_s / OPEN_LIMIT_S, "s")
        yield Row("metrics/poll", poll_s, POLL_LIMIT_S, what, poll_s / POLL_LIMIT_S, "s")


def _values(step: int) -> dict[str, int | float]:
    return {f"group/metric_{number}": step * 0.5 + number for number in range(NUM_METRICS)}


def _log_us(folder: Path) -> float:
    run = Run(Handover("job_1", 1, 1, folder, folder / "output", folder / "checkpoints", "job_1", 3), rank=0)
    values, times_s = _values(0), []
    for first in range(0, NUM_CALLS, BLOCK_CALLS):
        began_s = time.perf_counter()
        for step in range(first, first + BLOCK_CALLS):
            run.log(values, step=step)
        times_s.append((time.perf_counter() - began_s) / BLOCK_CALLS)
    return min(times_s) * 1e6  # the others measure what else the machine does


def _read_s(folder: Path) -> tuple[float, float]:
    """Return the time of the first request for the series of a long job, and of the next."""
    database = Database(f"sqlite:///{folder / 'bench.sqlite3'}")
    upgrade_database(database)
    with database.write() as session:
        job_id = insert_job(session, TrainSpec(kind="train")).id
        claim(session, job_id, "bench", LEASE_S)
    for first in range(0, NUM_EVENTS, BATCH_EVENTS):
        now = datetime.now(UTC)
        events = [(now, MetricsLogged(step, 0, _values(step))) for step in range(first, first + BATCH_EVENTS)]
        with database.write() as session:
            append_events(session, job_id, 1, events, LEASE_S)
    logs, times_s = MetricLogs(1 << 30), []
    for _ in range(2):
        began_s = time.process_time()  # of the processor: one thread does it all
        with database.read() as session:
            logs.series(session, job_id, 0, MAX_STEP)
        times_s.append(time.process_time() - began_s)
    database.dispose()
    return times_s[0], times_s[1]
