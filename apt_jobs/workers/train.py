"""The training worker: claims training jobs that fit beside each other and starts a supervisor for each. No torch here.

A job has a supervisor, GPUs and a lease of its own: what becomes of it is nothing to its neighbours. What it holds is
given to the next one when none of its processes is left.
"""

import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from apt_jobs.db.jobs import Claimed, finish_faulted, owns
from apt_jobs.errors import Fenced, Unavailable
from apt_jobs.jobs.packing import Held, Offer, gpus_of
from apt_jobs.jobs.retry import Fault, retry_rules
from apt_jobs.private_files import keep_private
from apt_jobs.settings import Settings
from apt_jobs.supervision.compile_cache import prune_compile_cache
from apt_jobs.supervision.launch import require_limits, worker_marker
from apt_jobs.supervision.lease import kept_until_first_beat
from apt_jobs.supervision.machine import offered_cpus, offered_memory_gb
from apt_jobs.supervision.network import listen_address
from apt_jobs.supervision.process_tree import KILL_TIMEOUT_S, MARKER, clear_leftovers, kill_marked
from apt_jobs.workers.consumer import Consumer
from apt_jobs.workers.gpu_locks import GpuLocks
from apt_jobs.workers.gpus import describe_gpus, find_gpus
from apt_jobs.workers.packer import AttemptId, Packer

logger = logging.getLogger(__name__)


