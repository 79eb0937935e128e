"""The supervisor of one attempt: `python -m apt_jobs.supervision.supervise --job-id ... --attempt ...`.

It owns the lease, torchrun's process tree and the relay, and reports how the attempt ended. Its worker holds its stdin:
a line `drain` or `leave` asks to save and stop; the end of the file means that the worker is gone.
"""

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy.orm import Session

from apt_jobs.db.checkpoints import best_of_job, newest_of_job, wants_best
from apt_jobs.db.engine import Database
from apt_jobs.db.hand_backs import hand_back
from apt_jobs.db.jobs import fence, finish, finish_faulted, get_job, stop_requests_of
from apt_jobs.errors import AptJobsError, Fenced, InvalidInput, NotFound, OutOfSpace, Unavailable, WorkerLacks
from apt_jobs.events.kinds import RankFailed, StoredEvent
from apt_jobs.events.live import LivePublisher
from apt_jobs.jobs.outcome import Outcome, read_outcome
from apt_jobs.jobs.retry import Fault, retry_rules
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.jobs.secrets import Masker
from apt_jobs.jobs.states import JobState
from apt_jobs.logs import configure_logging
from apt_jobs.operations.liveness import node_alive_within_s
from apt_jobs.operations.secrets import read_secrets
from apt_jobs.private_files import keep_private
from apt_jobs.settings import Settings
from apt_jobs.supervision.attempt_facts import FactsRecorder
from apt_jobs.supervision.endings import Ending, exit_in_words, write_stop_file
from apt_jobs.supervision.launch import start_node
from apt_jobs.supervision.lease import KILL_FRACTION, STOP_FRACTION, LeaseKeeper
from apt_jobs.supervision.network import rendezvous_address
from apt_jobs.supervision.node_watch import NodeWatch
from apt_jobs.supervision.prepare_run import plan_attempt
from apt_jobs.supervision.process_tree import MARKER, ProcessTree, adopt_orphans
from apt_jobs.supervision.rank_logs import RankLogs
from apt_jobs.supervision.relay import Relay, first_cause

logger = logging.getLogger(__name__)

STOP_REQUESTS_EVERY_S = 2.0  # between two reads of the row, for a cancel or a pause while no events flow
GUARD_EVERY_S = 0.5
ACTIVE_PAUSE_S = 0.02  # between two transactions while events flow
LOOK_PAUSE_S = 0.01  # between two looks at the size of the spools; each costs the waking of a process
IDLE_LOOK_PAUSE_S = 0.02  # the same when the last event is older than `LIVELY_S`
LIVELY_S = 1.0
QUIET_PAUSE_S = 0.1  # between two looks at all else: logs, lease, stop requests
LAST_EVENTS_TIMEOUT_S = 30.0  # to store what the ranks left behind
MAX_TRACEBACK_CHARS = 20_000
STOP_LINES = {"drain": Ending.DRAINED, "leave": Ending.ALLOCATION_ENDS}  # that a worker writes to our stdin
HANDED_BACK = (OutOfSpace.__name__, WorkerLacks.__name__)  # errors that are no fault of the job


