"""What one scrape of `GET /metrics` takes with 100,000 jobs, half of them waiting, against one with 100: wall-clock ms.

The goal is 20 ms on both databases, of which no part may be a scan: `python -m benchmarks scrape`.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from apt_jobs.db.clock import now_plus
from apt_jobs.db.engine import Database
from apt_jobs.db.job_counts import fold_counts
from apt_jobs.db.models import Job
from apt_jobs.settings import Settings
from benchmarks.queue import SPEC, databases, metrics_of
from benchmarks.rows import Row, paired_row

NUM_JOBS, NUM_OF_PEER = 100_000, 100
NUM_QUEUES = (10, 200)
NUM_ROUNDS = 30
STATES = ("queued", "queued", "queued", "queued", "succeeded", "succeeded", "failed", "cancelled")


def rows() -> Iterator[Row]:
    """Yield rows `scrape/<dialect>/<number of queues>`, in ms a scrape."""
    for dialect in ("sqlite", "postgres"):
        for num_queues in NUM_QUEUES:
            with tempfile.TemporaryDirectory() as folder, databases(dialect, Path(folder)) as (database, small, _):
                _fill(database, NUM_JOBS, num_queues)
                _fill(small, NUM_OF_PEER, num_queues)
                scrape, peer = metrics_of(database, Settings()), metrics_of(small, Settings())
                pairs = [(_ms(scrape), _ms(peer)) for _ in range(NUM_ROUNDS)]
                ours, others = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
                print(f"{dialect} {num_queues}: median {statistics.median(ours):.1f} ms, slowest {max(ours):.1f} ms")
                yield paired_row(f"scrape/{dialect}/{num_queues}-queues", ours, others, "100 jobs", "ms")


def _ms(call: Callable[[], Any]) -> float:
    before_s = time.perf_counter()
    call()
    return (time.perf_counter() - before_s) * 1_000.0


def _fill(database: Database, num_jobs: int, num_queues: int) -> None:
    row = {"kind": "train", "spec": SPEC.model_dump(mode="json"), "max_attempts": 3, "labels": {}}
    for begin in range(0, num_jobs, 5_000):
        jobs = []
        for number in range(begin, min(begin + 5_000, num_jobs)):
            state = STATES[number % len(STATES)]
            queue = f"queue-{number // len(STATES) % num_queues}"
            jobs.append({**row, "id": f"job_{number:020d}", "queue": queue, "state": state})
        with database.write() as session:
            session.execute(insert(Job).values(finished_at=now_plus(0)), jobs)
    while True:
        with database.write() as session:
            if fold_counts(session) <= num_queues * len(STATES):
                return
