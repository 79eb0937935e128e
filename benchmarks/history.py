"""Histories against MLflow's tracking store, both on SQLite with the same series; and the overview of a huge job.

Each is used as it is used: ours through the batches of the relay, MLflow through `log_batch` with as many metrics as it
takes at once. The huge job of a million steps is written by the same function in larger batches.
"""

import math
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np

from apt_jobs.db import jobs
from apt_jobs.db.engine import Database
from apt_jobs.db.events import append_events
from apt_jobs.db.series.histories import gradient_overview
from apt_jobs.db.upgrade import upgrade_database
from apt_jobs.events.kinds import Event, GradientsRecorded, LayersNamed, StepTrained
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.supervision.relay import BATCH_EVENTS
from apt_jobs.web.api.overviews import MEDIA_TYPE, points_that_fit
from benchmarks.rows import Row
from benchmarks.submit import service

NUM_LAYERS = 150
NUM_CURVES = 5
NUM_STEPS = 512  # of the series that both write
NUM_JOBS = 8  # ours are so fast that one is too short to measure
HUGE_STEPS = int(os.environ.get("APT_JOBS_BENCH_HUGE_STEPS", "1000000"))
HUGE_BATCH_EVENTS = 16_384
NUM_READS = 21
OVERVIEW_LIMIT_MS = 100.0
OVERVIEW_LIMIT_BYTES = 200_000.0
MLFLOW_BATCH = 1_000  # metrics that `log_batch` takes
NAMES = tuple(f"model.layers.{number // 9}.part_{number % 9}.weight" for number in range(NUM_LAYERS))


def rows() -> Iterator[Row]:
    """`history/write`, `history/size`, `history/overview`, `history/overview-bytes`, `history/overview-mlflow`."""
    with tempfile.TemporaryDirectory() as folder:
        ours = _write_ours(Path(folder))
        peer = _write_mlflow(Path(folder))
        name = "MLflow's SQLite store, log_batch"
        yield Row("history/write", ours[0], peer[0], name, ours[0] / peer[0], "values/s")
        yield Row("history/size", ours[1], peer[1], name, ours[1] / peer[1], "bytes/value")
        yield Row(
            "history/overview-mlflow", ours[2], peer[2], "MLflow, every metric's history", ours[2] / peer[2], "ms"
        )
    with tempfile.TemporaryDirectory() as folder, service(Path(folder)) as (settings, key):
        job_id, rate = _write_huge(settings.database)
        took_ms, num_bytes = _read_huge(f"http://127.0.0.1:{settings.port}", key, job_id)
        what = f"the limit, at {HUGE_STEPS:,} steps x {NUM_LAYERS} layers"
        yield Row("history/overview", took_ms, OVERVIEW_LIMIT_MS, what, took_ms / OVERVIEW_LIMIT_MS, "ms")
        yield Row(
            "history/overview-bytes", num_bytes, OVERVIEW_LIMIT_BYTES, what, num_bytes / OVERVIEW_LIMIT_BYTES, "bytes"
        )
        print(f"{job_id}: written at {rate:,.0f} values/s", flush=True)


def _series(first_step: int, num_steps: int) -> list[Event]:
    """Return norms and curves that look like a training's: every value is another one."""
    random = np.random.default_rng(first_step)
    norms = np.exp(random.normal(-2.0, 0.5, (num_steps, NUM_LAYERS))).astype(np.float32).astype(np.float64).tolist()
    decay = 8.0 / np.log(np.arange(first_step, first_step + num_steps) + 2.0)
    loss = (decay + random.normal(0, 0.05, num_steps)).tolist()
    events: list[Event] = []
    for number, (of_step, its_loss) in enumerate(zip(norms, loss, strict=True)):
        step = first_step + number
        rate = 1e-3 * math.cos(step / 1e6)
        events.append(StepTrained(step, 0, its_loss, rate, sum(of_step) ** 0.5, 101.3 + its_loss, 41_000.0 / its_loss))
        events.append(GradientsRecorded(step, tuple(of_step), ()))
    return events


