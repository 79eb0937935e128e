"""What both kinds of worker are: a Celery worker with a pool of threads, which claims jobs from the database.

Celery wakes it, and it looks by itself every few seconds; the database says what to do. The main thread stays free for
signals: SIGTERM drains.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

from celery import signals
from celery.worker import WorkController
from sqlalchemy.orm import Session

from apt_jobs import __version__
from apt_jobs.db.engine import Database
from apt_jobs.db.job_groups import claim_due
from apt_jobs.db.jobs import Claimed, claim_next, due_jobs
from apt_jobs.db.service_values import get_value
from apt_jobs.db.upgrade import require_current_schema
from apt_jobs.db.workers import pause_of, pause_worker, record_worker, remove_worker, require_free_name
from apt_jobs.errors import AlreadyRunning, AptJobsError, OutOfSpace, Unavailable
from apt_jobs.events.live import LivePublisher
from apt_jobs.job_queue import WakeUpGate, WakeUpPublisher, broker_queue, celery_slot, make_celery, serve_wake_ups
from apt_jobs.jobs.spec import CODE_ENTRY_POINT
from apt_jobs.operations.data_directory import DATA_ID, why_not_usable
from apt_jobs.operations.liveness import alive_within_s
from apt_jobs.settings import Settings
from apt_jobs.workers.metrics import WorkerMetrics
from apt_jobs.workers.packer import Packer

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 3.0  # between two looks for due jobs that no wake-up told of
FORWARD_WAIT_S = 1.0  # a drained worker that is alone would get its wake-up back at once
UNUSABLE_PAUSE_S = 10.0  # before a worker looks again whether its data directory is usable


class Consumer:
    """One worker process. `serve` carries claimed jobs to their ends and must not raise for a job's own faults.

    `group_size`: at most so many jobs are claimed and served together. `serve` publishes the events of its claims.
    `packer`: claims only what fits; `serve` releases what a job held, and calls `room_changed`.
    `why_unusable`: why this worker claims nothing for now, beside what is wrong with its data directory.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        name: str,
        kind: str,
        queues: Sequence[str],
        concurrency: int,
        serve: Callable[[Sequence[Claimed]], None],
        group_size: int = 1,
        on_drain: Callable[[], None],
        on_resume: Callable[[], None] = lambda: None,
        describe_gpus: Callable[[], list[dict[str, Any]]],
        warm_models: Callable[[], list[str] | None] = lambda: None,
        packer: Packer | None = None,
        pool: str | None = None,
        why_unusable: Callable[[], str | None] = lambda: None,
        metrics_port: int | None = None,
    ) -> None:
        self.settings, self.name, self.kind, self.queues = settings, name, kind, list(queues)
        self._pool, self._why_unusable = pool, why_unusable
        self.database = Database(settings.database)
        self.publisher = LivePublisher(settings.redis)
        self._metrics = None if metrics_port is None else WorkerMetrics(self.database, metrics_port)
        self.draining = threading.Event()
        self._concurrency, self._serve, self._describe_gpus = concurrency, serve, describe_gpus
        self._warm_models = warm_models
        self._on_drain, self._on_resume, self._group_size = on_drain, on_resume, group_size
        self._packer, self._gate = packer, WakeUpGate(concurrency)
        self._stopping = False  # this process ends: no way back from this draining
        self._current: set[str] = set()  # job ids
        self._closed, self._look_now, self._record_now = threading.Event(), threading.Event(), threading.Event()
        self._slots = threading.BoundedSemaphore(concurrency)
        self._servers: list[threading.Thread] = []
        self._to_forward: SimpleQueue[str | None] = SimpleQueue()  # queues to wake another worker of
        self._data_id: str | None = None  # of the database; None: it has none, or it is not known yet
        self._paused_reason: str | None = None  # as the log has it

    def run(self, prepare: Callable[[], None] = lambda: None) -> None:
        """Work until SIGTERM or Ctrl-C; running jobs are asked to stop through `on_drain`.

        Args:
            prepare: called once the name is known to be free, before the first job.

        Raises:
            Unavailable: the database does not answer, or has the schema of another version.
            AlreadyRunning: another worker has this name, or the port for metrics is in use.
        """
        self._check()
        prepare()
        app = make_celery(self.settings)
        wake_ups = WakeUpPublisher(app)
        serve_wake_ups(app, self._on_wake_up)
        signals.worker_shutting_down.connect(self._stop)
        threads = [
            threading.Thread(target=self._record_loop, name="recorder", daemon=True),
            threading.Thread(target=self._look_loop, name="looker", daemon=True),
            threading.Thread(target=self._forward_loop, args=(wake_ups,), name="forwarder", daemon=True),
        ]
        for thread in threads:
            thread.start()
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
            self._end_of_work()
            self._closed.set()
            self._record_now.set()
            self._to_forward.put(None)
            for thread in threads:
                thread.join()
            self._forget()
            self.publisher.close()
            self.database.dispose()
            wake_ups.close()

    def _on_wake_up(self, queue: str) -> None:
        """Run in a thread of Celery's pool."""
        if self.draining.is_set():
            if not self._stopping:
                time.sleep(FORWARD_WAIT_S)
            self._to_forward.put(queue)  # to another worker of the queue
            return
        if self._slots.acquire(blocking=False):
            try:
                self._serve_due()
            finally:
                self._slots.release()

    def _look_loop(self) -> None:
        """Look for due jobs every few seconds: a wake-up may be lost, a back-off end, the broker be away."""
        while not self._closed.is_set():
            if not self.draining.is_set() and self._slots.acquire(blocking=False):
                if self.is_usable() and self._has_due():
                    self._start_serving()
                else:
                    self._slots.release()
            self._look_now.wait(LOOK_EVERY_S)
            self._look_now.clear()

    def _start_serving(self) -> None:
        """Serve what is due in a thread of its own, which holds a slot already."""

        def serve() -> None:
            try:
                with celery_slot():
                    self._serve_due()
            finally:
                self._slots.release()

        self.start_thread(serve)

    def start_thread(self, work: Callable[[], None]) -> None:
        """Serve something in a thread that is waited for when this worker ends."""
        thread = threading.Thread(target=work, name="server")
        self._servers = [server for server in self._servers if server.is_alive()] + [thread]
        thread.start()

    def _end_of_work(self) -> None:
        """Wait for jobs that no wake-up began; Celery waits for the others."""
        self._drain()
        for thread in self._servers:
            thread.join()

    def _forward_loop(self, wake_ups: WakeUpPublisher) -> None:
        """Send wake-ups, in a thread of its own: a frozen broker holds up no job."""
        while (queue := self._to_forward.get()) is not None:
            try:
                wake_ups.wake_up(queue)
            except Unavailable as exc:
                logger.warning("a wake-up is lost; workers look by themselves", extra={"queue": queue, "why": str(exc)})

    def _serve_due(self) -> None:
        """Serve what is due, one job after another: a wake-up stands for all jobs of its queue."""
        is_first = True
        while not self.draining.is_set() and self.is_usable() and (is_first or self._has_due()):
            is_first = False
            group = self._claim()
            if not group:
                return
            job_ids = [claimed.job.id for claimed in group]
            self._current.update(job_ids)
            if self._metrics is not None:
                self._metrics.note_claimed(group)
            try:
                self._serve(group)
            except AptJobsError:
                logger.exception("serving jobs broke", extra={"job_ids": job_ids})
            finally:
                self._current.difference_update(job_ids)
                if self._metrics is not None:
                    self._metrics.note_served(group)

    @property
    def is_stopping(self) -> bool:
        """Whether this process ends."""
        return self._stopping

    def record_soon(self) -> None:
        """Refresh this worker's row without waiting for its next heartbeat."""
        self._record_now.set()

    def room_changed(self) -> None:
        """Note that a job began or has ended on a worker that packs: its row says so, and the next one may fit."""
        assert self._packer is not None
        self._gate.set_closed(is_closed=self._packer.is_full)
        self._record_now.set()
        self._look_now.set()

    def _claim(self) -> list[Claimed]:
        return self._claim_group() if self._packer is None else self._claim_fitting(self._packer)

    def _claim_fitting(self, packer: Packer) -> list[Claimed]:
        try:
            claimed = packer.claim(self.database, self.queues, self.settings.lease_s)
        except (Unavailable, OutOfSpace) as exc:
            logger.warning("cannot claim", extra={"queues": self.queues, "why": str(exc)})
            return []
        if claimed is None:
            return []
        self.room_changed()  # for another slot of this one
        try:
            with self.database.read() as session:
                for queue in [queue for queue in self.queues if self._is_due(session, queue)]:
                    self._to_forward.put(queue)  # for another worker
        except Unavailable as exc:
            logger.warning("no other worker is woken; they look by themselves", extra={"why": str(exc)})
        return [claimed]

    def _claim_group(self) -> list[Claimed]:
        group: list[Claimed] = []
        for queue in self.queues:
            try:
                with self.database.write() as session:
                    found = self._claim_from(session, queue, self._group_size - len(group))
                    is_more = bool(found) and self._is_due(session, queue)
            except (Unavailable, OutOfSpace) as exc:
                logger.warning("cannot claim", extra={"queue": queue, "why": str(exc)})
                break
            if is_more:
                self._to_forward.put(queue)  # for the next idle worker, or another slot of this one
            group += found
            if len(group) >= self._group_size:
                break
        return group

    def _claim_from(self, session: Session, queue: str, limit: int) -> list[Claimed]:
        lease_s = self.settings.lease_s
        if limit > 1 and (group := claim_due(session, queue, self.name, lease_s, self.kind, limit)):
            return group
        claimed = claim_next(session, queue, self.name, lease_s, self.kind)
        return [] if claimed is None else [claimed]

    def _has_due(self) -> bool:
        """Look without a write transaction: most looks find nothing."""
        try:
            with self.database.read() as session:
                self._log_pause(pause_of(session, self.name))
                if self._packer is not None:
                    return self._packer.has_startable(session, self.queues)
                return any(self._is_due(session, queue) for queue in self.queues)
        except Unavailable as exc:
            logger.warning("cannot look for work", extra={"why": str(exc)})
            return False

    def _is_due(self, session: Session, queue: str) -> bool:
        return session.scalar(due_jobs(queue, self.name, self.kind).limit(1)) is not None

    def is_usable(self) -> bool:
        """Return whether the data directory is the right one and has room; if not, note why in the worker's row."""
        try:
            if self._data_id is None:
                with self.database.read() as session:
                    self._data_id = get_value(session, DATA_ID)
            reason = why_not_usable(self.settings, self._data_id) or self._why_unusable()
            if reason is not None:
                with self.database.write() as session:
                    pause_worker(session, self.name, reason, UNUSABLE_PAUSE_S)
                self._log_pause(reason)
        except (Unavailable, OutOfSpace) as exc:
            logger.warning("cannot tell why this worker waits", extra={"why": str(exc)})
            return False
        return reason is None

    def _log_pause(self, reason: str | None) -> None:
        if reason != self._paused_reason:
            self._paused_reason = reason
            if reason is None:
                logger.info("claiming jobs again")
            else:
                logger.warning("claiming no jobs for now", extra={"why": reason})

    def _stop(self, **_: object) -> None:
        self._stopping = True
        self._drain()

    def _drain(self) -> None:
        if not self.draining.is_set():
            self.draining.set()
            self._on_drain()

    def _resume(self) -> None:
        """Claim again, at once."""
        logger.info("claiming jobs again")
        self._on_resume()
        self.draining.clear()
        self._look_now.set()

    def _check(self) -> None:
        require_current_schema(self.database)
        with self.database.write() as session:
            require_free_name(session, self.name, socket.gethostname(), alive_within_s(self.settings))
            self._recorded(session)
        if self._metrics is not None:
            self._metrics.serve(self.settings.metrics_host, self._describe_gpus)

    def _record_loop(self) -> None:
        while not self._closed.is_set():
            self._record_now.wait(self.settings.heartbeat_s)
            self._record_now.clear()
            if not self._closed.is_set():
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
        """Return whether somebody asked to drain this worker, whose row is then as of now."""
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
            entry_points=sorted(
                [*self.settings.entry_points, *([CODE_ENTRY_POINT] if self.settings.code_role else [])]
            ),
            warm_models=self._warm_models(),
            room=None if self._packer is None else self._packer.report(),
            pool=self._pool,
        )

    def _forget(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
        try:
            with self.database.write() as session:
                remove_worker(session, self.name)
        except (Unavailable, OutOfSpace) as exc:
            logger.warning("cannot remove this worker", extra={"why": str(exc)})
