"""What both kinds of worker are: a Celery worker with a pool of threads, which claims jobs from the database.

Celery wakes it; the database says what to do. The main thread stays free for signals: SIGTERM drains.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from celery import signals
from celery.worker import WorkController

from apt_jobs import __version__
from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import Claimed, claim_next
from apt_jobs.db.workers import record_worker, remove_worker
from apt_jobs.errors import AptJobsError, OutOfSpace, Unavailable
from apt_jobs.events.live import LivePublisher
from apt_jobs.job_queue import make_celery, serve_hints
from apt_jobs.settings import Settings

logger = logging.getLogger(__name__)


class Consumer:
    """One worker process. `serve` carries a claimed job to its end and must not raise for the job's own faults."""

    def __init__(
        self,
        settings: Settings,
        *,
        name: str,
        kind: str,
        queues: Sequence[str],
        concurrency: int,
        serve: Callable[[Claimed], None],
        on_drain: Callable[[], None],
        describe_gpus: Callable[[], list[dict[str, Any]]],
    ) -> None:
        self.settings, self.name, self.kind, self.queues = settings, name, kind, list(queues)
        self.database = Database(settings.database)
        self.publisher = LivePublisher(settings.redis)
        self.draining = threading.Event()
        self._concurrency, self._serve, self._on_drain, self._describe_gpus = (
            concurrency,
            serve,
            on_drain,
            describe_gpus,
        )
        self._current: set[str] = set()  # job ids
        self._closed = threading.Event()

    def run(self) -> None:
        """Work until SIGTERM or Ctrl-C; running jobs are told to stop through `on_drain`."""
        app = make_celery(self.settings)
        serve_hints(app, self._look)
        signals.worker_shutting_down.connect(self._drain)
        self._record()
        recorder = threading.Thread(target=self._keep_recording, name="recorder", daemon=True)
        recorder.start()
        try:
            worker: WorkController = app.Worker(
                hostname=f"{self.name}@{socket.gethostname()}",
                pool_cls="threads",
                concurrency=self._concurrency,
                queues=self.queues,
                without_gossip=True,
                without_mingle=True,
                without_heartbeat=True,
                loglevel=self.settings.log_level,
                quiet=True,
            )
            worker.start()
        finally:
            self._closed.set()
            recorder.join()
            self._forget()
            self.publisher.close()
            self.database.dispose()
            app.close()

    def _look(self) -> None:
        """Serve what waits, one after another: a hint may stand for several jobs whose own were lost."""
        while not self.draining.is_set():
            claimed = self._claim()
            if claimed is None:
                return
            self._current.add(claimed.job.id)
            try:
                self.publisher.publish(claimed.job.id, [claimed.event])
                self._serve(claimed)
            except AptJobsError:
                logger.exception("serving a job broke", extra={"job_id": claimed.job.id})
            finally:
                self._current.discard(claimed.job.id)

    def _claim(self) -> Claimed | None:
        for queue in self.queues:
            try:
                with self.database.write() as session:
                    claimed = claim_next(session, queue, self.name, self.settings.lease_s)
            except (Unavailable, OutOfSpace) as exc:
                logger.warning("cannot claim", extra={"queue": queue, "why": str(exc)})
                return None
            if claimed is not None:
                return claimed
        return None

    def _drain(self, **_: object) -> None:
        if not self.draining.is_set():
            self.draining.set()
            self._on_drain()

    def _keep_recording(self) -> None:
        while not self._closed.wait(self.settings.heartbeat_s):
            self._record()

    def _record(self) -> None:
        try:
            with self.database.write() as session:
                record_worker(
                    session,
                    name=self.name,
                    kind=self.kind,
                    queues=self.queues,
                    hostname=socket.gethostname(),
                    pid=os.getpid(),
                    version=__version__,
                    gpus=self._describe_gpus(),
                    current_job_id=next(iter(self._current), None),
                )
        except (Unavailable, OutOfSpace) as exc:
            logger.warning("cannot record this worker", extra={"why": str(exc)})

    def _forget(self) -> None:
        try:
            with self.database.write() as session:
                remove_worker(session, self.name)
        except (Unavailable, OutOfSpace) as exc:
            logger.warning("cannot remove this worker", extra={"why": str(exc)})
