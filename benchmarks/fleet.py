"""A fleet of simulated workers on real SQL: 1,000 workers of 8 GPUs, 100,000 waiting jobs of many needs, on Postgres.

Workers claim by the code of a real one (`db/placements.py`) from two threads at once; a full one ends its oldest job
first. Every claimed attempt is counted: a job that is claimed twice, or lost, breaks the benchmark. The peer is the
same fleet with 1,000 waiting jobs. A plan of preemptions is made with all workers full of preemptible jobs; its peer
with none that may yield.
"""

import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sqlalchemy import func, insert, select, update

from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import finish
from apt_jobs.db.models import Job, WorkerRow
from apt_jobs.db.placements import Packing, claim_fitting
from apt_jobs.db.preemptions import plan_preemptions
from apt_jobs.jobs.needs import decode_needs, needs_of
from apt_jobs.jobs.packing import Gpu, Held, Offer, Room, RoomReport
from apt_jobs.jobs.preemption import PreemptionRules
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.jobs.states import JobState
from benchmarks.queue import databases, server_cpu_s
from benchmarks.rows import Row

NUM_WORKERS, NUM_JOBS, FEW_JOBS = 1_000, 100_000, 1_000
NUM_CLAIMS = 1_000  # of each fleet
NUM_THREADS = 2  # that claim at once
NUM_PLANS = 20
SHAPES = [{"num_ranks": ranks, "time_limit_s": hours * 3_600.0} for ranks in (1, 2, 4, 8) for hours in (1, 4, 12, 48)]
OFFER = Offer(gpus=tuple(Gpu(index, "NVIDIA H100", 85.0) for index in range(8)), cpus=64, memory_gb=512.0, max_jobs=16)
LEASE_S, ALIVE_S = 3_600.0, 3_600.0


def rows() -> Iterator[Row]:
    """Yield rows `fleet/...`, in ms: wall clock and this process's CPU of a claim, and a plan's wall clock.

    The server's CPU is that of a claim and of all that makes room for it.
    """
    with tempfile.TemporaryDirectory() as folder, databases("postgres", Path(folder)) as (database, few, server):
        fleets = [Fleet(database, NUM_JOBS), Fleet(few, FEW_JOBS)]
        times, server_ms = [], []
        for fleet in fleets:
            before_s = server_cpu_s(server)
            times.append(fleet.claim(NUM_CLAIMS))
            server_ms.append(1_000 * (server_cpu_s(server) - before_s) / NUM_CLAIMS)
        peer_name = f"{FEW_JOBS:,} waiting jobs"
        for kind, name in enumerate(("claim", "claim-own-cpu")):
            for quantile in (50, 99):
                ours, peer = (statistics.quantiles([one[kind] for one in both], n=100)[quantile - 1] for both in times)
                yield Row(f"fleet/{name}-p{quantile}", ours, peer, peer_name, ours / peer, "ms")
        yield Row("fleet/server-cpu", server_ms[0], server_ms[1], peer_name, server_ms[0] / server_ms[1], "ms")
        plans_ms = [_times_ms(fleets[0].plan, NUM_PLANS)]
        with database.write() as session:
            session.execute(update(Job).where(Job.state == JobState.RUNNING).values(is_preemptible=False))
        plans_ms.append(_times_ms(fleets[0].plan, NUM_PLANS))
        ours, peer = map(statistics.median, plans_ms)
        yield Row("fleet/preemption-plan", ours, peer, "nothing may yield", ours / peer, "ms")


