"""The generation worker: claims generation jobs and feeds them to one engine, which serves them together.

A thread of Celery's pool claims all jobs that are due in one transaction, keeps their leases and stores their outcomes
together, and sends what is added to their texts to those who watch; the engine's own threads compute.
"""

import logging
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import orjson
from sqlalchemy.orm import Session

from apt_jobs.artifacts.models import EXTERNAL_PREFIX, ModelFolders
from apt_jobs.db.hand_backs import hand_back
from apt_jobs.db.job_groups import finish_succeeded
from apt_jobs.db.jobs import Claimed, finish, finish_faulted, get_job
from apt_jobs.db.models import Job
from apt_jobs.errors import AptJobsError, Fenced, InvalidCheckpoint, NotFound, OutOfSpace, Unavailable, WorkerLacks
from apt_jobs.events.kinds import StateChanged, StoredEvent
from apt_jobs.events.tokens import End, GenerationResult, TokenLogprob, TokenMessage, TokenPublisher
from apt_jobs.generation.catalog import choose_model, find_model
from apt_jobs.generation.engine import Engine
from apt_jobs.generation.external import ExternalEngine
from apt_jobs.generation.request import OnText, Request, Stopped
from apt_jobs.jobs.retry import Fault, retry_rules
from apt_jobs.jobs.spec import CHECKPOINT_ID_PATTERN, GenerateSpec
from apt_jobs.jobs.states import JobState
from apt_jobs.private_files import keep_private
from apt_jobs.settings import Settings
from apt_jobs.workers.consumer import Consumer
from apt_jobs.workers.gpus import describe_gpus, find_gpus
from apt_jobs.workers.lease_set import LeaseSet

logger = logging.getLogger(__name__)

MAX_GROUP = 64  # jobs that are claimed together, so that their leases fit one transaction
DRAIN_GRACE_S = 20.0  # a draining worker finishes what it can in so long and hands the rest back
MAX_TRACEBACK_CHARS = 8_000
_POLL_S = 0.05  # how soon a cancel, a lost lease or the end of the grace is seen
_RETRY_PAUSE_S = 1.0


_Added = tuple[int, str, list[TokenLogprob]]  # index of an output, what was added to it, its tokens
_Outcome = dict[str, Any] | Callable[[Session], list[StoredEvent]]  # a result, or the transition of another end


class _Why(Enum):
    """What a request was stopped for."""

    CANCELLED = "cancelled"
    FENCED = "the lease was lost"
    DRAINED = "the worker was drained"
    TIME_LIMIT = "the job's time limit was reached"