class TrainWorker:
    """Runs supervisors, each in a session of its own with a pipe to its stdin that ends when this process does."""

    def __init__(
        self,
        settings: Settings,
        *,
        name: str,
        queues: Sequence[str],
        gpus: Sequence[int] | None,
        num_nodes: int,
        pool: str | None = None,
        metrics_port: int | None = None,
    ) -> None:
        self._settings, self._name, self._num_nodes = settings, name, num_nodes
        self._gpus, self._gpu_locks = find_gpus(gpus), GpuLocks()
        if num_nodes > 1 or pool is not None:
            listen_address(settings)  # refuses an address or interface that this machine has not
        self._lock = threading.Lock()
        self._supervisors: dict[AttemptId, subprocess.Popen[str]] = {}
        self._packer = Packer(settings, self._offer(), name=name, kind="train", pool=pool)
        self._consumer = Consumer(
            settings,
            name=name,
            kind="train",
            queues=queues,
            concurrency=self._packer.max_jobs,
            serve=self._serve,
            on_drain=self._drain,
            describe_gpus=self._describe_gpus,
            packer=self._packer,
            pool=pool,
            metrics_port=metrics_port,
        )

    def _offer(self) -> Offer:
        settings = self._settings
        return Offer(
            gpus=gpus_of(self._describe_gpus()),
            cpus=offered_cpus(settings),
            memory_gb=offered_memory_gb(settings),
            max_jobs=settings.max_jobs_per_worker,
            max_cpu_ranks=settings.max_cpu_ranks,
            num_nodes=self._num_nodes,
        )

    def _describe_gpus(self) -> list[dict[str, Any]]:
        return describe_gpus(self._gpus, self._settings.gpu_memory_fractions)

    def run(self) -> None:
        """Work until SIGTERM or Ctrl-C.

        Raises:
            Unavailable, AlreadyRunning: as `Consumer.run`; also if another worker uses one of the GPUs.
        """
        self._gpu_locks.lock(self._settings.locks_dir, socket.gethostname(), self._gpus, self._name)
        try:
            self._consumer.run(self._prepare)
        finally:  # after the last job
            self._gpu_locks.unlock()

    def _prepare(self) -> None:
        """Ranks of an earlier process of this worker would share its GPUs with the first jobs."""
        marker = worker_marker(self._settings, self._name)
        if num_left := clear_leftovers(marker, self._settings.stop_timeout_s):
            logger.warning("ended ranks that were left", extra={"count": num_left})
        prune_compile_cache(self._settings)

    def _serve(self, group: Sequence[Claimed]) -> None:
        [claimed] = group  # each slot serves one job
        job = claimed.job
        attempt = (job.id, job.attempt)
        try:
            self._consumer.publisher.publish(job.id, [claimed.event])
            supervisor = self._start(attempt)
            if self._consumer.draining.is_set():
                self._drain()
            status = self._wait_for(supervisor, attempt)
            with self._lock:
                assert supervisor.stdin is not None
                supervisor.stdin.close()
                del self._supervisors[attempt]
            if status != 0:
                self._end_for_the_supervisor(attempt, status)
        finally:
            self._clear(attempt)
            self._packer.release(attempt)
            self._consumer.room_changed()

    def _start(self, attempt: AttemptId) -> "subprocess.Popen[str]":
        (job_id, number), held = attempt, self._packer.held_by(attempt)
        database, settings = self._consumer.database, self._settings
        with self._lock, kept_until_first_beat(database, settings, job_id, number) as beating_fd:
            supervisor = subprocess.Popen(
                [*self._command(attempt, held), f"--beating-fd={beating_fd}"],
                stdin=subprocess.PIPE,
                text=True,
                start_new_session=True,
                pass_fds=[beating_fd],
            )
            self._supervisors[attempt] = supervisor
        return supervisor

    def _command(self, attempt: AttemptId, held: Held) -> list[str]:
        job_id, number = attempt
        return [
            *(sys.executable, "-m", "apt_jobs.supervision.supervise"),
            f"--job-id={job_id}",
            f"--attempt={number}",
            f"--gpus={','.join(map(str, held.gpus))}",
            f"--threads-per-rank={held.threads_per_rank}",
            f"--num-nodes={max(self._num_nodes, held.num_nodes)}",
            f"--worker-name={self._name}",
        ]

    def _wait_for(self, supervisor: "subprocess.Popen[str]", attempt: AttemptId) -> int:
        """Wait for the supervisor to end. One that is frozen when its lease is over would hold its share for good."""
        lost_at_s: float | None = None
        while True:
            try:
                return supervisor.wait(self._settings.heartbeat_s)
            except subprocess.TimeoutExpired:
                pass
            if self._may_own(attempt):
                lost_at_s = None
            elif lost_at_s is None:
                lost_at_s = time.monotonic()
            elif time.monotonic() - lost_at_s > self._settings.lease_s + KILL_TIMEOUT_S:  # it had time to end its ranks
                logger.error("the supervisor does not end; killing it", extra={"job_id": attempt[0]})
                supervisor.kill()

    def _may_own(self, attempt: AttemptId) -> bool:
        try:
            with self._consumer.database.read() as session:
                return owns(session, *attempt)
        except Unavailable:
            return True  # the supervisor itself counts the time without the database

    def _clear(self, attempt: AttemptId) -> None:
        """End what is left of an attempt: it would share cores and GPUs with the next one. What hangs keeps its share.

        The rest of the worker goes on meanwhile.
        """
        marker = f"{attempt[0]}:{attempt[1]}"
        while not self._consumer.is_stopping:
            try:
                if num_left := clear_leftovers(marker, self._settings.stop_timeout_s, MARKER):
                    logger.warning("ended ranks that were left", extra={"count": num_left})
                return
            except Unavailable as exc:
                logger.error("a job's share stays taken", extra={"job_id": attempt[0], "why": str(exc)})

    def _end_for_the_supervisor(self, attempt: AttemptId, status: int) -> None:
        """Clear what a supervisor left that died before it could report, and hand the job back at once."""
        job_id, number = attempt
        kill_marked(f"{job_id}:{number}")
        why = f"the supervisor ended with status {status}"
        try:
            with self._consumer.database.write() as session:
                events = finish_faulted(
                    session,
                    job_id,
                    number,
                    why,
                    fault=Fault.INFRASTRUCTURE,
                    rules=retry_rules(self._settings),
                )
        except Fenced:
            return  # it had reported, or the lease is over
        self._consumer.publisher.publish(job_id, events)

    def _drain(self) -> None:
        """Ask every job to save and stop."""
        with self._lock:
            for attempt, supervisor in self._supervisors.items():
                if supervisor.stdin is None or supervisor.poll() is not None:
                    continue
                try:
                    supervisor.stdin.write("drain\n")
                    supervisor.stdin.flush()
                except BrokenPipeError:
                    logger.warning("the supervisor ended while it was drained", extra={"job_id": attempt[0]})


def run_train_worker(
    settings: Settings,
    *,
    name: str,
    queues: Sequence[str],
    gpus: Sequence[int] | None,
    num_nodes: int,
    pool: str | None = None,
    metrics_port: int | None = None,
) -> None:
    """Entry of the process. `gpus=None`: all of this machine. `num_nodes`: with those of `apt-jobs worker node`."""
    require_limits(settings)
    keep_private(settings.root)
    TrainWorker(
        settings, name=name, queues=queues, gpus=gpus, num_nodes=num_nodes, pool=pool, metrics_port=metrics_port
    ).run()
