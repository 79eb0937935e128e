"""The training worker: claims a training job and starts a supervisor for it. One job at a time, no torch in here."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence

from apt_jobs.db.jobs import Claimed, finish_faulted
from apt_jobs.errors import Fenced, Unavailable
from apt_jobs.jobs.retry import Fault, retry_rules
from apt_jobs.private_files import keep_private
from apt_jobs.settings import Settings
from apt_jobs.supervision.compile_cache import prune_compile_cache
from apt_jobs.supervision.launch import worker_marker
from apt_jobs.supervision.lease import kept_until_first_beat
from apt_jobs.supervision.network import listen_address
from apt_jobs.supervision.process_tree import clear_leftovers, kill_marked
from apt_jobs.workers.consumer import Consumer
from apt_jobs.workers.gpu_locks import GpuLocks
from apt_jobs.workers.gpus import describe_gpus, find_gpus

logger = logging.getLogger(__name__)


class TrainWorker:
    """Runs supervisors, each in a session of its own with a pipe to its stdin that ends when this process does."""

    def __init__(
        self, settings: Settings, *, name: str, queues: Sequence[str], gpus: Sequence[int] | None, num_nodes: int
    ) -> None:
        self._settings, self._name, self._num_nodes = settings, name, num_nodes
        self._gpus, self._gpu_locks = find_gpus(gpus), GpuLocks()
        if num_nodes > 1:
            listen_address(settings)  # refuses an address or interface that this machine has not
        self._lock = threading.Lock()
        self._supervisor: subprocess.Popen[str] | None = None
        self._consumer = Consumer(
            settings,
            name=name,
            kind="train",
            queues=queues,
            concurrency=1,
            serve=self._serve,
            on_drain=self._drain,
            describe_gpus=lambda: describe_gpus(self._gpus),
        )

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
        self._clear_gpus()
        prune_compile_cache(self._settings)

    def _clear_gpus(self) -> None:
        """Ranks that did not end with their job or their worker would share the GPUs with the next one."""
        marker = worker_marker(self._settings, self._name)
        if num_left := clear_leftovers(marker, self._settings.stop_timeout_s):
            logger.warning("ended ranks that were left", extra={"count": num_left})

    def _serve(self, group: Sequence[Claimed]) -> None:
        [claimed] = group  # one job at a time
        job = claimed.job
        self._consumer.publisher.publish(job.id, [claimed.event])
        command = [
            *(sys.executable, "-m", "apt_jobs.supervision.supervise"),
            f"--job-id={job.id}",
            f"--attempt={job.attempt}",
            f"--gpus={','.join(map(str, self._gpus))}",
            f"--num-nodes={self._num_nodes}",
            f"--worker-name={self._name}",
        ]
        database, settings = self._consumer.database, self._settings
        with self._lock, kept_until_first_beat(database, settings, job.id, job.attempt) as beating_fd:
            self._supervisor = subprocess.Popen(
                [*command, f"--beating-fd={beating_fd}"],
                stdin=subprocess.PIPE,
                text=True,
                start_new_session=True,
                pass_fds=[beating_fd],
            )
        if self._consumer.draining.is_set():
            self._drain()
        status = self._supervisor.wait()
        with self._lock:
            assert self._supervisor.stdin is not None
            self._supervisor.stdin.close()
            self._supervisor = None
        if status != 0:
            self._end_for_the_supervisor(job.id, job.attempt, status)
        try:
            self._clear_gpus()
        except Unavailable:
            logger.exception("this worker cannot go on")
            os.kill(os.getpid(), signal.SIGTERM)

    def _end_for_the_supervisor(self, job_id: str, attempt: int, status: int) -> None:
        """Clear what a supervisor left that died before it could report, and hand the job back at once."""
        kill_marked(f"{job_id}:{attempt}")
        why = f"the supervisor ended with status {status}"
        try:
            with self._consumer.database.write() as session:
                events = finish_faulted(
                    session,
                    job_id,
                    attempt,
                    why,
                    fault=Fault.INFRASTRUCTURE,
                    rules=retry_rules(self._settings),
                )
        except Fenced:
            return  # it had reported, or the lease is over
        self._consumer.publisher.publish(job_id, events)

    def _drain(self) -> None:
        with self._lock:
            supervisor = self._supervisor
            if supervisor is None or supervisor.stdin is None or supervisor.poll() is not None:
                return
            try:
                supervisor.stdin.write("drain\n")
                supervisor.stdin.flush()
            except BrokenPipeError:
                logger.warning("the supervisor ended while it was drained")


def run_train_worker(
    settings: Settings, *, name: str, queues: Sequence[str], gpus: Sequence[int] | None, num_nodes: int
) -> None:
    """Entry of the process. `gpus=None`: all of this machine. `num_nodes`: with those of `apt-jobs worker node`."""
    keep_private(settings.root)
    TrainWorker(settings, name=name, queues=queues, gpus=gpus, num_nodes=num_nodes).run()
