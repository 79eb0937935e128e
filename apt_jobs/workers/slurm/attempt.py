"""One attempt on Slurm, from its claim to the end of its allocation, as its worker sees it.

The worker keeps the lease until the step has begun, which then keeps it. What Slurm says is never the truth about the
job: the row is, and Slurm's word ends an attempt only where no supervisor can.
"""

import json
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy.orm import Session

from apt_jobs.db.engine import Database
from apt_jobs.db.hand_backs import hand_back
from apt_jobs.db.jobs import finish, finish_faulted, get_job, owns, stop_requests_of
from apt_jobs.errors import AptJobsError, Fenced, OutOfSpace, Unavailable, WorkerLacks
from apt_jobs.events.kinds import StoredEvent
from apt_jobs.events.live import LivePublisher
from apt_jobs.jobs.needs import Needs
from apt_jobs.jobs.packing import Offer
from apt_jobs.jobs.retry import Fault, retry_rules
from apt_jobs.jobs.states import JobState
from apt_jobs.settings import Settings
from apt_jobs.supervision.lease import MAX_START_LEASES, LeaseKeeper
from apt_jobs.supervision.process_tree import KILL_TIMEOUT_S
from apt_jobs.workers.slurm.client import SlurmClient, SlurmJob, in_words, read_job_id
from apt_jobs.workers.slurm.request import STEP_LOG, Attempt, sbatch_arguments, script_of
from apt_jobs.workers.slurm.step import BEGUN, ENVIRONMENT, step_environment
from apt_jobs.workers.slurm.watch import SlurmWatch

logger = logging.getLogger(__name__)

SUBMITTING = "starting: being submitted to Slurm"
POLL_S = 0.2
NO_TIME_LIMIT = timedelta(days=365)  # as Slurm counts a job without one, for when others start
REPEAT_S = 10.0  # before Slurm is asked once more to end or to signal a job
LOG_TAIL_BYTES = 2_000
NOT_OURS_TO_END = ("NODE_FAIL",)  # its processes may live on, cut off from Slurm: the lease decides


@dataclass(frozen=True, slots=True)
class SlurmOptions:
    """How a worker uses Slurm."""

    partition: str | None = None
    max_jobs: int = 16
    options: tuple[str, ...] = ()  # further ones of `sbatch`
    submit_timeout_s: float = 120.0  # for `sbatch` to answer
    command_timeout_s: float = 30.0  # for other commands
    poll_s: float = 5.0
    max_pending_s: float = 7 * 86_400.0  # in Slurm, before the job is handed back
    gpu_memory_gb: float = 0.0


@dataclass(frozen=True, slots=True)
class Shared:
    """What all attempts of a worker use."""

    settings: Settings
    options: SlurmOptions
    database: Database
    publisher: LivePublisher
    client: SlurmClient
    watch: SlurmWatch
    on_waiting: Callable[[tuple[str, int], str | None], None]  # why an attempt has not started


