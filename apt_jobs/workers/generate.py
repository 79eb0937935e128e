"""The generation worker: claims generation jobs and feeds them to one engine, which serves them together.

Each job has a thread of Celery's pool that waits for the engine and keeps the lease; the engine's own thread computes.
"""

import logging
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as NotYet
from enum import Enum
from typing import Any

import orjson
from sqlalchemy.orm import Session

from apt_jobs.db.jobs import Claimed, finish, finish_broken, get_job
from apt_jobs.db.models import Job
from apt_jobs.errors import AptJobsError, Fenced, OutOfSpace, Unavailable
from apt_jobs.events.kinds import StoredEvent
from apt_jobs.generation.catalog import choose_model, find_model
from apt_jobs.generation.engine import Engine
from apt_jobs.generation.request import Request, Stopped
from apt_jobs.jobs.spec import GenerateSpec
from apt_jobs.jobs.states import JobState
from apt_jobs.settings import Settings
from apt_jobs.supervision.lease import LeaseKeeper
from apt_jobs.workers.consumer import Consumer
from apt_jobs.workers.gpus import describe_gpus, list_gpus

logger = logging.getLogger(__name__)

DRAIN_GRACE_S = 20.0  # a draining worker finishes what it can in so long and hands the rest back
MAX_TRACEBACK_CHARS = 8_000
_POLL_S = 0.05  # how soon a cancel, a lost lease or the end of the grace is seen
_RETRY_PAUSE_S = 1.0


class _Why(Enum):
    """What a request was stopped for."""

    CANCELLED = "cancelled"
    FENCED = "the lease was lost"
    DRAINED = "the worker was drained"
    TIME_LIMIT = "the job's time limit was reached"