def _write_ours(folder: Path) -> tuple[float, float, float]:
    """Return values a second, bytes a value, milliseconds for an overview."""
    file = folder / "ours.sqlite3"
    database = Database(f"sqlite:///{file}")
    upgrade_database(database)
    empty_bytes = _size(file)
    series, at, took_s = _series(1, NUM_STEPS), datetime.now(UTC), 0.0
    for _ in range(NUM_JOBS):
        job_id = _job(database)
        began = time.perf_counter()
        for begin in range(0, len(series), BATCH_EVENTS):
            with database.write() as session:
                append_events(session, job_id, 1, [(at, event) for event in series[begin : begin + BATCH_EVENTS]], 60.0)
        took_s += time.perf_counter() - began
    num_values = NUM_JOBS * NUM_STEPS * (NUM_LAYERS + NUM_CURVES)
    overview_ms = statistics.median(_overview_ms(database, job_id) for _ in range(NUM_READS))
    database.dispose()
    return num_values / took_s, (_size(file) - empty_bytes) / num_values, overview_ms


def _job(database: Database) -> str:
    with database.write() as session:
        job = jobs.insert_job(session, TrainSpec(kind="train"))
        assert jobs.claim(session, job.id, "benchmark", 3600.0) is not None
        append_events(session, job.id, 1, [(datetime.now(UTC), LayersNamed(NAMES))], 3600.0)
        return job.id


def _overview_ms(database: Database, job_id: str) -> float:
    began = time.perf_counter()
    with database.read() as session:
        overview = gradient_overview(session, job_id, points_that_fit(NUM_LAYERS))
    assert overview.of_all_steps.num_steps == NUM_STEPS
    return 1000.0 * (time.perf_counter() - began)


def _write_mlflow(folder: Path) -> tuple[float, float, float]:
    import mlflow
    from mlflow.entities import Metric

    file = folder / "mlflow.sqlite3"
    client = mlflow.MlflowClient(f"sqlite:///{file}")
    run_id = client.create_run(client.create_experiment("history")).info.run_id
    empty_bytes = _size(file)
    metrics = []
    for event in _series(1, NUM_STEPS):
        if isinstance(event, GradientsRecorded):
            values = dict(zip(NAMES, event.norms, strict=True))
        else:
            assert isinstance(event, StepTrained)
            names = ("train_loss", "learning_rate", "grad_norm", "step_time_ms", "tokens_per_s")
            values = {name: getattr(event, name) for name in names}
        metrics += [Metric(name, value, 1_700_000_000_000 + event.step, event.step) for name, value in values.items()]
    began = time.perf_counter()
    for begin in range(0, len(metrics), MLFLOW_BATCH):
        client.log_batch(run_id, metrics=metrics[begin : begin + MLFLOW_BATCH])
    rate = len(metrics) / (time.perf_counter() - began)
    began = time.perf_counter()
    assert sum(len(client.get_metric_history(run_id, name)) for name in NAMES) == NUM_STEPS * NUM_LAYERS
    overview_ms = 1000.0 * (time.perf_counter() - began)
    return rate, (_size(file) - empty_bytes) / len(metrics), overview_ms


def _size(file: Path) -> int:
    """Return bytes on disk, with nothing left in the write-ahead log."""
    connection = sqlite3.connect(file)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return sum(path.stat().st_size for path in file.parent.glob(f"{file.name}*"))


def _write_huge(url: str) -> tuple[str, float]:
    """Return a job of `HUGE_STEPS`; its id, and how fast it was written."""
    database = Database(url)
    job_id, took_s = _job(database), 0.0
    for first_step in range(1, HUGE_STEPS + 1, HUGE_BATCH_EVENTS // 2):
        at = datetime.now(UTC)
        batch = [(at, event) for event in _series(first_step, min(HUGE_BATCH_EVENTS // 2, HUGE_STEPS + 1 - first_step))]
        began = time.perf_counter()
        with database.write() as session:
            append_events(session, job_id, 1, batch, 3600.0)
        took_s += time.perf_counter() - began
    database.dispose()
    return job_id, HUGE_STEPS * (NUM_LAYERS + NUM_CURVES) / took_s


def _read_huge(base: str, key: str, job_id: str) -> tuple[float, float]:
    """Return milliseconds and bytes of the overview over HTTP."""
    headers = {"authorization": f"Bearer {key}", "accept": MEDIA_TYPE}
    took_ms = []
    with httpx.Client(base_url=base, headers=headers, trust_env=False, timeout=60) as client:
        for _ in range(NUM_READS):
            began = time.perf_counter()
            answer = client.get(f"/api/jobs/{job_id}/gradients/overview").raise_for_status()
            took_ms.append(1000.0 * (time.perf_counter() - began))
    return statistics.median(took_ms), float(len(answer.content))
