"""A comparison of 100 jobs over HTTP, beside a read of the same values from a table of metrics as trackers keep it.

The peer is the `metrics` table of MLflow's SQLite store without MLflow: one query for all runs and metrics, and the
means of as many points in NumPy.
"""

import math
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np

from apt_jobs.db import jobs
from apt_jobs.db.engine import Database
from apt_jobs.db.events import append_events
from apt_jobs.db.series.align import grid_over, means_on
from apt_jobs.db.series.store import CURVES
from apt_jobs.events.kinds import Event, StepTrained, TrainingStarted, Validated
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.supervision.relay import BATCH_EVENTS
from benchmarks.rows import Row
from benchmarks.submit import service

NUM_JOBS = 100
NUM_STEPS = int(os.environ.get("APT_JOBS_BENCH_COMPARE_STEPS", "5000"))
NUM_READS = 11
PEER_EVERY = 5  # reads: one of the peer takes seconds
LIMIT_MS, LIMIT_BYTES = 100.0, 300_000.0
METRICS = "train_loss,learning_rate,grad_norm,step_time_ms,tokens_per_s"


def rows() -> Iterator[Row]:
    """`compare/time`, `compare/bytes`, `compare/sql`."""
    with tempfile.TemporaryDirectory() as folder, service(Path(folder)) as (settings, key):
        ids = _write_ours(settings.database)
        table = _write_table(Path(folder) / "peer.sqlite3", ids)
        headers = {"authorization": f"Bearer {key}"}
        base, ours_ms, peer_ms = f"http://127.0.0.1:{settings.port}", [], []
        with httpx.Client(base_url=base, headers=headers, trust_env=False, timeout=60) as client:
            for number in range(NUM_READS):
                began = time.perf_counter()
                answer = client.get("/api/compare", params={"jobs": ",".join(ids), "metrics": METRICS})
                ours_ms.append(1000 * (time.perf_counter() - began))
                num_points = len(answer.raise_for_status().json()["points"])
                if number % PEER_EVERY == 0:
                    began = time.perf_counter()
                    _read_table(table, ids, num_points)
                    peer_ms.append(1000 * (time.perf_counter() - began))
        table.close()
    what = f"the limit, {NUM_JOBS} jobs x {len(CURVES)} metrics x {NUM_STEPS:,} steps"
    median_ms, num_bytes = statistics.median(ours_ms), float(len(answer.content))
    yield Row("compare/time", median_ms, LIMIT_MS, what, median_ms / LIMIT_MS, "ms")
    yield Row("compare/bytes", num_bytes, LIMIT_BYTES, what, num_bytes / LIMIT_BYTES, "bytes")
    table_ms = statistics.median(peer_ms)
    yield Row("compare/sql", median_ms, table_ms, "one query of a table as MLflow's, NumPy", median_ms / table_ms, "ms")


def _series(number: int) -> list[Event]:
    random = np.random.default_rng(number)
    losses = (8.0 / np.log(np.arange(NUM_STEPS) + 2.5) + random.normal(0, 0.05, NUM_STEPS)).tolist()
    events: list[Event] = []
    for step, loss in enumerate(losses, 1):
        rate = 1e-3 * math.cos(step / NUM_STEPS)
        events.append(StepTrained(step, step // 500, loss, rate, abs(loss) * 0.3, 100.0 + loss, 41_000.0 / loss))
        if step % 250 == 0:
            events.append(Validated(step, step // 500, loss, is_best=False))
    return events


def _write_ours(url: str) -> list[str]:
    database, ids = Database(url), []
    for number in range(NUM_JOBS):
        spec = TrainSpec.model_validate({"kind": "train", "training": {"learning_rate": 1e-4 * (number + 1)}})
        with database.write() as session:
            job_id = jobs.insert_job(session, spec).id
            assert jobs.claim(session, job_id, "benchmark", 3600.0) is not None
        ids.append(job_id)
        at = datetime.now(UTC)
        started = TrainingStarted(1, "cpu", "gloo", 1_000, NUM_STEPS, 500, 4096, 0, {})
        timed = [(at, started), *((at + timedelta(seconds=1), event) for event in _series(number))]
        for begin in range(0, len(timed), BATCH_EVENTS):
            with database.write() as session:
                append_events(session, job_id, 1, timed[begin : begin + BATCH_EVENTS], 3600.0)
    database.dispose()
    return ids


def _write_table(file: Path, ids: list[str]) -> sqlite3.Connection:
    connection = sqlite3.connect(file)
    connection.execute(
        "CREATE TABLE metrics (key TEXT, value REAL, timestamp INTEGER, run_uuid TEXT, step INTEGER, is_nan INTEGER,"
        " PRIMARY KEY (key, timestamp, step, run_uuid, value, is_nan))"
    )
    connection.execute("CREATE INDEX index_metrics_run_uuid ON metrics (run_uuid)")
    for number, job_id in enumerate(ids):
        steps = [event for event in _series(number) if isinstance(event, StepTrained)]
        rows = ((name, getattr(event, name), event.step, job_id, event.step, 0) for event in steps for name in CURVES)
        connection.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?)", rows)
    connection.commit()
    return connection


def _read_table(connection: sqlite3.Connection, ids: list[str], num_points: int) -> None:
    marks = ",".join("?" * len(ids))
    query = f"SELECT run_uuid, key, step, value FROM metrics WHERE run_uuid IN ({marks})"
    run_ids, keys, steps, values = zip(*connection.execute(query, ids).fetchall(), strict=True)
    places = {(job_id, name): len(CURVES) * i + j for i, job_id in enumerate(ids) for j, name in enumerate(CURVES)}
    series = np.array([places[pair] for pair in zip(run_ids, keys, strict=True)])
    steps_R = np.array(steps, np.float64)
    grid = grid_over(1, NUM_STEPS, num_points, is_whole=True)
    means_on(grid, len(places), series, steps_R, np.array(values), np.ones(len(values), np.int64))