class Supervisor:
    """One attempt, from plan to outcome."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        job_id: str,
        attempt: int,
        *,
        gpus: Sequence[int] = (),
        threads_per_rank: int | None = None,
        num_nodes: int = 1,
        worker_name: str,
        beating_fd: int | None = None,
        ignore_sigterm: bool = False,
    ) -> None:
        self._ignore_sigterm = ignore_sigterm  # in the ranks
        self._beating_fd = beating_fd  # of the worker, which beats until we do
        self._settings, self._database = settings, database
        self._job_id, self._attempt = job_id, attempt
        self._gpus, self._num_nodes, self._worker_name = gpus, num_nodes, worker_name
        self._threads_per_rank = threads_per_rank
        self._publisher = LivePublisher(settings.redis)
        self._stop_asked: Ending | None = None  # by the worker
        self._began_s = time.monotonic()
        self._looked_s = time.monotonic()  # for stop requests
        self._asked: Ending | None = None  # why the ranks were asked to save and stop
        self._asked_s = 0.0
        self._preempted_by: str | None = None  # job
        self._lost_node: str | None = None  # which, and how
        self._lost_node_s = 0.0
        self._worker_gone = threading.Event()

    def run(self) -> None:
        """Carry the attempt to its end. Returns normally also when the job failed: the row says so."""
        threading.Thread(target=self._watch_worker, name="stdin", daemon=True).start()
        settings, lease_s, heartbeat_s = self._settings, self._settings.lease_s, self._settings.heartbeat_s
        lease = LeaseKeeper(
            self._database,
            self._job_id,
            self._attempt,
            lease_s=lease_s,
            heartbeat_s=heartbeat_s,
            beating_fd=self._beating_fd,
        )
        try:
            run_file = self._plan()
            secrets = self._read_secrets(run_file)
        except (InvalidInput, NotFound) as exc:
            self._finish(JobState.FAILED, str(exc), error={"message": str(exc), "error": type(exc).__name__})
            return
        except (WorkerLacks, OutOfSpace, Unavailable, OSError) as exc:  # no fault of the job: another worker may do it
            self._hand_back(str(exc))
            return
        ignoring = self._ignore_sigterm
        tree = start_node(settings, run_file, 0, self._gpus, self._worker_name, secrets, ignore_sigterm=ignoring)
        masker, spec = Masker(secrets.values()), run_file.spec
        logs = RankLogs(run_file.run_dir, spec.ranks_per_node, spec.num_ranks, mask=masker.mask)
        relay = Relay(self._database, self._publisher, run_file, logs, lease_s, mask=masker.mask)
        threading.Thread(target=self._guard, args=(lease, tree), name="guard", daemon=True).start()
        try:
            with lease, FactsRecorder(self._database, run_file, self._worker_name, self._gpus):
                ending = self._follow(tree, lease, relay, run_file)
                if ending is not Ending.FENCED:
                    relay.drain(LAST_EVENTS_TIMEOUT_S)
                    self._report(ending, tree, relay, run_file, logs)
                    relay.remove_spools()
        except Fenced:
            logger.warning("fenced: another attempt may own the job", extra=self._labels())
        finally:
            tree.kill()

    def _plan(self) -> RunFile:
        with self._database.write() as session:
            job = fence(session, self._job_id, self._attempt, self._settings.lease_s)
        settings = self._settings
        return plan_attempt(
            settings,
            self._database,
            job,
            self._gpus,
            self._num_nodes,
            lambda: rendezvous_address(settings),
            threads_per_rank=self._threads_per_rank,
        )

    def _read_secrets(self, run_file: RunFile) -> dict[str, str]:
        with self._database.read() as session:
            return read_secrets(session, self._settings, run_file.spec.secrets)

    def _follow(self, tree: ProcessTree, lease: LeaseKeeper, relay: Relay, run_file: RunFile) -> Ending | None:
        """Relay until the tree has ended; end it when there is a reason to."""
        nodes = NodeWatch(
            self._database, run_file, self._worker_name, alive_within_s=node_alive_within_s(self._settings)
        )
        while tree.poll() is None:
            moved = relay.flush()
            if (reason := self._reason_to_end(lease, relay, nodes)) is not None:
                return self._end(tree, reason, run_file)
            if self._asked is None and (reason := self._reason_to_stop(lease, relay, run_file)) is not None:
                self._asked, self._asked_s = reason, time.monotonic()
                write_stop_file(run_file, reason)
            if self._asked is not None and time.monotonic() - self._asked_s > self._grace_s(run_file):
                return self._end(tree, self._asked, run_file)
            if moved:
                time.sleep(ACTIVE_PAUSE_S)  # what comes meanwhile shares a transaction
            else:
                _await_news(relay)
        return None

    def _reason_to_end(self, lease: LeaseKeeper, relay: Relay, nodes: NodeWatch) -> Ending | None:
        """Return why the tree has to end now, saved or not."""
        if relay.stop_requests.cancel or lease.cancelled.is_set():
            return Ending.CANCELLED
        if lease.must_stop:
            return Ending.FENCED
        if self._worker_gone.is_set():
            return Ending.WORKER_GONE
        if time.monotonic() - relay.last_sign_s > self._settings.stall_timeout_s:
            return Ending.STALLED
        return self._without_a_node(nodes)

    def _without_a_node(self, nodes: NodeWatch) -> Ending | None:
        """Give the ranks that lost a node a moment to report it themselves: they know more."""
        if self._lost_node is None:
            self._lost_node, self._lost_node_s = nodes.lost(), time.monotonic()
        elif time.monotonic() - self._lost_node_s > self._settings.stop_timeout_s:
            return Ending.NODE_LOST
        return None

    def _reason_to_stop(self, lease: LeaseKeeper, relay: Relay, run_file: RunFile) -> Ending | None:
        """Return why the ranks should save after this step and stop."""
        if time.monotonic() - self._looked_s > STOP_REQUESTS_EVERY_S:
            self._looked_s = time.monotonic()
            self._read_stop_requests(relay)
        if relay.stop_requests.pause or lease.pausing.is_set():
            return Ending.PAUSED
        if relay.stop_requests.preempted_by is not None:
            self._preempted_by = relay.stop_requests.preempted_by
            return Ending.PREEMPTED
        if self._stop_asked is not None:
            return self._stop_asked
        limit_s = run_file.spec.time_limit_s
        if limit_s is not None and time.monotonic() - self._began_s > limit_s:
            return Ending.TIME_LIMIT
        return None

    def _grace_s(self, run_file: RunFile) -> float:
        """Return how long the ranks may take to save and stop."""
        own_s = run_file.spec.grace_period_s if self._asked is Ending.PREEMPTED else None
        return self._settings.drain_timeout_s if own_s is None else own_s

    def _read_stop_requests(self, relay: Relay) -> None:
        """Read the row: a training that is silent, in its setup or in a long step, is cancelled soon as well."""
        try:
            with self._database.read() as session:
                relay.stop_requests = stop_requests_of(get_job(session, self._job_id))
        except Unavailable as exc:
            logger.warning("cannot read stop requests", extra={**self._labels(), "why": str(exc)})

    def _guard(self, lease: LeaseKeeper, tree: ProcessTree) -> None:
        """Kill the ranks before others may take the job, even when the database holds up the other threads."""
        while not lease.must_kill:
            time.sleep(GUARD_EVERY_S)
        logger.error("the lease is about to end; killing the ranks", extra=self._labels())
        tree.kill()

    def _end(self, tree: ProcessTree, ending: Ending, run_file: RunFile) -> Ending:
        logger.info("ending the process tree", extra={**self._labels(), "why": ending.value})
        grace_s = (KILL_FRACTION - STOP_FRACTION) * self._settings.lease_s  # what a lost lease leaves at least
        if self._ignore_sigterm and not run_file.is_user_script:
            grace_s = 0.0  # the trainer's ranks would sleep through it
        tree.terminate(min(self._settings.stop_timeout_s, grace_s))
        return ending

    def _report(
        self, ending: Ending | None, tree: ProcessTree, relay: Relay, run_file: RunFile, logs: RankLogs
    ) -> None:
        """Write how the attempt ended."""
        outcome = read_outcome(run_file.outcome_path)
        if ending is Ending.CANCELLED:
            self._finish(JobState.CANCELLED, relay.decided or ending.value)
        elif tree.poll() == 0 and outcome is Outcome.FINISHED:
            self._finish(JobState.SUCCEEDED, None, result=self._result(relay))
        elif outcome is Outcome.STOPPED or (ending is not None and ending is self._asked):
            self._report_stopped(relay, saved=outcome is Outcome.STOPPED)
        elif ending is Ending.WORKER_GONE:
            self._finish(JobState.QUEUED, ending.value)
        elif (cause := first_cause(relay.failures)) and cause.error in HANDED_BACK:
            self._hand_back(cause.message)
        elif cause:
            self._report_failure(cause, logs)
        else:
            why = self._lost_node or (ending.value if ending else exit_in_words(tree.poll()))
            error = {"message": why, "traceback": logs.tail()[-MAX_TRACEBACK_CHARS:]}
            fault, rules = Fault.INFRASTRUCTURE if self._lost_node else Fault.JOB, retry_rules(self._settings)
            self._stored(
                lambda session: finish_faulted(
                    session, self._job_id, self._attempt, why, error, fault=fault, rules=rules
                )
            )

    def _report_failure(self, cause: RankFailed, logs: RankLogs) -> None:
        """Report what a rank raised, or how the job's own command exited."""
        message = f"rank {cause.rank}: {cause.error}: {cause.message}"
        error: dict[str, Any] = {"message": message, "error": cause.error, "rank": cause.rank}
        if cause.exit_status is not None:
            message = error["message"] = cause.message
            error["exit_status"] = cause.exit_status
        traceback = cause.traceback or logs.tail()
        self._finish(JobState.FAILED, message, error={**error, "traceback": traceback[-MAX_TRACEBACK_CHARS:]})

    def _report_stopped(self, relay: Relay, *, saved: bool) -> None:
        """Report ranks that were asked to save and stop, and did, or were ended when they did not in time."""
        assert self._asked is not None  # only this process makes the file that stops them
        unsaved = "it did not save in time: an earlier checkpoint counts"
        if saved and relay.saved_step is None:
            unsaved = "it saved no checkpoint: an earlier one counts, if there is one"
        where = f"saved at step {relay.saved_step}" if saved and relay.saved_step is not None else unsaved
        why = relay.decided if relay.decided and self._asked is Ending.PAUSED else self._asked.value
        if self._asked is Ending.PREEMPTED:
            why = f"preempted by {self._preempted_by}"
        reason = f"{why}; {where}"
        if self._asked is Ending.TIME_LIMIT:
            self._finish(JobState.FAILED, reason, error={"message": reason, "error": "TimeLimit", "traceback": None})
        else:
            self._finish(JobState.PAUSED if self._asked is Ending.PAUSED else JobState.QUEUED, reason)

    def _result(self, relay: Relay) -> dict[str, Any]:
        with self._database.read() as session:
            find = best_of_job if wants_best(get_job(session, self._job_id)) else newest_of_job
            checkpoint = find(session, self._job_id)
        finished = relay.finished
        return {
            "step": finished.step if finished else None,
            "train_loss": finished.train_loss if finished else None,
            "best_val_loss": finished.best_val_loss if finished else None,
            "checkpoint_id": checkpoint.id if checkpoint else None,
        }

    def _finish(self, state: JobState, reason: str | None, **fields: Any) -> None:
        self._stored(lambda session: finish(session, self._job_id, self._attempt, state, reason=reason, **fields))

    def _hand_back(self, reason: str) -> None:
        rules = retry_rules(self._settings)
        self._stored(lambda session: hand_back(session, self._job_id, self._attempt, reason, rules))

    def _stored(self, write: Callable[[Session], list[StoredEvent]]) -> None:
        """Run the last transition until the database takes it or the lease is over; then publish its events."""
        deadline = time.monotonic() + self._settings.lease_s
        while True:
            try:
                with self._database.write() as session:
                    events = write(session)
                break
            except (Unavailable, OutOfSpace) as exc:
                logger.warning("the outcome waits", extra={**self._labels(), "why": str(exc)})
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)
        self._publisher.publish(self._job_id, events)

    def _watch_worker(self) -> None:
        for line in sys.stdin:
            self._stop_asked = STOP_LINES.get(line.strip(), self._stop_asked)
        self._worker_gone.set()

    def _labels(self) -> dict[str, Any]:
        return {"job_id": self._job_id, "attempt": self._attempt}


