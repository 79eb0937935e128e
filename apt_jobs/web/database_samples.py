"""Samples of `GET /metrics` that the database has: queues, jobs by state, workers and their GPUs.

Nothing here costs a scan: jobs are counted as they change (db/job_counts.py), and the wait of a queue is one look into
an index.
"""

from collections import Counter as Counts
from collections.abc import Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.orm import Session

from apt_jobs import __version__
from apt_jobs.db.engine import Database
from apt_jobs.db.job_counts import job_counts
from apt_jobs.db.models import WorkerRow
from apt_jobs.db.queues import paused_queues, waits_of_first
from apt_jobs.db.workers import SeenWorker, seen_workers
from apt_jobs.errors import AptJobsError
from apt_jobs.jobs.states import TERMINAL_STATES, JobState
from apt_jobs.operations.liveness import alive_within_s
from apt_jobs.settings import Settings

MAX_QUEUES = 200  # with samples of their own, the longest first; the others are added up as `OTHERS`
OTHERS = "(others)"  # no queue may be named so
MAX_GPUS = 2_048  # with samples of their own
ALWAYS_SHOWN = (JobState.QUEUED, JobState.RUNNING)  # also where there is none: a rule then has a value
UNENDED = tuple(state for state in JobState if state not in TERMINAL_STATES)


class FromDatabase(Collector):
    """Queues and workers, read at each scrape."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings, self._database = settings, database

    def describe(self) -> list[GaugeMetricFamily]:
        """Return nothing: the registry would read the database to learn the names."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the samples; without the database only that it does not answer."""
        found: list[GaugeMetricFamily] = []
        try:
            with self._database.read() as session:
                workers = seen_workers(session, alive_within_s(self._settings))
                found = [*_queue_samples(session), _worker_samples(workers), *_gpu_samples(workers)]
        except AptJobsError:
            pass
        up = GaugeMetricFamily("apt_jobs_database_up", "Whether the database answered this scrape.")
        up.add_metric((), float(bool(found)))
        yield up
        info = GaugeMetricFamily("apt_jobs_build_info", "The version, as a label.", labels=("version",))
        info.add_metric((__version__,), 1.0)
        yield info
        yield from found


def _queue_samples(session: Session) -> Iterator[GaugeMetricFamily]:
    paused = paused_queues(session)
    counts = {**{name: {} for name in paused}, **job_counts(session)}
    shown = sorted(counts, key=lambda name: (-sum(counts[name].get(state, 0) for state in UNENDED), name))
    shown, others = shown[:MAX_QUEUES], shown[MAX_QUEUES:]
    jobs = GaugeMetricFamily("apt_jobs_jobs", "Jobs that have not ended, by state.", labels=("queue", "state"))
    depth = GaugeMetricFamily("apt_jobs_queue_depth", "Jobs that wait, for a scaler of workers.", labels=("queue",))
    is_paused = GaugeMetricFamily("apt_jobs_queue_paused", "Whether the queue hands out no job.", labels=("queue",))
    for name in shown:
        _add_queue(jobs, depth, name, counts[name])
        is_paused.add_metric((name,), float(paused.get(name, False)))
    if others:
        rest: Counts[str] = Counts()
        for name in others:
            rest.update(counts[name])
        _add_queue(jobs, depth, OTHERS, rest)
        is_paused.add_metric((OTHERS,), 0.0)
    ended = GaugeMetricFamily("apt_jobs_ended_jobs", "Jobs that have ended and are kept.", labels=("state",))
    for state in sorted(TERMINAL_STATES):
        ended.add_metric((state.value,), sum(by_state.get(state, 0) for by_state in counts.values()))
    waits = GaugeMetricFamily(
        "apt_jobs_queue_wait_seconds", "How long the job that is next in its queue has waited.", labels=("queue",)
    )
    first = waits_of_first(session)
    for name in shown:
        if name in first:
            waits.add_metric((name,), first[name])
    yield from (jobs, ended, depth, is_paused, waits)


def _add_queue(jobs: GaugeMetricFamily, depth: GaugeMetricFamily, name: str, by_state: dict[str, int]) -> None:
    for state in UNENDED:
        if state in ALWAYS_SHOWN or by_state.get(state):
            jobs.add_metric((name, state.value), by_state.get(state, 0))
    depth.add_metric((name,), by_state.get(JobState.QUEUED, 0))


def _worker_samples(workers: Sequence[SeenWorker]) -> GaugeMetricFamily:
    counts: Counts[tuple[str, str]] = Counts((seen.row.kind, _state_of(seen)) for seen in workers)
    family = GaugeMetricFamily("apt_jobs_workers", "Workers by kind and state.", labels=("kind", "state"))
    for labels, number in sorted(counts.items()):
        family.add_metric(labels, number)
    return family


def _state_of(seen: SeenWorker) -> str:
    if not seen.is_alive:
        return "lost"
    if seen.row.drain_requested_at is not None:
        return "draining"
    return "paused" if seen.is_paused else "ready"


def _gpu_samples(workers: Sequence[SeenWorker]) -> Iterator[GaugeMetricFamily]:
    """Yield what living workers reported of their GPUs with their last heartbeat."""
    labels = ("worker", "gpu", "model")
    utilization = GaugeMetricFamily("apt_jobs_gpu_utilization_ratio", "Time with work on a GPU, 0 to 1.", labels=labels)
    used = GaugeMetricFamily("apt_jobs_gpu_memory_used_bytes", "Memory of a GPU that is in use.", labels=labels)
    total = GaugeMetricFamily("apt_jobs_gpu_memory_bytes", "Memory of a GPU.", labels=labels)
    gpus = [(seen.row, gpu) for seen in workers if seen.is_alive for gpu in seen.row.gpus]
    for row, gpu in gpus[:MAX_GPUS]:
        if "memory_total_bytes" in gpu:  # one that cannot be read has its index only
            names = _names_of(row, gpu)
            utilization.add_metric(names, gpu["utilization_percent"] / 100.0)
            used.add_metric(names, gpu["memory_used_bytes"])
            total.add_metric(names, gpu["memory_total_bytes"])
    yield from (utilization, used, total)


def _names_of(row: WorkerRow, gpu: dict[str, object]) -> tuple[str, str, str]:
    return row.name, str(gpu["index"]), str(gpu["name"])
