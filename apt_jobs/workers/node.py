"""A further node: `apt-jobs worker node --pool NAME`, or `--head NAME --node-rank 1` of one worker, on another machine.

Training workers claim jobs. A node looks into the database for an attempt that wants it, and runs its share of the
ranks for as long as the attempt owns the job. It decides nothing: it tells the head how its share goes.
When it fails, the attempt breaks, and the job is tried again.
"""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from apt_jobs import __version__
from apt_jobs.artifacts.runs import run_dir
from apt_jobs.db.engine import Database
from apt_jobs.db.gangs import share_of
from apt_jobs.db.jobs import attempts_of_owner, owns
from apt_jobs.db.service_values import get_value
from apt_jobs.db.upgrade import require_current_schema
from apt_jobs.db.workers import node_name, pause_worker, record_worker, remove_worker, require_free_name
from apt_jobs.errors import AlreadyRunning, NotFound, OutOfSpace, Unavailable, WorkerLacks
from apt_jobs.jobs.node_share import ShareState, read_share, write_share
from apt_jobs.jobs.packing import RoomReport
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.operations.data_directory import DATA_ID, why_not_usable
from apt_jobs.operations.liveness import alive_within_s
from apt_jobs.operations.secrets import read_secrets
from apt_jobs.private_files import keep_private
from apt_jobs.settings import Settings
from apt_jobs.supervision.compile_cache import prune_compile_cache
from apt_jobs.supervision.launch import require_limits, start_node, worker_marker
from apt_jobs.supervision.lease import STOP_FRACTION, boot_clock_s
from apt_jobs.supervision.machine import offered_cpus, offered_memory_gb
from apt_jobs.supervision.network import addresses_of
from apt_jobs.supervision.process_tree import adopt_orphans, clear_leftovers
from apt_jobs.workers.gpu_locks import GpuLocks
from apt_jobs.workers.gpus import describe_gpus, find_gpus

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
UNUSABLE_PAUSE_S = 10.0  # before a node looks again whether its data directory is usable


