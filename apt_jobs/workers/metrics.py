"""What Prometheus scrapes of one worker: claims, waits, how attempts end, events, tokens, its GPUs.

The supervisors and ranks of its jobs store what they do in the database: it is read there, when a scrape asks and when
an attempt has ended. One scrape is served at a time, and a client that is slow is cut off.
"""

import socket
import threading
from collections import Counter as Counts
from collections.abc import Callable, Iterator, Sequence
from socketserver import TCPServer
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import select

from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import Claimed
from apt_jobs.db.models import Attempt, Job
from apt_jobs.errors import AlreadyRunning, AptJobsError
from apt_jobs.workers.gpu_health import GpuReading, read_gpus

WAIT_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
SLOW_CLIENT_S = 2.0
NOT_ENDED = "unknown"  # outcome of an attempt whose row says none: the database did not answer, or it was lost

GPU_GAUGES: dict[str, tuple[str, Callable[[GpuReading], float | None]]] = {
    "apt_jobs_gpu_temperature_celsius": ("Temperature of a GPU.", lambda gpu: gpu.temperature_celsius),
    "apt_jobs_gpu_power_watts": ("Power that a GPU draws.", lambda gpu: gpu.power_watts),
    "apt_jobs_gpu_uncorrected_ecc_errors": (
        "Uncorrected memory errors of a GPU since its driver was loaded.",
        lambda gpu: gpu.num_uncorrected_ecc_errors,
    ),
    "apt_jobs_gpu_throttled": (
        "Whether a GPU is slowed down by heat or power.",
        lambda gpu: None if gpu.is_throttled is None else float(gpu.is_throttled),
    ),
}