class GenerateWorker:
    """One engine and as many waiting threads as `generate_concurrency`. `device`: "auto", "cpu" or "cuda"."""

    def __init__(
        self,
        settings: Settings,
        *,
        name: str,
        queues: Sequence[str],
        device: str = "auto",
        metrics_port: int | None = None,
    ) -> None:
        self._settings, gpus = settings, find_gpus(None)
        fractions = settings.gpu_memory_fractions
        self._engine = Engine(
            settings.warm_models,
            device,
            compile_graphs=settings.generate_compile,
            num_threads=settings.generate_threads or default_threads(),
            warm_adapters=settings.warm_adapters,
            memory_fraction=fractions.get(gpus[0], 1.0) if gpus else 1.0,
        )
        key = settings.engine_api_key
        self._external = settings.engine_url and ExternalEngine(
            settings.engine_url,
            None if key is None else key.get_secret_value(),
            timeout_s=settings.engine_timeout_s,
        )
        self._model_ids: dict[Path, str] = {}  # of folders that were asked for
        self._tokens = TokenPublisher(settings.redis)
        self._drain_by_s: float | None = None  # CLOCK_MONOTONIC seconds; None: not draining
        self._consumer = Consumer(
            settings,
            name=name,
            kind="generate",
            queues=queues,
            concurrency=settings.generate_concurrency,
            serve=self._serve,
            group_size=MAX_GROUP,
            on_drain=self._drain,
            on_resume=self._resume,
            describe_gpus=lambda: describe_gpus(gpus),
            warm_models=self._warm_models,
            metrics_port=metrics_port,
        )

    def run(self) -> None:
        """Work until SIGTERM or Ctrl-C."""
        try:
            self._consumer.run()
        finally:
            self._engine.close()
            if self._external:
                self._external.close()
            self._tokens.close()

    def _drain(self) -> None:
        self._drain_by_s = time.monotonic() + min(DRAIN_GRACE_S, self._settings.drain_timeout_s)

    def _resume(self) -> None:
        self._drain_by_s = None

    def _warm_models(self) -> list[str]:
        """Return the ids of the models that are in memory, and of those that the external engine has."""
        warm = [self._model_ids[folder] for folder in self._engine.warm_folders if folder in self._model_ids]
        return sorted(warm) + (self._external.model_ids if self._external else [])

    def _serve(self, claims: Sequence[Claimed]) -> None:
        jobs = [claimed.job for claimed in claims]
        with LeaseSet(
            self._consumer.database, jobs, lease_s=self._settings.lease_s, heartbeat_s=self._settings.heartbeat_s
        ) as leases:
            changed = threading.Event()
            found: dict[str | None, tuple[str, ModelFolders]] = {}
            served = [self._start(job, changed, found) for job in jobs]
            # after the engine has begun
            self._consumer.publisher.publish_all({claimed.job.id: [claimed.event] for claimed in claims})
            while served:
                changed.wait(_POLL_S)
                changed.clear()
                self._publish_text(served)
                ended = [each for each in served if each.is_done]
                served = [each for each in served if not each.is_done]
                self._store(ended, leases)
                for each in served:
                    if each.why is None and (why := self._reason_to_stop(each, leases)) is not None:
                        each.stop(why)

    def _publish_text(self, served: Sequence["_Served"]) -> None:
        """Send what was added to texts that somebody watches."""
        messages = [(each.job.id, each.next_message(added)) for each in served if (added := each.pop_added())]
        if messages:
            self._tokens.publish(messages)

    def _start(
        self, job: Job, changed: threading.Event, found: dict[str | None, tuple[str, ModelFolders]]
    ) -> "_Served":
        """Hand a job to the engine; one that cannot begin has ended. `found`: models that were looked up already."""
        served = _Served(job)
        try:
            spec = GenerateSpec.model_validate_json(orjson.dumps(job.spec))
            if spec.time_limit_s is not None:
                served.end_by_s = time.monotonic() + spec.time_limit_s
            on_text = served.receive(changed) if spec.stream else None
            if spec.model is not None and spec.model.startswith(EXTERNAL_PREFIX):
                served.model_id, served.request = spec.model, self._submit_external(spec.model, spec, on_text)
                served.request.future.add_done_callback(lambda _: changed.set())
                return served
            if spec.model not in found:
                model_id = choose_model(self._consumer.database, spec.model)
                found[spec.model] = model_id, self._find(model_id)
            served.model_id, folders = found[spec.model]
            self._model_ids[[folders.folder, *folders.adapters][-1]] = served.model_id
            served.request = self._engine.submit(folders.folder, spec, on_text, adapters=folders.adapters)
            served.request.future.add_done_callback(lambda _: changed.set())
        except Exception as exc:  # `_outcome` tells one kind from another
            served.error = exc
            changed.set()
        return served

    def _submit_external(self, model_id: str, spec: GenerateSpec, on_text: OnText | None) -> Request:
        if not self._external:
            raise WorkerLacks(f"model {model_id} is an external engine's: this worker has no APT_JOBS_ENGINE_URL")
        return self._external.submit(model_id, spec, on_text)

    def _find(self, model_id: str) -> ModelFolders:
        """Return the folders of a model.

        Raises:
            WorkerLacks: it is not on this machine.
            NotFound: it is a checkpoint that was deleted, or an adapter whose base model was.
        """
        try:
            return find_model(self._settings, self._consumer.database, model_id)
        except InvalidCheckpoint as exc:
            raise WorkerLacks(str(exc)) from exc
        except NotFound as exc:
            if CHECKPOINT_ID_PATTERN.match(model_id):
                raise
            raise WorkerLacks(str(exc)) from exc

    def _outcome(self, served: "_Served") -> "_Outcome | None":
        """Return the result, or the transition that ends the attempt. None: it is another attempt's job now."""
        job = served.job

        def ends(state: JobState, **fields: Any) -> Callable[[Session], list[StoredEvent]]:
            return lambda session: finish(session, job.id, job.attempt, state, **fields)

        def cancelled(session: Session) -> list[StoredEvent]:
            reason = get_job(session, job.id).reason  # who cancels says why in the row
            return finish(session, job.id, job.attempt, JobState.CANCELLED, reason=reason)

        def handed_back(session: Session) -> list[StoredEvent]:
            if get_job(session, job.id).cancel_requested_at is not None:
                return cancelled(session)
            return finish(session, job.id, job.attempt, JobState.QUEUED, reason=_Why.DRAINED.value)

        rules = retry_rules(self._settings)
        try:
            result, why = served.result()
        except (WorkerLacks, OutOfSpace) as exc:  # another worker may have it
            lacks = str(exc)
            return lambda session: hand_back(session, job.id, job.attempt, lacks, rules)
        except Unavailable as exc:  # not the job's fault: another attempt may do better
            reason = str(exc)
            return lambda session: finish_faulted(
                session, job.id, job.attempt, reason, fault=Fault.INFRASTRUCTURE, rules=rules
            )
        except AptJobsError as exc:
            error = {"message": str(exc), "error": type(exc).__name__, "traceback": None, "rank": None}
            return ends(JobState.FAILED, reason=str(exc), error=error)
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
        assert result is not None
        return result

    def _reason_to_stop(self, served: "_Served", leases: LeaseSet) -> _Why | None:
        if leases.is_cancelled(served.job.id):
            return _Why.CANCELLED
        if leases.must_stop(served.job.id):
            return _Why.FENCED
        if self._drain_by_s is not None and time.monotonic() > self._drain_by_s:
            return _Why.DRAINED
        if served.end_by_s is not None and time.monotonic() > served.end_by_s:
            return _Why.TIME_LIMIT
        return None

    def _store(self, ended: Sequence["_Served"], leases: LeaseSet) -> None:
        """Run last transitions until the database takes them or the leases are over; then publish what happened."""
        left = [(each, outcome) for each in ended if (outcome := self._outcome(each)) is not None]
        while left := [(each, outcome) for each, outcome in left if not leases.must_stop(each.job.id)]:
            try:
                with self._consumer.database.write() as session:
                    stored = _write_outcomes(session, left)
            except (Unavailable, OutOfSpace) as exc:
                logger.warning("outcomes wait", extra={"job_ids": [each.job.id for each, _ in left], "why": str(exc)})
                time.sleep(_RETRY_PAUSE_S)
                continue
            self._publish_ends(left, stored)
            break
        for each in ended:
            leases.drop(each.job.id)

    def _publish_ends(
        self, ended: Sequence[tuple["_Served", "_Outcome"]], stored: Mapping[str, list[StoredEvent]]
    ) -> None:
        """Send results to who waits for them, then the events."""
        messages = []
        for each, outcome in ended:
            events = [event.event for event in stored.get(each.job.id, []) if isinstance(event.event, StateChanged)]
            if events:
                result = GenerationResult.model_construct(**outcome) if isinstance(outcome, dict) else None
                end = End.model_construct(state=str(events[-1].state), result=result)
                messages.append((each.job.id, each.next_message(each.pop_added(), end)))
        self._tokens.publish(messages)
        self._consumer.publisher.publish_all(stored)