class GenerateWorker:
    """One engine and as many waiting threads as `generate_concurrency`. `device`: "auto", "cpu" or "cuda"."""

    def __init__(self, settings: Settings, *, name: str, queues: Sequence[str], device: str = "auto") -> None:
        self._settings = settings
        self._engine = Engine(settings.warm_models, device)
        self._drain_by_s: float | None = None  # CLOCK_MONOTONIC seconds; None: not draining
        gpus = list_gpus()
        self._consumer = Consumer(
            settings,
            name=name,
            kind="generate",
            queues=queues,
            concurrency=settings.generate_concurrency,
            serve=self._serve,
            on_drain=self._drain,
            on_resume=self._resume,
            describe_gpus=lambda: describe_gpus(gpus),
        )

    def run(self) -> None:
        """Work until SIGTERM or Ctrl-C."""
        try:
            self._consumer.run()
        finally:
            self._engine.close()

    def _drain(self) -> None:
        self._drain_by_s = time.monotonic() + min(DRAIN_GRACE_S, self._settings.drain_timeout_s)

    def _resume(self) -> None:
        self._drain_by_s = None

    def _serve(self, claimed: Claimed) -> None:
        job = claimed.job
        with LeaseKeeper(
            self._consumer.database,
            job.id,
            job.attempt,
            lease_s=self._settings.lease_s,
            heartbeat_s=self._settings.heartbeat_s,
        ) as lease:
            write = self._outcome(job, lease)
            if write is not None:
                self._store(job, lease, write)

    def _outcome(self, job: Job, lease: LeaseKeeper) -> Callable[[Session], list[StoredEvent]] | None:
        """Generate, and return the transition that ends the attempt. None: it is another attempt's job now."""

        def ends(state: JobState, **fields: Any) -> Callable[[Session], list[StoredEvent]]:
            return lambda session: finish(session, job.id, job.attempt, state, **fields)

        def cancelled(session: Session) -> list[StoredEvent]:
            reason = get_job(session, job.id).reason  # who cancels says why in the row
            return finish(session, job.id, job.attempt, JobState.CANCELLED, reason=reason)

        def handed_back(session: Session) -> list[StoredEvent]:
            if get_job(session, job.id).cancel_requested_at is not None:
                return cancelled(session)
            return finish(session, job.id, job.attempt, JobState.QUEUED, reason=_Why.DRAINED.value)

        def broke(why: str) -> Callable[[Session], list[StoredEvent]]:
            return lambda session: finish_broken(session, job.id, job.attempt, why)

        try:
            result, why = self._generate(job, lease)
        except (Unavailable, OutOfSpace) as exc:  # not the job's fault: another attempt may do better
            return broke(str(exc))
        except AptJobsError as exc:
            return ends(JobState.FAILED, reason=str(exc), error={"message": str(exc), "traceback": None, "rank": None})
        except Exception as exc:  # the edge of the process: the job has to learn of it
            logger.exception("a generation broke", extra={"job_id": job.id, "attempt": job.attempt})
            trace = "".join(traceback.format_exception(exc))[-MAX_TRACEBACK_CHARS:]
            message = f"the generation worker broke: {exc!r}"
            return ends(JobState.FAILED, reason=message, error={"message": message, "traceback": trace, "rank": None})
        if why is _Why.FENCED:
            return None
        if why is _Why.CANCELLED:
            return cancelled
        if why is _Why.DRAINED:
            return handed_back
        if why is _Why.TIME_LIMIT:
            error = {"message": why.value, "error": "TimeLimit", "traceback": None}
            return ends(JobState.FAILED, reason=why.value, error=error)
        return ends(JobState.SUCCEEDED, result=result)

    def _generate(self, job: Job, lease: LeaseKeeper) -> tuple[dict[str, Any] | None, _Why | None]:
        """The job's result, or what it was stopped for."""
        spec = GenerateSpec.model_validate_json(orjson.dumps(job.spec))
        database = self._consumer.database
        model_id = choose_model(database, spec.model)
        started_s = time.perf_counter()
        request = self._engine.submit(find_model(self._settings, database, model_id), spec)
        why = self._follow(request, lease, None if spec.time_limit_s is None else time.monotonic() + spec.time_limit_s)
        try:
            generated = request.future.result()
        except Stopped:
            return None, why
        return {
            "outputs": generated.outputs,
            "model": model_id,
            "generation_time_ms": round((time.perf_counter() - started_s) * 1e3, 3),
            "num_tokens": generated.num_tokens,
            "finish_reasons": generated.finish_reasons,
            "usage": {
                "prompt_tokens": sum(generated.num_prompt_tokens),
                "completion_tokens": sum(generated.num_tokens),
                "total_tokens": sum(generated.num_prompt_tokens) + sum(generated.num_tokens),
            },
            "truncated": generated.truncated,
        }, None

    def _follow(self, request: Request, lease: LeaseKeeper, end_by_s: float | None) -> _Why | None:
        """Wait until the request is answered; stop it when there is a reason to, which is returned."""
        why: _Why | None = None
        while True:
            try:
                request.future.exception(timeout=_POLL_S)
                return why
            except NotYet:
                if why is None and (why := self._reason_to_stop(lease, end_by_s)) is not None:
                    request.stop()

    def _reason_to_stop(self, lease: LeaseKeeper, end_by_s: float | None) -> _Why | None:
        if lease.cancelled.is_set():
            return _Why.CANCELLED
        if lease.must_stop:
            return _Why.FENCED
        if self._drain_by_s is not None and time.monotonic() > self._drain_by_s:
            return _Why.DRAINED
        if end_by_s is not None and time.monotonic() > end_by_s:
            return _Why.TIME_LIMIT
        return None

    def _store(self, job: Job, lease: LeaseKeeper, write: Callable[[Session], list[StoredEvent]]) -> None:
        """Run the last transition until the database takes it or the lease is over; then publish its events."""
        while not lease.must_stop:
            try:
                with self._consumer.database.write() as session:
                    events = write(session)
            except Fenced:
                return
            except (Unavailable, OutOfSpace) as exc:
                logger.warning("the outcome waits", extra={"job_id": job.id, "attempt": job.attempt, "why": str(exc)})
                lease.fenced.wait(_RETRY_PAUSE_S)
                continue
            self._consumer.publisher.publish(job.id, events)
            return


def run_generate_worker(settings: Settings, *, name: str, queues: Sequence[str]) -> None:
    """Entry of the process."""
    GenerateWorker(settings, name=name, queues=queues).run()
