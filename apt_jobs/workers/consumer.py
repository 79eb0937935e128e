"""What both kinds of worker are: a Celery worker with a pool of threads, which claims jobs from the database.

Celery wakes it; the database says what to do. The main thread stays free for signals: SIGTERM drains.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from celery import signals
from celery.worker import WorkController
from sqlalchemy.orm import Session

from apt_jobs import __version__
from apt_jobs.db.dispatch import send_hints_again
from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import Claimed, claim_next
from apt_jobs.db.upgrade import require_current_schema
from apt_jobs.db.workers import record_worker, remove_worker, require_free_name
from apt_jobs.errors import AlreadyRunning, AptJobsError, OutOfSpace, Unavailable
from apt_jobs.events.live import LivePublisher
from apt_jobs.job_queue import HintPublisher, broker_queue, make_celery, serve_hints
from apt_jobs.settings import Settings

logger = logging.getLogger(__name__)

HAND_ON_PAUSE_S = 1.0  # a drained worker that is alone would get its hint back at once


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
        on_resume: Callable[[], None] = lambda: None,
        describe_gpus: Callable[[], list[dict[str, Any]]],
    ) -> None:
        self.settings, self.name, self.kind, self.queues = settings, name, kind, list(queues)
        self.database = Database(settings.database)
        self.publisher = LivePublisher(settings.redis)
        self.draining = threading.Event()
        self._concurrency, self._serve, self._describe_gpus = concurrency, serve, describe_gpus
        self._on_drain, self._on_resume = on_drain, on_resume
        self._stopping = False  # this process ends: no way back from this draining
        self._current: set[str] = set()  # job ids
        self._closed = threading.Event()

    def run(self, prepare: Callable[[], None] = lambda: None) -> None:
        """Work until SIGTERM or Ctrl-C; running jobs are told to stop through `on_drain`. `prepare` is called once the
        name is known to be free, before the first job.

        Raises:
            Unavailable: the database does not answer, or has the schema of another version.
            AlreadyRunning: another worker has this name.
        """
        self._check()
        prepare()
        app = make_celery(self.settings)
        hints = HintPublisher(app)
        serve_hints(app, lambda queue: self._hand_on(hints, queue) if self.draining.is_set() else self._look())
        signals.worker_shutting_down.connect(self._stop)
        self._ask_for_hints()  # an earlier process may have died with one in its hands
        recorder = threading.Thread(target=self._keep_recording, name="recorder", daemon=True)
        recorder.start()
        try:
            worker: WorkController = app.Worker(
                hostname=f"{self.name}@{socket.gethostname()}",
                pool_cls="threads",
                concurrency=self._concurrency,
                queues=[broker_queue(queue) for queue in self.queues],
                without_gossip=True,
                without_mingle=True,
                without_heartbeat=True,
                loglevel=self.settings.log_level,
                quiet=True,
            )
            worker.start()
            if worker.exitcode and not self._stopping:
                raise Unavailable("Celery's worker ended by itself; its log says why")
        finally:
            self._closed.set()
            recorder.join()
            self._forget()
            self.publisher.close()
            self.database.dispose()
            hints.close()

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

    def _hand_on(self, hints: HintPublisher, queue: str) -> None:
        """A drained worker leaves a hint to others of its queue: the next one is sent after half a minute only."""
        if not self._stopping:
            time.sleep(HAND_ON_PAUSE_S)
        try:
            hints.publish("", queue)  # whose it was does not matter: a hint says no more than "look"
        except Unavailable as exc:
            logger.warning("a hint comes later", extra={"queue": queue, "why": str(exc)})

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

    def _stop(self, **_: object) -> None:
        self._stopping = True
        self._drain()

    def _drain(self) -> None:
        if not self.draining.is_set():
            self.draining.set()
            self._on_drain()

    def _resume(self) -> None:
        """Claim again. Hints that came meanwhile are spent: have them sent again."""
        logger.info("claiming jobs again")
        self._on_resume()
        self.draining.clear()
        self._ask_for_hints()

    def _ask_for_hints(self) -> None:
        """Have those of the jobs that wait now sent again."""
        try:
            with self.database.write() as session:
                send_hints_again(session, self.queues)
        except (Unavailable, OutOfSpace) as exc:
            logger.warning("hints come later", extra={"why": str(exc)})

    def _check(self) -> None:
        require_current_schema(self.database)
        with self.database.write() as session:
            require_free_name(session, self.name, socket.gethostname(), 3 * self.settings.heartbeat_s)
            self._recorded(session)

    def _keep_recording(self) -> None:
        while not self._closed.wait(self.settings.heartbeat_s):
            self._record()

    def _record(self) -> None:
        try:
            with self.database.write() as session:
                drain = self._recorded(session)
        except (Unavailable, OutOfSpace, AlreadyRunning) as exc:
            logger.warning("cannot record this worker", extra={"why": str(exc)})
            return
        if drain and not self.draining.is_set():
            logger.info("drained by a user")
            self._drain()
        elif not drain and self.draining.is_set() and not self._stopping:
            self._resume()

    def _recorded(self, session: Session) -> bool:
        """Whether somebody asked to drain this worker, whose row is then as of now."""
        return record_worker(
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

    def _forget(self) -> None:
        try:
            with self.database.write() as session:
                remove_worker(session, self.name)
        except (Unavailable, OutOfSpace) as exc:
            logger.warning("cannot remove this worker", extra={"why": str(exc)})