class Node:
    """One node process. All of it runs in the main thread, which torchrun's death signal is bound to."""

    def __init__(
        self,
        settings: Settings,
        *,
        gpus: Sequence[int] | None,
        head: str | None = None,
        node_rank: int = 0,
        pool: str | None = None,
        name: str | None = None,
        in_allocation: bool = False,
    ) -> None:
        """`head` and `node_rank`: of the worker that it belongs to. Or `pool` and `name`: any worker of it leads.

        `in_allocation`: another scheduler gave the GPUs, and sends SIGTERM to each process when the head is to save.
        """
        self._in_allocation = in_allocation
        self._settings, self._head, self._node_rank, self._pool = settings, head, node_rank, pool
        self._gpus, self._gpu_locks = find_gpus(gpus), GpuLocks()
        if settings.network_interface is not None:
            addresses_of(settings.network_interface)  # refuses one that this machine has not
        self._name = node_name(head, node_rank) if head is not None else name or ""
        self._database = Database(settings.database)
        self._stopping = threading.Event()
        self._served: tuple[str, int] | None = None  # the last attempt whose ranks were started here
        self._recorded_s = -settings.heartbeat_s
        self._data_id: str | None = None  # of the database; None: it has none, or it is not known yet
        self._unusable_reason: str | None = None  # as the log has it
        self._unusable_until_s = 0.0  # CLOCK_MONOTONIC: when the data directory is checked again

    def run(self) -> None:
        """Work until SIGTERM or Ctrl-C; running ranks are ended, and the head's attempt with them."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN if self._in_allocation else lambda *_: self._stopping.set())
        adopt_orphans()
        self._check()
        try:
            while not self._stopping.wait(LOOK_EVERY_S):
                self._record(None)
                if self._is_usable() and (run_file := self._look()) is not None:
                    self._serve(run_file)
        finally:
            self._forget()
            self._gpu_locks.unlock()
            self._database.dispose()

    def stop(self) -> None:
        """End the ranks, and `run`. May be called from another thread."""
        self._stopping.set()

    def _check(self) -> None:
        if not self._in_allocation:  # where indexes may be those within it
            self._gpu_locks.lock(self._settings.locks_dir, socket.gethostname(), self._gpus, self._name)
        require_current_schema(self._database)
        with self._database.write() as session:
            require_free_name(session, self._name, socket.gethostname(), alive_within_s(self._settings))
            self._recorded(session, None)
        self._clear_gpus()
        prune_compile_cache(self._settings)

    def _clear_gpus(self) -> None:
        """Ranks that did not end with their attempt or their worker would share the GPUs with the next one.

        Raises:
            Unavailable: some cannot be ended.
        """
        clear_leftovers(worker_marker(self._settings, self._name), self._settings.stop_timeout_s)

    def _is_usable(self) -> bool:
        """Return whether the data directory is the head's and has room; if not, this node's row says why it waits."""
        if time.monotonic() < self._unusable_until_s:
            return False
        try:
            if self._data_id is None:
                with self._database.read() as session:
                    self._data_id = get_value(session, DATA_ID)
            reason = why_not_usable(self._settings, self._data_id)
            if reason is not None:
                self._unusable_until_s = time.monotonic() + UNUSABLE_PAUSE_S
                with self._database.write() as session:
                    pause_worker(session, self._name, reason, UNUSABLE_PAUSE_S + LOOK_EVERY_S)
        except (Unavailable, OutOfSpace) as exc:
            logger.warning("cannot tell why this node waits", extra={"why": str(exc)})
            return False
        if reason != self._unusable_reason:
            self._unusable_reason = reason
            if reason is None:
                logger.info("taking part in jobs again")
            else:
                logger.warning("taking part in no job for now", extra={"why": reason})
        return reason is None

    def _look(self) -> RunFile | None:
        """Find an attempt that waits for this node, and which of its nodes this one is."""
        try:
            with self._database.read() as session:
                found = self._attempts(session)
        except Unavailable as exc:
            logger.warning("cannot look for work", extra={"why": str(exc)})
            return None
        for (
            job_id,
            attempt,
            node_rank,
        ) in found:  # a head may run jobs of one node beside the one of this node
            file = run_dir(self._settings, job_id, attempt) / "run.json"
            if (job_id, attempt) == self._served or not file.is_file():  # the second: it is not planned yet
                continue
            run_file = RunFile.model_validate_json(file.read_text())
            if node_rank < run_file.spec.num_nodes:
                self._node_rank = node_rank
                return run_file
        return None

    def _attempts(self, session: Session) -> list[tuple[str, int, int]]:
        """Return `(job_id, attempt, node_rank)` of what this node may take part in now."""
        if self._head is not None:
            return [(*attempt, self._node_rank) for attempt in attempts_of_owner(session, self._head)]
        share = share_of(session, self._name)
        return [] if share is None else [(share.job_id, share.attempt, share.node_rank)]

    def _serve(self, run_file: RunFile) -> None:
        self._clear_gpus()
        if not self._join(run_file):
            return
        job_id, attempt = run_file.job_id, run_file.attempt
        logger.info("joining", extra={"job_id": job_id, "attempt": attempt, "node_rank": self._node_rank})
        try:
            with self._database.read() as session:
                secrets = read_secrets(session, self._settings, run_file.spec.secrets)
            ignoring = self._in_allocation
            tree = start_node(
                self._settings, run_file, self._node_rank, self._gpus, self._name, secrets, ignore_sigterm=ignoring
            )
        except (Unavailable, NotFound, WorkerLacks) as exc:
            self._leave(run_file, str(exc))
            return
        known_s = boot_clock_s()  # when the attempt was last known to own the job
        try:
            while tree.poll() is None and not self._stopping.wait(LOOK_EVERY_S):
                self._record(job_id)
                asked_s = boot_clock_s()
                try:
                    with self._database.read() as session:
                        if not owns(session, job_id, attempt):
                            return
                    known_s = asked_s
                except Unavailable as exc:
                    logger.warning("cannot ask for the lease", extra={"job_id": job_id, "why": str(exc)})
                if boot_clock_s() - known_s > STOP_FRACTION * self._settings.lease_s:
                    return
        finally:
            status = tree.poll()
            tree.terminate(self._settings.stop_timeout_s)
            ended = "its ranks were ended" if status is None else f"torchrun ended with status {status}"
            self._leave(run_file, None if status == 0 else ended)

    def _join(self, run_file: RunFile) -> bool:
        """Return whether this process does the node's share. Ranks cannot join an attempt twice."""
        try:
            share = read_share(run_file, self._node_rank)
            if share is None:
                write_share(run_file, self._node_rank, ShareState.JOINED)
            elif share.state is ShareState.JOINED:
                write_share(run_file, self._node_rank, ShareState.ENDED_EARLY, "its process was started again")
        except (OSError, ValueError) as exc:
            logger.warning("cannot join", extra={"job_id": run_file.job_id, "why": str(exc)})
            return False
        self._served = run_file.job_id, run_file.attempt
        return share is None

    def _leave(self, run_file: RunFile, ended_early: str | None) -> None:
        state = ShareState.FINISHED if ended_early is None else ShareState.ENDED_EARLY
        logger.info("left", extra={"job_id": run_file.job_id, "attempt": run_file.attempt, "how": ended_early or state})
        try:
            write_share(run_file, self._node_rank, state, ended_early)
        except OSError as exc:
            logger.warning("cannot say how it went", extra={"job_id": run_file.job_id, "why": str(exc)})

    def _record(self, job_id: str | None) -> None:
        if time.monotonic() - self._recorded_s < self._settings.heartbeat_s:
            return
        try:
            with self._database.write() as session:
                self._recorded(session, job_id)
            self._recorded_s = time.monotonic()
        except (Unavailable, OutOfSpace, AlreadyRunning) as exc:
            logger.warning("cannot record this node", extra={"why": str(exc)})

    def _recorded(self, session: Session, job_id: str | None) -> None:
        record_worker(
            session,
            name=self._name,
            kind="node",
            queues=[],
            hostname=socket.gethostname(),
            pid=os.getpid(),
            version=__version__,
            gpus=describe_gpus(self._gpus, self._settings.gpu_memory_fractions),
            current_job_id=job_id,
            room=self._room() if self._pool is not None else None,
            pool=self._pool,
        )

    def _room(self) -> dict[str, Any]:
        """Return what a gang of the pool finds here. It takes part in one attempt at a time."""
        settings = self._settings
        cpus, memory_gb = offered_cpus(settings), offered_memory_gb(settings)
        return RoomReport(cpus, memory_gb, 1, settings.max_cpu_ranks, num_nodes=1, jobs=()).as_document()

    def _forget(self) -> None:
        try:
            with self._database.write() as session:
                remove_worker(session, self._name)
        except (Unavailable, OutOfSpace) as exc:
            logger.warning("cannot remove this node", extra={"why": str(exc)})


def run_node(settings: Settings, *, head: str, node_rank: int, gpus: Sequence[int] | None) -> None:
    """Entry of the process of a node of one worker. `gpus=None`: all of this machine."""
    require_limits(settings)
    keep_private(settings.root)
    Node(settings, head=head, node_rank=node_rank, gpus=gpus).run()


def run_pool_node(settings: Settings, *, pool: str, name: str, gpus: Sequence[int] | None) -> None:
    """Entry of the process of a node that any worker of a pool may lead. `gpus=None`: all of this machine."""
    require_limits(settings)
    keep_private(settings.root)
    Node(settings, pool=pool, name=name, gpus=gpus).run()