def _await_news(relay: Relay) -> None:
    """Wait for a line in a spool, at most `QUIET_PAUSE_S`."""
    now_s = time.monotonic()
    until_s = now_s + QUIET_PAUSE_S
    pause_s = LOOK_PAUSE_S if now_s - relay.last_event_s < LIVELY_S else IDLE_LOOK_PAUSE_S
    while True:
        time.sleep(pause_s)
        if relay.has_news() or time.monotonic() > until_s:
            return


def main() -> None:
    """Entry of the process."""
    parser = argparse.ArgumentParser(description="Supervise one attempt of a training job.")
    parser.add_argument("--job-id", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--gpus", default="", help="indexes of the GPUs to use, separated by commas")
    parser.add_argument("--threads-per-rank", type=int, help="of computations on the CPU")
    parser.add_argument("--num-nodes", type=int, default=1, help="nodes of this worker, its own included")
    parser.add_argument("--worker-name", required=True)
    parser.add_argument("--ignore-sigterm", action="store_true", help="have the ranks do so; a file asks them to save")
    parser.add_argument("--beating-fd", type=int, help="to close when the lease was extended")
    arguments = parser.parse_args()
    settings = Settings()
    configure_logging(settings.log_level)
    keep_private(settings.root)
    adopt_orphans()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the worker's to handle
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # only its stdin tells it to stop
    os.environ.pop(MARKER, None)
    database = Database(settings.database)
    gpus = [int(index) for index in arguments.gpus.split(",") if index]
    try:
        Supervisor(
            settings,
            database,
            arguments.job_id,
            arguments.attempt,
            gpus=gpus,
            threads_per_rank=arguments.threads_per_rank,
            num_nodes=arguments.num_nodes,
            worker_name=arguments.worker_name,
            beating_fd=arguments.beating_fd,
            ignore_sigterm=arguments.ignore_sigterm,
        ).run()
    except AptJobsError:
        logger.exception("the supervisor gave up", extra={"job_id": arguments.job_id, "attempt": arguments.attempt})
        sys.exit(1)
    finally:
        database.dispose()


if __name__ == "__main__":
    main()
