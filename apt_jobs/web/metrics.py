"""What Prometheus scrapes at `GET /metrics`: this process's requests and streams, and what the database says of all.

Every web process says the same of queues and workers (database_samples.py), so that any one may be scraped; counters
are its own.
"""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette._utils import get_route_path
from starlette.types import Scope

from apt_jobs.db.engine import Database
from apt_jobs.settings import Settings
from apt_jobs.web.database_samples import FromDatabase
from apt_jobs.web.noted import Noted

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

    on_live: Callable[[int, datetime], None]


class Metrics:
    """The samples of one web process."""

    def __init__(self, settings: Settings, database: Database, streams: Streams) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._registry.register(FromDatabase(settings, database))
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

        self._live_events = Counter(
            "apt_jobs_stream_events", "Events of watched jobs that came live.", registry=self._registry
        )
        self._lag = Histogram(
            "apt_jobs_stream_lag_seconds",
            "Seconds from the oldest event of a batch until this process has it, on its way to browsers.",
            buckets=BUCKETS_S,
            registry=self._registry,
        )
        streams.on_live = self._note_live

    def _note_live(self, num_events: int, oldest_at: datetime) -> None:
        self._live_events.inc(num_events)
        self._lag.observe(max(0.0, (datetime.now(UTC) - oldest_at).total_seconds()))

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


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in METHODS else OTHER_METHOD


def _route(scope: Scope) -> str:
    """Return the route's pattern. The page's addresses are one route, and so is everything unknown."""
    route = scope.get("route")
    if route is None:
        return get_route_path(scope) if get_route_path(scope) in ("/healthz", "/readyz") else UNKNOWN_ROUTE
    return str(route.path)