class WorkerMetrics:
    """The samples of one worker, and the port that serves them."""

    def __init__(self, database: Database, port: int) -> None:
        self._database, self._port = database, port
        self._registry = CollectorRegistry()
        self._running: dict[str, tuple[str, int]] = {}  # queue and last `seq` that was counted, by job
        self._lock = threading.Lock()
        self._server: WSGIServer | None = None
        self._describe_gpus: Callable[[], list[dict[str, Any]]] = list
        self._registry.register(_AtScrape(self._throughput, lambda: self._describe_gpus()))  # first: it counts events
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._claims = self._counter("apt_jobs_claims", "Jobs that this worker claimed.", "queue")
        self._ends = self._counter("apt_jobs_attempts_ended", "Attempts, by the state they left.", "queue", "outcome")
        self._events = self._counter("apt_jobs_events_stored", "Events that its attempts stored.", "queue")
        self._tokens = self._counter("apt_jobs_generated_tokens", "Tokens that it generated.", "queue")
        self._waits = Histogram(
            "apt_jobs_claim_wait_seconds",
            "Seconds from when a job was due until this worker claimed it.",
            ("queue",),
            buckets=WAIT_BUCKETS_S,
            registry=self._registry,
        )

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(name, documentation, labels, registry=self._registry)

    def serve(self, host: str, describe_gpus: Callable[[], list[dict[str, Any]]]) -> None:
        """Answer scrapes from now on, in a thread.

        Raises:
            AlreadyRunning: the port is in use, or the address is not of this machine.
        """
        self._describe_gpus = describe_gpus
        app = make_wsgi_app(self._registry)
        try:
            self._server = make_server(host, self._port, app, _Server6 if ":" in host else _Server, _Handler)
        except OSError as exc:
            raise AlreadyRunning(
                f"cannot serve metrics on {host} port {self._port}: {exc.strerror}; choose another --metrics-port"
            ) from exc
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    @property
    def port(self) -> int:
        """The port that it is served on."""
        return self._port if self._server is None else self._server.server_port

    def close(self) -> None:
        """Answer no more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def note_claimed(self, group: Sequence[Claimed]) -> None:
        """Count jobs that were just claimed."""
        for job in (claimed.job for claimed in group):
            self._claims.labels(job.queue).inc()
            if job.claimed_at is not None:
                waited_s = (job.claimed_at - job.not_before_at).total_seconds()
                self._waits.labels(job.queue).observe(max(0.0, waited_s))
            with self._lock:
                self._running[job.id] = job.queue, job.last_seq

    def note_served(self, group: Sequence[Claimed]) -> None:
        """Count how the attempts ended, and what they stored since the last look."""
        attempts = {claimed.job.id: claimed.job for claimed in group}
        query = select(Job.id, Job.last_seq, Job.result, Job.attempt, Attempt.attempt, Attempt.outcome)
        query = query.join(Attempt, Attempt.job_id == Job.id).where(Job.id.in_(attempts))
        ended: dict[str, str | None] = {}
        try:
            with self._database.read() as session:
                for job_id, last_seq, result, current, attempt, outcome in session.execute(query):
                    job = attempts[job_id]
                    if attempt != job.attempt:
                        continue
                    ended[job_id] = outcome
                    if current == attempt:  # else another worker stores events by now
                        self._count_events(job_id, last_seq)
                        self._tokens.labels(job.queue).inc(_num_tokens(result))
        except AptJobsError:
            pass
        for job_id, job in attempts.items():
            self._ends.labels(job.queue, ended.get(job_id) or NOT_ENDED).inc()
            with self._lock:
                self._running.pop(job_id, None)

    def _throughput(self) -> dict[str, tuple[int, float]]:
        """Return by queue how many jobs run here and how many tokens a second they train on; count their events."""
        with self._lock:
            running = {job_id: queue for job_id, (queue, _) in self._running.items()}
        found = {queue: (number, 0.0) for queue, number in Counts(running.values()).items()}
        query = select(Job.id, Job.last_seq, Job.progress).where(Job.id.in_(running))
        try:
            with self._database.read() as session:
                for job_id, last_seq, progress in session.execute(query):
                    self._count_events(job_id, last_seq)
                    rate = (progress or {}).get("tokens_per_s")
                    number, total = found[running[job_id]]
                    found[running[job_id]] = number, total + (rate if isinstance(rate, int | float) else 0.0)
        except AptJobsError:
            pass
        return found

    def _count_events(self, job_id: str, last_seq: int) -> None:
        with self._lock:
            queue, counted = self._running.get(job_id, ("", last_seq))
            if last_seq > counted:
                self._running[job_id] = queue, last_seq
                self._events.labels(queue).inc(last_seq - counted)


class _AtScrape(Collector):
    """What is read when a scrape asks."""

    def __init__(
        self,
        throughput: Callable[[], dict[str, tuple[int, float]]],
        describe_gpus: Callable[[], list[dict[str, Any]]],
    ) -> None:
        self._throughput, self._describe_gpus = throughput, describe_gpus

    def describe(self) -> list[GaugeMetricFamily]:
        """Return nothing: the registry would read all of it to learn the names."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the samples."""
        running = GaugeMetricFamily("apt_jobs_running_attempts", "Attempts that run here.", labels=("queue",))
        rate = GaugeMetricFamily(
            "apt_jobs_training_tokens_per_second", "Tokens a second that trainings here read.", labels=("queue",)
        )
        for queue, (number, tokens_per_s) in sorted(self._throughput().items()):
            running.add_metric((queue,), number)
            rate.add_metric((queue,), tokens_per_s)
        yield from (running, rate)
        readings = read_gpus([gpu["index"] for gpu in self._describe_gpus()])
        for name, (documentation, value_of) in GPU_GAUGES.items():
            family = GaugeMetricFamily(name, documentation, labels=("gpu",))
            for reading in readings:
                if (value := value_of(reading)) is not None:
                    family.add_metric((str(reading.index),), value)
            yield family


class _Server(WSGIServer):
    """One request at a time, bound without a look at the name service, which may be slow or away."""

    def server_bind(self) -> None:
        """Bind."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    """Writes no line a request, and waits for no client."""

    timeout = SLOW_CLIENT_S

    def log_message(self, format: str, *args: Any) -> None:  # its name there
        """Write nothing."""


def _num_tokens(result: dict[str, Any] | None) -> int:
    number = ((result or {}).get("usage") or {}).get("completion_tokens")
    return number if isinstance(number, int) else 0