class SlurmAttempt:
    """Runs in one thread; `drain` and `leave_alone` may be called from others."""

    def __init__(self, shared: Shared, attempt: Attempt, needs: Needs, offer: Offer) -> None:
        self._shared, self._attempt, self._needs, self._offer = shared, attempt, needs, offer
        self._drained, self._left_alone = threading.Event(), threading.Event()
        self._began_s = time.monotonic()
        self._submitted_s = self._began_s
        self._asked_s = 0.0  # when Slurm was last asked to end or signal the job

    def drain(self) -> None:
        """Hand the job back, saved if it runs."""
        self._drained.set()

    def leave_alone(self) -> None:
        """Hand the job back if it has not started, else let it run on without this worker."""
        self._left_alone.set()

    def run(self, *, is_submitted: bool = False) -> None:
        """Return when the attempt is over. `is_submitted`: an earlier process of the worker did, or was about to."""
        settings, attempt = self._shared.settings, self._attempt
        try:
            with LeaseKeeper(
                self._shared.database,
                attempt.job_id,
                attempt.number,
                lease_s=settings.lease_s,
                heartbeat_s=settings.heartbeat_s,
            ) as lease:
                has_begun = (is_submitted or self._submit(lease)) and self._wait_for_start(lease)
            self._shared.on_waiting((attempt.job_id, attempt.number), None)
            if has_begun:
                self._wait_for_end()
        except Fenced:
            self._cancel()
        finally:
            (attempt.folder / ENVIRONMENT).unlink(missing_ok=True)

    def _submit(self, lease: LeaseKeeper) -> bool:
        """Submit once. Whatever `sbatch` answers, or whether it does: what counts is what Slurm has of this name."""
        shared, attempt = self._shared, self._attempt
        self._note(SUBMITTING)
        arguments = sbatch_arguments(
            attempt,
            self._needs,
            self._offer,
            partition=shared.options.partition,
            save_s=shared.settings.drain_timeout_s,
            options=shared.options.options,
        )
        try:
            attempt.folder.mkdir(parents=True, exist_ok=True)
            _write_environment(attempt.folder, shared.settings)
            process = shared.client.submit(arguments, script_of(attempt, self._needs))
        except (WorkerLacks, OSError) as exc:
            return self._hand_back(str(exc))
        why = self._await_answer(process, lease)
        self._submitted_s = time.monotonic()
        shared.watch.look_soon()
        if why is None:
            return True
        return self._find_or_hand_back(why, lease)

    def _await_answer(self, process: "subprocess.Popen[str]", lease: LeaseKeeper) -> str | None:
        """Return what is wrong with the answer of `sbatch`; None: it named the job."""
        timeout_s = self._shared.options.submit_timeout_s
        deadline_s = time.monotonic() + timeout_s
        while process.poll() is None and time.monotonic() < deadline_s and not self._must_stop(lease):
            time.sleep(POLL_S / 4)
        if process.poll() is None:
            process.kill()
            process.wait()
            return f"sbatch did not answer within {timeout_s:g} s"
        assert process.stdout is not None
        answer = process.stdout.read()
        if process.returncode == 0 and read_job_id(answer) is not None:
            return None
        return f"sbatch: {in_words(answer)}"

    def _find_or_hand_back(self, why: str, lease: LeaseKeeper) -> bool:
        """Go on if Slurm has the job all the same. A submission that arrives later finds its attempt over."""
        deadline_s = time.monotonic() + self._shared.options.submit_timeout_s
        while not self._must_stop(lease):
            why_silent: str | None = None
            try:
                if self._shared.watch.look().named(self._attempt.name):
                    return True
            except Unavailable as exc:
                why_silent = str(exc)
            if why_silent is None or time.monotonic() > deadline_s:
                return self._hand_back(why if why_silent is None else f"{why}; {why_silent}")
            time.sleep(POLL_S)
        return True  # the wait for its start deals with the stop

    def _must_stop(self, lease: LeaseKeeper) -> bool:
        asked = lease.cancelled.is_set() or lease.pausing.is_set() or lease.fenced.is_set()
        return asked or self._drained.is_set() or self._left_alone.is_set()

    def _wait_for_start(self, lease: LeaseKeeper) -> bool:
        """Wait until the step has begun; False: the attempt is over, or will never begin."""
        allocated_s: float | None = None
        while not (self._attempt.folder / BEGUN).exists():
            if self._stopped_before_start(lease):
                return False
            now_s, look = time.monotonic(), self._shared.watch.last
            jobs = look.named(self._attempt.name)
            if not jobs and look.began_s > self._submitted_s:
                return self._hand_back("Slurm does not know the job that was submitted")
            if jobs and all(job.is_over for job in jobs):
                return self._end(jobs)
            if any(job.is_pending for job in jobs):
                allocated_s = None
                self._note(waiting_words(jobs))
                if now_s - self._began_s > self._shared.options.max_pending_s:
                    return self._hand_back(f"it waited {self._shared.options.max_pending_s / 3600:g} h in Slurm")
            elif jobs:
                allocated_s = allocated_s or now_s
                self._note(f"starting: Slurm job {jobs[0].id} begins on {jobs[0].node}")
                if now_s - allocated_s > MAX_START_LEASES * self._shared.settings.lease_s:
                    return self._hand_back(f"nothing started on its allocation on {jobs[0].node}")
            time.sleep(POLL_S)
        return True

    def _stopped_before_start(self, lease: LeaseKeeper) -> bool:
        """End an attempt that has not begun, if somebody wants that."""
        if lease.fenced.is_set():
            raise Fenced(f"attempt {self._attempt.number} of {self._attempt.job_id} is over")
        try:
            with self._shared.database.read() as session:
                wanted = stop_requests_of(get_job(session, self._attempt.job_id))
        except Unavailable:
            return False
        if wanted.cancel:
            self._finish(JobState.CANCELLED, "cancelled by a user")
        elif wanted.pause:
            self._finish(JobState.PAUSED, "paused by a user before it started")
        elif wanted.preempted_by is not None:
            self._finish(JobState.QUEUED, f"preempted by {wanted.preempted_by} before it started")
        elif self._drained.is_set() or self._left_alone.is_set():
            self._finish(JobState.QUEUED, "the worker was drained before Slurm started it")
        else:
            return False
        return True

    def _wait_for_end(self) -> None:
        """Watch an attempt whose supervisor reports for itself, until it has."""
        begun_s, over_s = time.monotonic(), 0.0  # the second: since when the attempt owns nothing
        while not self._left_alone.is_set():
            time.sleep(POLL_S)
            look = self._shared.watch.last
            jobs = look.named(self._attempt.name) if look.began_s > begun_s else []
            if spare := [job for job in jobs if job.is_pending]:  # of a submission that was repeated
                self._cancel(spare)
            if not self._may_own():
                over_s = over_s or time.monotonic()
                if look.began_s > over_s and all(job.is_over or job.is_pending for job in jobs):
                    self._cancel(jobs)
                    return
                if time.monotonic() - over_s > self._shared.settings.lease_s + KILL_TIMEOUT_S:
                    self._cancel(jobs)
            elif jobs and all(job.is_over or job.is_pending for job in jobs):
                if any(job.state in NOT_OURS_TO_END for job in jobs):
                    time.sleep(self._shared.settings.heartbeat_s)
                else:
                    self._end(jobs)
                    return
            elif self._drained.is_set():
                self._cancel([job for job in jobs if not job.is_pending], "TERM")

    def _end(self, jobs: Sequence[SlurmJob]) -> bool:
        """End an attempt whose allocation has ended without a report of its supervisor, as Slurm says it did."""
        begun = self._attempt.folder / BEGUN
        has_begun, worked = begun.exists(), begun.read_text() if begun.exists() else ""
        job = next((job for job in jobs if job.id == worked), jobs[-1])
        words = f"Slurm job {job.id} ended as {job.state}"
        if job.state == "PREEMPTED":
            self._finish(JobState.QUEUED, f"{words}; it did not save in time: an earlier checkpoint counts")
            return False
        if job.state in ("COMPLETED", "FAILED") and not has_begun:
            return self._hand_back(f"{words} before it started: {self._log_tail()}")
        error = {"message": words, "traceback": self._log_tail()}
        fault = Fault.JOB if job.state == "OUT_OF_MEMORY" else Fault.INFRASTRUCTURE
        rules, (job_id, number) = retry_rules(self._shared.settings), self._id
        self._store(lambda session: finish_faulted(session, job_id, number, words, error, fault=fault, rules=rules))
        return False

    @property
    def _id(self) -> tuple[str, int]:
        return self._attempt.job_id, self._attempt.number

    def _note(self, words: str) -> None:
        self._shared.on_waiting(self._id, words)

    def _may_own(self) -> bool:
        try:
            with self._shared.database.read() as session:
                return owns(session, *self._id)
        except Unavailable:
            return True  # the supervisor counts the time without the database

    def _hand_back(self, reason: str) -> bool:
        rules = retry_rules(self._shared.settings)
        self._store(lambda session: hand_back(session, *self._id, reason, rules))
        self._cancel()
        return False

    def _finish(self, state: JobState, reason: str) -> None:
        self._store(lambda session: finish(session, *self._id, state, reason=reason))
        self._cancel()

    def _store(self, write: Callable[[Session], list[StoredEvent]]) -> None:
        """Run the last transition until the database takes it, or the lease is over and it is another's."""
        deadline_s = time.monotonic() + self._shared.settings.lease_s
        while True:
            try:
                with self._shared.database.write() as session:
                    events = write(session)
                break
            except (Unavailable, OutOfSpace) as exc:
                logger.warning("the outcome waits", extra={"job_id": self._attempt.job_id, "why": str(exc)})
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(1.0)
        self._shared.publisher.publish(self._attempt.job_id, events)

    def _cancel(self, jobs: Sequence[SlurmJob] | None = None, signal: str | None = None) -> None:
        """Have Slurm end or signal the job, at most once in `REPEAT_S`. What it misses ends by itself, unowned."""
        if jobs is not None and time.monotonic() - self._asked_s < REPEAT_S:
            return
        self._asked_s = time.monotonic()
        try:
            found = self._shared.watch.look().named(self._attempt.name) if jobs is None else jobs
            self._shared.client.cancel([job.id for job in found if not job.is_over], signal)
        except AptJobsError as exc:
            logger.warning("cannot end a Slurm job", extra={"job_id": self._attempt.job_id, "why": str(exc)})

    def _log_tail(self) -> str:
        try:
            with (self._attempt.folder / STEP_LOG).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
                return file.read().decode(errors="replace").strip() or "it printed nothing"
        except OSError:
            return "it printed nothing"


def waiting_words(jobs: Sequence[SlurmJob]) -> str:
    """Return why an attempt waits in Slurm, and until when as Slurm expects."""
    job = next(job for job in jobs if job.is_pending)
    words = f"starting: pending in Slurm as job {job.id}"
    if job.reason and job.reason != "None":
        words += f", reason: {job.reason}"
    if job.start_at is not None and job.start_at - datetime.now(UTC) < NO_TIME_LIMIT / 2:
        words += f"; expected to start at about {job.start_at.astimezone(UTC).strftime('%Y-%m-%d %H:%M UTC')}"
    return words


def _write_environment(folder: Path, settings: Settings) -> None:
    """Hand the worker's environment to the step by a private file: Slurm would keep passwords, and show them."""
    text = json.dumps(step_environment(os.environ, settings.root))
    fd = os.open(folder / ENVIRONMENT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)