def _write_outcomes(session: Session, ended: Sequence[tuple["_Served", "_Outcome"]]) -> dict[str, list[StoredEvent]]:
    """Store outcomes: results together, other ends one by one. An attempt that was fenced has no event."""
    stored: dict[str, list[StoredEvent]] = {}
    results = {(each.job.id, each.job.attempt): result for each, result in ended if isinstance(result, dict)}
    for event in finish_succeeded(session, results) if results else ():
        stored[event.job_id] = [event]
    for each, write in ended:
        if isinstance(write, dict):
            continue
        try:
            stored[each.job.id] = write(session)
        except Fenced:
            logger.info("an attempt was fenced", extra={"job_id": each.job.id, "attempt": each.job.attempt})
    return stored


@dataclass(slots=True, eq=False)
class _Served:
    """One job from its claim to its outcome."""

    job: Job
    started_s: float = field(default_factory=time.perf_counter)
    model_id: str = ""
    request: Request | None = None
    error: Exception | None = None  # why it could not begin
    end_by_s: float | None = None
    why: _Why | None = None  # it was told to stop
    num_messages: int = 0
    _added: deque[_Added] = field(default_factory=deque)  # not sent yet

    @property
    def is_done(self) -> bool:
        return self.request is None or self.request.is_over

    def receive(self, changed: threading.Event) -> OnText:
        """Return what the engine calls with what it added to an output."""

        def add(index: int, text: str, logprobs: list[TokenLogprob]) -> None:
            self._added.append((index, text, logprobs))
            changed.set()

        return add

    def pop_added(self) -> list[_Added]:
        """Return what was added since the last time, what is added meanwhile left for the next."""
        return [self._added.popleft() for _ in range(len(self._added))]

    def next_message(self, added: list[_Added], end: End | None = None) -> TokenMessage:
        """Make the next message of this attempt."""
        message = TokenMessage.model_construct(
            attempt=self.job.attempt,
            number=self.num_messages,
            deltas=[(index, text) for index, text, _ in added],
            logprobs=[logprobs for *_, logprobs in added],
            end=end,
        )
        self.num_messages += 1
        return message

    def stop(self, why: _Why) -> None:
        """End it before its next token."""
        self.why = why
        if self.request is not None:
            self.request.stop()

    def result(self) -> tuple[dict[str, Any] | None, _Why | None]:
        """Return the job's result, or what it was stopped for; raise what it failed with."""
        if self.error is not None:
            raise self.error
        assert self.request is not None
        try:
            generated = self.request.future.result()
        except Stopped:
            return None, self.why
        num_read, num_added = sum(generated.num_prompt_tokens), sum(generated.num_tokens)
        logprobs = {} if generated.logprobs is None else {"logprobs": generated.logprobs}
        return {
            "outputs": generated.outputs,
            "model": self.model_id,
            "generation_time_ms": round((time.perf_counter() - self.started_s) * 1e3, 3),
            "num_tokens": generated.num_tokens,
            "finish_reasons": generated.finish_reasons,
            "truncated": generated.truncated,
            "usage": {
                "prompt_tokens": num_read,
                "completion_tokens": num_added,
                "total_tokens": num_read + num_added,
                "cached_tokens": generated.num_reused,
            },
            **logprobs,
        }, None


def run_generate_worker(
    settings: Settings, *, name: str, queues: Sequence[str], metrics_port: int | None = None
) -> None:
    """Entry of the process."""
    keep_private(settings.root)
    GenerateWorker(settings, name=name, queues=queues, metrics_port=metrics_port).run()


def default_threads() -> int:
    """Return half of the cores: a training on the same machine has the others."""
    return max(1, len(os.sched_getaffinity(0)) // 2)
