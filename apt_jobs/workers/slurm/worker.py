"""The Slurm worker: `apt-jobs worker slurm`. Claims training jobs and has Slurm place them. No torch here."""

import logging
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from apt_jobs.artifacts.runs import run_dir
from apt_jobs.db.jobs import Claimed, attempts_of_owner, get_job, owns
from apt_jobs.errors import AptJobsError, InvalidInput, Unavailable
from apt_jobs.jobs.needs import decode_needs
from apt_jobs.jobs.packing import Offer
from apt_jobs.private_files import keep_private
from apt_jobs.settings import Settings
from apt_jobs.supervision.launch import require_limits
from apt_jobs.supervision.process_tree import KILL_TIMEOUT_S
from apt_jobs.workers.consumer import Consumer
from apt_jobs.workers.packer import AttemptId, Packer
from apt_jobs.workers.slurm.attempt import SUBMITTING, Shared, SlurmAttempt, SlurmOptions
from apt_jobs.workers.slurm.client import SlurmClient, SlurmJob
from apt_jobs.workers.slurm.offer import offer_of, why_closed
from apt_jobs.workers.slurm.request import Attempt, attempt_of_name, owner_comment
from apt_jobs.workers.slurm.watch import SlurmWatch

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0  # for Slurm to answer a worker that starts
START_PAUSE_S = 2.0
OFFER_EVERY_S = 60.0  # between two looks at the nodes of the partition