class Fleet:
    """All workers, as each of them knows itself."""

    def __init__(self, database: Database, num_jobs: int) -> None:
        self._database, self._chance = database, random.Random(1)
        self._held: list[dict[str, tuple[int, Held]]] = [{} for _ in range(NUM_WORKERS)]
        self._locks = [threading.Lock() for _ in range(NUM_WORKERS)]
        self._claimed: Counter[str] = Counter()
        self._next_id = 0
        self._add_jobs(num_jobs)
        with database.write() as session:
            session.execute(insert(WorkerRow), [self._row(number) for number in range(NUM_WORKERS)])

    def claim(self, num_claims: int) -> list[tuple[float, float]]:
        """Claim with workers at random; each claim's wall clock and CPU time, in ms."""
        self._run(num_claims // 4)  # the caches are warm, and most workers are full
        self._add_jobs(num_claims // 4)
        times = self._run(num_claims)
        assert max(self._claimed.values()) == 1, "a job was claimed twice"
        with self._database.read() as session:
            ended = session.scalar(select(func.count()).where(Job.state != JobState.QUEUED))
        assert ended == len(self._claimed), "a claimed job was lost"
        return times

    def plan(self) -> Any:
        """Plan as the loop of a web process does."""
        with self._database.read() as session:
            return plan_preemptions(session, PreemptionRules(exempt_s=0.0), ALIVE_S)

    def _run(self, num_claims: int) -> list[tuple[float, float]]:
        numbers = [self._chance.randrange(NUM_WORKERS) for _ in range(num_claims)]
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            times = list(pool.map(self._claim, numbers))
        with self._database.write() as session:  # as heartbeats do
            for number in sorted(set(numbers)):
                session.execute(
                    update(WorkerRow).where(WorkerRow.name == _name(number)).values(room=self._room(number))
                )
        return times

    def _claim(self, number: int) -> tuple[float, float]:
        with self._locks[number]:
            held = self._held[number]
            while sum(len(share.gpus) for _, share in held.values()) > 8 - self._free_gpus(number):
                self._end_oldest(number)
            room = Room(OFFER, tuple(share for _, share in held.values()))
            packing = Packing(_name(number), "train", room, time.monotonic(), reserve_after_s=300.0)
            began_s, cpu_began_s = time.perf_counter(), time.thread_time()
            with self._database.write() as session:
                claimed = claim_fitting(session, ["train"], packing, LEASE_S)
            took_ms = 1_000 * (time.perf_counter() - began_s), 1_000 * (time.thread_time() - cpu_began_s)
            if claimed is not None:
                share = room.place(decode_needs(claimed.job.needs))
                assert share is not None
                held[claimed.job.id] = claimed.job.attempt, share
                self._claimed[claimed.job.id] += 1
        return took_ms

    def _free_gpus(self, number: int) -> int:
        return (1, 2, 4, 8)[number % 4]  # that this worker has before it looks

    def _end_oldest(self, number: int) -> None:
        job_id = next(iter(self._held[number]))
        attempt, _ = self._held[number].pop(job_id)
        with self._database.write() as session:
            finish(session, job_id, attempt, JobState.SUCCEEDED)

    def _add_jobs(self, num_jobs: int) -> None:
        specs = [TrainSpec.model_validate({"kind": "train", **shape}) for shape in SHAPES]
        for start in range(0, num_jobs, 1_000):
            jobs = [self._job(specs) for _ in range(min(1_000, num_jobs - start))]
            with self._database.write() as session:
                session.execute(insert(Job), jobs)

    def _job(self, specs: list[TrainSpec]) -> dict[str, Any]:
        spec = self._chance.choice(specs)
        self._next_id += 1
        return {
            "id": f"job_{self._next_id:020d}",
            "kind": "train",
            "queue": "train",
            "priority": self._chance.choice((0, 0, 0, 1, 5)),
            "labels": {},
            "spec": spec.model_dump(mode="json"),
            "needs": needs_of(spec),
            "is_preemptible": True,
            "state": JobState.QUEUED,
            "max_attempts": 3,
        }

    def _row(self, number: int) -> dict[str, Any]:
        gpus = [
            {"index": gpu.index, "name": gpu.name, "memory_total_bytes": int(gpu.memory_gb * 1e9)} for gpu in OFFER.gpus
        ]
        names = {"name": _name(number), "kind": "train", "hostname": f"host-{number}", "version": "1"}
        return {**names, "queues": ["train"], "pid": number, "gpus": gpus, "room": self._room(number)}

    def _room(self, number: int) -> dict[str, Any]:
        jobs = tuple((job_id, share) for job_id, (_, share) in self._held[number].items())
        report = RoomReport(OFFER.cpus, OFFER.memory_gb, OFFER.max_jobs, OFFER.max_cpu_ranks, OFFER.num_nodes, jobs)
        return report.as_document()


def _name(number: int) -> str:
    return f"worker-{number:04d}"


def _times_ms(call: Callable[[], Any], num_calls: int) -> list[float]:
    times = []
    for _ in range(num_calls):
        began_s = time.perf_counter()
        call()
        times.append(1_000 * (time.perf_counter() - began_s))
    return times
