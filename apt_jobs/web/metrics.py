"""What Prometheus scrapes at `GET /metrics`: this process's requests and streams, and what the database says of all.

Every web process says the same of queues and workers, so that any one may be scraped; counters are its own. No sample
costs a scan: what waits and runs is counted in an index, and what has ended is not counted at all.
"""

from collections import Counter as Counts
from collections.abc import Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from sqlalchemy.orm import Session
from starlette._utils import get_route_path
from starlette.types import Scope

from apt_jobs import __version__
from apt_jobs.db.engine import Database
from apt_jobs.db.queues import Queue, list_queues, waits_of_first
from apt_jobs.db.workers import list_workers, paused_workers
from apt_jobs.errors import AptJobsError
from apt_jobs.operations.liveness import alive_within_s
from apt_jobs.settings import Settings
from apt_jobs.web.noted import Noted

MAX_QUEUES = 200  # with samples of their own, the longest first; the others are added up as `OTHERS`
OTHERS = "(others)"  # no queue may be named so
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER_METHOD = "(other)"
UNKNOWN_ROUTE = "(none)"  # a stranger's addresses would make as many series
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Streams(Protocol):
    """What is read of `live/streams.py`."""

    @property
    def num_jobs(self) -> int: ...
    @property
    def num_watchers(self) -> int: ...


class Metrics:
    """The samples of one web process."""

    def __init__(self, settings: Settings, database: Database, streams: Streams) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._registry.register(_FromDatabase(settings, database))
        self._registry.register(_FromStreams(streams))
        self.requests = Histogram(
            "apt_jobs_http_response_start_seconds",
            "Seconds from a request's head to the first byte of its answer, which may go on as a stream.",
            ("method", "route", "status"),
            buckets=BUCKETS_S,
            registry=self._registry,
        )
        self.leases_lost = Counter(
            "apt_jobs_leases_lost",
            "Attempts that this process ended since nobody beat for them.",
            registry=self._registry,
        )
        self.jobs_fired = Counter(
            "apt_jobs_schedule_jobs", "Jobs of schedules that this process submitted.", registry=self._registry
        )

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return all samples and their content type, in the format that `Accept` asks for. Reads the database."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class Measured(Noted):
    """ASGI middleware: how many requests of which route and status, and how soon they were answered."""

    def note_status(self, scope: Scope, status: int, elapsed_s: float) -> None:
        """Count the request."""
        metrics: Metrics = scope["app"].state.metrics
        metrics.requests.labels(_method(scope), _route(scope), str(status)).observe(elapsed_s)


class _FromDatabase(Collector):
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
                found = [*_queue_samples(session), _worker_samples(session, self._settings)]
        except AptJobsError:
            pass
        up = GaugeMetricFamily("apt_jobs_database_up", "Whether the database answered this scrape.")
        up.add_metric((), float(bool(found)))
        yield up
        info = GaugeMetricFamily("apt_jobs_build_info", "The version, as a label.", labels=("version",))
        info.add_metric((__version__,), 1.0)
        yield info
        yield from found


class _FromStreams(Collector):
    """Who watches live events through this process."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the samples."""
        jobs = GaugeMetricFamily("apt_jobs_watched_jobs", "Jobs whose live events this process follows.")
        jobs.add_metric((), self._streams.num_jobs)
        yield jobs
        watchers = GaugeMetricFamily("apt_jobs_watchers", "Live streams that are open at this process.")
        watchers.add_metric((), self._streams.num_watchers)
        yield watchers


def _queue_samples(session: Session) -> Iterator[GaugeMetricFamily]:
    queues = sorted(list_queues(session), key=lambda queue: -queue.queued - queue.running)
    shown, others = queues[:MAX_QUEUES], queues[MAX_QUEUES:]
    if others:
        rest = Queue(OTHERS, sum(q.queued for q in others), sum(q.running for q in others), None, False)
        shown = [*shown, rest]
    jobs = GaugeMetricFamily("apt_jobs_jobs", "Jobs that have not ended, by what they do.", labels=("queue", "state"))
    paused = GaugeMetricFamily("apt_jobs_queue_paused", "Whether the queue hands out no job.", labels=("queue",))
    for queue in shown:
        jobs.add_metric((queue.name, "queued"), queue.queued)
        jobs.add_metric((queue.name, "running"), queue.running)
        paused.add_metric((queue.name,), float(queue.is_paused))
    waits = GaugeMetricFamily(
        "apt_jobs_queue_wait_seconds", "How long the job that is next in its queue has waited.", labels=("queue",)
    )
    for name, wait_s in waits_of_first(session, [queue.name for queue in shown if queue.queued]).items():
        waits.add_metric((name,), wait_s)
    yield from (jobs, paused, waits)


def _worker_samples(session: Session, settings: Settings) -> GaugeMetricFamily:
    alive = {worker.name for worker in list_workers(session, alive_within_s(settings))}
    paused = paused_workers(session)
    counts: Counts[tuple[str, str]] = Counts()
    for worker in list_workers(session):
        if worker.name not in alive:
            state = "lost"
        elif worker.drain_requested_at is not None:
            state = "draining"
        else:
            state = "paused" if worker.name in paused else "ready"
        counts[worker.kind, state] += 1
    family = GaugeMetricFamily("apt_jobs_workers", "Workers by kind and state.", labels=("kind", "state"))
    for labels, number in sorted(counts.items()):
        family.add_metric(labels, number)
    return family


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in METHODS else OTHER_METHOD


def _route(scope: Scope) -> str:
    """Return the route's pattern. The page's addresses are one route, and so is everything unknown."""
    route = scope.get("route")
    if route is None:
        return get_route_path(scope) if get_route_path(scope) in ("/healthz", "/readyz") else UNKNOWN_ROUTE
    return str(route.path)