class SlurmWorker:
    """Runs an attempt in each slot. They outlive this process: the next one of its name watches them again."""

    def __init__(self, settings: Settings, options: SlurmOptions, *, name: str, queues: Sequence[str]) -> None:
        self._settings, self._options, self._name = settings, options, name
        self._client = SlurmClient(options.command_timeout_s)
        self._why_no_offer: str | None = None
        self._offer = self._first_offer()
        self._offered_s = time.monotonic()
        self._attempts: dict[AttemptId, SlurmAttempt] = {}
        self._lock = threading.Lock()
        self._strays: dict[str, float] = {}  # Slurm jobs whose attempt is over: since when
        self._packer = Packer(settings, self._offer, name=name, kind="train", places_elsewhere=True)
        self._watch = SlurmWatch(self._client, owner_comment(name), options.poll_s, self._on_look)
        self._consumer = Consumer(
            settings,
            name=name,
            kind="train",
            queues=queues,
            concurrency=options.max_jobs,
            serve=self._serve,
            on_drain=self._drain,
            describe_gpus=self._describe_gpus,
            why_unusable=lambda: self._watch.why_silent or self._why_no_offer,
            packer=self._packer,
        )
        self._shared = Shared(
            settings=settings,
            options=options,
            database=self._consumer.database,
            publisher=self._consumer.publisher,
            client=self._client,
            watch=self._watch,
            on_waiting=self._on_waiting,
        )

    def run(self) -> None:
        """Work until SIGTERM or Ctrl-C. Jobs that wait in Slurm are handed back then; those that run there run on.

        Raises:
            Unavailable, AlreadyRunning: as `Consumer.run`.
        """
        try:
            self._consumer.run(self._prepare)
        finally:
            self._watch.close()

    def _first_offer(self) -> Offer:
        """Ask Slurm what the partition has; wait for one that is just starting, as after a power cut."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                return self._read_offer()
            except Unavailable as exc:
                if time.monotonic() > deadline_s:
                    raise
                logger.warning("waiting for Slurm", extra={"why": str(exc)})
                time.sleep(START_PAUSE_S)

    def _read_offer(self) -> Offer:
        """Ask Slurm what the partition has, and note whether it takes jobs.

        Raises:
            Unavailable: Slurm does not answer.
            InvalidInput: the partition has no node, or there is no such one.
        """
        options = self._options
        rows = self._client.nodes(options.partition)
        offer = offer_of(rows, max_jobs=options.max_jobs, gpu_memory_gb=options.gpu_memory_gb)
        if offer is None:
            which = "default partition" if options.partition is None else f"partition {options.partition!r}"
            raise InvalidInput(f"Slurm has no {which} with nodes; sinfo lists them")
        self._why_no_offer = why_closed(rows)
        return offer

    def _describe_gpus(self) -> list[dict[str, Any]]:
        return [
            {"index": gpu.index, "name": gpu.name, "memory_total_bytes": int(gpu.memory_gb * 1e9)}
            for gpu in self._offer.gpus
        ]

    def _prepare(self) -> None:
        """Go on with what an earlier process of this name began."""
        self._watch.start()
        with self._consumer.database.read() as session:
            found = [(one, get_job(session, one[0]).needs) for one in attempts_of_owner(session, self._name)]
        for attempt, needs in found:
            logger.info("watching an attempt again", extra={"job_id": attempt[0], "attempt": attempt[1]})
            self._packer.hold(attempt)
            self._consumer.start_thread(partial(self._follow_again, attempt, needs))

    def _follow_again(self, attempt: AttemptId, needs: str) -> None:
        try:
            self._follow(attempt, needs, is_submitted=True)
        except AptJobsError:
            logger.exception("watching an attempt broke", extra={"job_id": attempt[0]})

    def _serve(self, group: Sequence[Claimed]) -> None:
        [claimed] = group  # each slot serves one job
        job = claimed.job
        self._on_waiting((job.id, job.attempt), SUBMITTING)  # who hears of the claim asks what it waits for
        self._consumer.publisher.publish(job.id, [claimed.event])
        self._follow((job.id, job.attempt), job.needs, is_submitted=False)

    def _follow(self, attempt_id: AttemptId, needs: str, *, is_submitted: bool) -> None:
        job_id, number = attempt_id
        named = Attempt(job_id, number, self._name, run_dir(self._settings, job_id, number))
        attempt = SlurmAttempt(self._shared, named, decode_needs(needs), self._offer)
        with self._lock:
            self._attempts[attempt_id] = attempt
        try:
            if self._consumer.draining.is_set():
                self._drain()
            attempt.run(is_submitted=is_submitted)
        finally:
            with self._lock:
                del self._attempts[attempt_id]
            self._packer.release(attempt_id)
            self._consumer.room_changed()

    def _drain(self) -> None:
        """Hand all jobs back where a user asks for it; where this process ends, those that have not started."""
        with self._lock:
            for attempt in self._attempts.values():
                (attempt.leave_alone if self._consumer.is_stopping else attempt.drain)()

    def _on_waiting(self, attempt: AttemptId, words: str | None) -> None:
        if self._packer.note_waiting(attempt, words):
            self._consumer.record_soon()

    def _on_look(self, jobs: Sequence[SlurmJob]) -> None:
        """Run after each look at Slurm, in its thread."""
        try:
            self._end_strays(jobs)
            if time.monotonic() - self._offered_s > OFFER_EVERY_S:
                self._offered_s = time.monotonic()
                self._offer = self._read_offer()
                self._packer.offer_now(self._offer)
        except Unavailable as exc:
            logger.warning("cannot look after Slurm jobs", extra={"why": str(exc)})
        except InvalidInput as exc:
            self._why_no_offer = str(exc)

    def _end_strays(self, jobs: Sequence[SlurmJob]) -> None:
        """End Slurm jobs whose attempt is over: submissions that arrived late, or that nobody watched.

        A step that runs finds that out by itself, and has time for it.
        """
        with self._lock:
            watched = set(self._attempts)
        found = {job.id: job for job in jobs if not job.is_over and self._is_stray(job, watched)}
        self._strays = {job_id: self._strays.get(job_id, time.monotonic()) for job_id in found}
        patience_s = self._settings.lease_s + KILL_TIMEOUT_S
        late = [
            job_id
            for job_id, since_s in self._strays.items()
            if found[job_id].is_pending or time.monotonic() - since_s > patience_s
        ]
        self._client.cancel(late)

    def _is_stray(self, job: SlurmJob, watched: set[AttemptId]) -> bool:
        attempt = attempt_of_name(job.name)
        if attempt is None or attempt in watched:
            return False
        with self._consumer.database.read() as session:
            return not owns(session, *attempt)


def run_slurm_worker(settings: Settings, options: SlurmOptions, *, name: str, queues: Sequence[str]) -> None:
    """Entry of the process."""
    require_limits(settings)
    keep_private(settings.root)
    SlurmWorker(settings, options, name=name, queues=queues).run()
