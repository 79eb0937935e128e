"""`/api/jobs`: submit, look, cancel, delete; the event log, the printed lines and the histories of one job."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.db.access import Role
from apt_jobs.db.checkpoints import best_of_job
from apt_jobs.db.events import events_after, log_events_before
from apt_jobs.db.idempotency import IdempotencyKey, create_once, known_resource
from apt_jobs.db.jobs import get_job, list_attempts
from apt_jobs.db.models import Job
from apt_jobs.db.workers import list_workers
from apt_jobs.errors import InvalidReferences, Unavailable
from apt_jobs.events.codec import LoggedEvent, splice_stored
from apt_jobs.events.columns import COLUMN_TYPES
from apt_jobs.jobs.limits import MAX_SEQ
from apt_jobs.jobs.spec import AnyJobSpec, GenerateSpec, TrainSpec, queue_of
from apt_jobs.jobs.states import JobState
from apt_jobs.operations import steer
from apt_jobs.operations import submit as operations
from apt_jobs.operations.delete_job import delete_job
from apt_jobs.operations.liveness import alive_within_s
from apt_jobs.operations.preflight import preflight
from apt_jobs.operations.waiting import waiting_of
from apt_jobs.web.api.code import require_consent
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.api.idempotency import made_job, replay_headers
from apt_jobs.web.api.job_edits import etag_of
from apt_jobs.web.api.job_queries import MAX_WAIT_S, Fields, chosen, wait_for_end
from apt_jobs.web.api.preflights import PreflightAnswer, preflight_answer
from apt_jobs.web.live.server_sent_events import event_stream, wants_event_stream
from apt_jobs.web.problems import REFERENCES_DETAIL, ProblemError, reference_faults
from apt_jobs.web.schemas import JobAnswer, at, attempt_answers, job_answer
from apt_jobs.web.service import Service, service_of
from apt_jobs.web.submissions import NO_WORKER

logger = logging.getLogger(__name__)

PUBLISH_WAIT_S = 2.0  # a submission waits no longer for the broker: the wake-up loop tries again
EVENT_STREAM = {"text/event-stream": {"type": "string", "description": "Server-sent events."}}


class Query(BaseModel):
    """Query parameters: unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SubmitQuery(Query):
    dry_run: bool = Field(False, description="Check the job and estimate what it takes; queue nothing.")


class JobQuery(Query):
    wait: float = Field(0.0, ge=0.0, le=MAX_WAIT_S, description="Answer when it has ended, or after so many seconds.")
    fields: Fields | None = Field(None, description="Only these fields, with commas between.")


class EventsQuery(Query):
    after: int = Field(0, ge=0, le=MAX_SEQ, description="Last `seq` seen.")
    limit: int = Field(200, ge=1, le=1000)
    kind: list[Annotated[str, StringConstraints(max_length=40)]] = Field(
        default_factory=list, max_length=20, description="May be repeated."
    )
    before: int | None = Field(
        None, ge=0, le=MAX_SEQ, description="The newest events before this `seq` instead, of the log's `kind`s."
    )

    @model_validator(mode="after")
    def _only_kinds_of_the_log(self) -> Self:
        """Refuse kinds that are stored by columns, which are read forwards only."""
        if self.before is not None and (not self.kind or not COLUMN_TYPES.keys().isdisjoint(self.kind)):
            raise ValueError(f"`before` needs `kind`s, and none of {', '.join(sorted(COLUMN_TYPES))}; got {self.kind}")
        return self


class LogsQuery(Query):
    after: int | None = Field(None, ge=0, le=MAX_SEQ, description="Last `seq` seen; the lines after it, oldest first.")
    before: int | None = Field(
        None, ge=0, le=MAX_SEQ, description="A `seq`: the newest lines before it. Default: the newest lines of all."
    )
    limit: int = Field(1000, ge=1, le=10_000)


class EventList(BaseModel):
    object: Literal["list"] = "list"
    data: list[dict[str, Any]] = Field(description="Events: docs/events.md has the fields of each kind.")
    has_more: bool


@endpoint(
    role=Role.SUBMITTER,
    tag="jobs",
    query=SubmitQuery,
    body=AnyJobSpec,
    answers={200: PreflightAnswer, 202: JobAnswer},
    creates=True,
)
async def submit_job(request: Request) -> Response:
    """Submit a training or generation job. The answer is durable: the job will reach an end.

    With `dry_run` it is checked alone: 200 says what it would take, and which workers could run it.
    """
    service = service_of(request)
    spec: TrainSpec | GenerateSpec = request.state.body
    require_consent(request, spec)
    if request.state.query.dry_run:
        await require_references(service, spec)
        found = await service.read(preflight, service.settings, spec)
        return JSONResponse(preflight_answer(found).model_dump(mode="json"))
    key: IdempotencyKey | None = request.state.idempotency_key
    job, is_replay = await submit_once(service, spec, key)
    headers = {"location": f"/api/jobs/{job.id}", **replay_headers(is_replay)}
    return JSONResponse(job_answer(job).model_dump(mode="json"), 202, headers=headers)


@endpoint(role=Role.VIEWER, tag="jobs", query=JobQuery, answers={200: JobAnswer}, operation="get_job")
async def get_one_job(request: Request) -> Response:
    """Return one job with its attempts, its place in the queue and what it waits for; with `wait` when it has ended."""
    service = service_of(request)
    query: JobQuery = request.state.query
    if query.wait:
        await wait_for_end(request, request.path_params["job_id"], query.wait)

    def look(session: Session, job_id: str) -> tuple[JobAnswer, str]:
        job = get_job(session, job_id)
        answer = job_answer(job)
        answer.attempts = attempt_answers(list_attempts(session, job_id))
        best = best_of_job(session, job_id)
        answer.best_checkpoint = None if best is None or best.val_loss is None else best.id
        if (waiting := waiting_of(session, job, alive_within_s(service.settings))) is not None:
            answer.queue_position, answer.waiting_for = waiting.position, waiting.reason
            answer.expected_start_at = at(waiting.expected_start_at)
        return answer, etag_of(job)

    answer, etag = await service.read(look, request.path_params["job_id"])
    return JSONResponse(chosen(answer, query.fields), headers={"etag": etag})


@endpoint(role=Role.SUBMITTER, tag="jobs", answers={200: JobAnswer}, problems={409})
async def cancel_job(request: Request) -> Response:
    """Cancel a job: at once if it waits, within seconds if it runs. Repeating it changes nothing."""
    return await _changed(request, steer.cancel_job)


@endpoint(role=Role.SUBMITTER, tag="jobs", answers={200: JobAnswer}, problems={409})
async def pause_job(request: Request) -> Response:
    """Pause a job: at once if it waits; a training saves its step and frees its GPUs. Repeating changes nothing."""
    return await _changed(request, steer.pause_job)


@endpoint(role=Role.SUBMITTER, tag="jobs", answers={200: JobAnswer}, problems={409})
async def resume_job(request: Request) -> Response:
    """Let a paused job go on from its checkpoint when a worker is free."""
    return await _changed(request, steer.resume_job)


@endpoint(role=Role.SUBMITTER, tag="jobs", answers={200: JobAnswer}, problems={409, 422})
async def retry_job(request: Request) -> Response:
    """Queue a failed, cancelled or dead job again; it goes on from its last checkpoint."""
    settings = service_of(request).settings

    return await _changed(request, lambda session, job_id: steer.retry_job(session, settings, job_id))


@endpoint(role=Role.ADMIN, tag="jobs", answers={204: None}, operation="delete_job", problems={409})
async def remove_job(request: Request) -> Response:
    """Delete an ended job with its log, its checkpoints and its files."""
    service = service_of(request)
    await asyncio.to_thread(delete_job, service.database, service.settings, request.path_params["job_id"])
    return Response(status_code=204)


@endpoint(
    role=Role.VIEWER,
    tag="jobs",
    query=EventsQuery,
    answers={200: EventList},
    operation="list_events",
    media=EVENT_STREAM,
)
async def get_events(request: Request) -> Response:
    """Return the job's event log after a `seq`, in order; with `Accept: text/event-stream` live, to its end."""
    query: EventsQuery = request.state.query
    if wants_event_stream(request):
        return await event_stream(request, query.after, query.kind)
    if query.before is not None:
        service = service_of(request)
        job = await service.read(get_job, request.path_params["job_id"])
        rows = await service.read(log_events_before, job.id, query.before, query.limit + 1, query.kind)
        return _event_list(rows[-query.limit :], has_more=len(rows) > query.limit)
    return await _event_page(request, query.after, query.limit, query.kind)


@endpoint(role=Role.VIEWER, tag="jobs", query=LogsQuery, answers={200: EventList}, operation="list_log_lines")
async def get_logs(request: Request) -> Response:
    """Return what the ranks printed as `log` events, in order: the newest, or those `after` or `before` a `seq`.

    `has_more` says whether there is more in that direction; older lines come with `before` the first `seq` of a page.
    """
    query: LogsQuery = request.state.query
    if query.after is not None:
        if query.before is not None:
            raise ProblemError(422, "`after` reads forwards and `before` backwards; send one of them")
        return await _event_page(request, query.after, query.limit, ["log"])
    service = service_of(request)
    job = await service.read(get_job, request.path_params["job_id"])
    before = MAX_SEQ if query.before is None else query.before
    rows = await service.read(log_events_before, job.id, before, query.limit + 1, ["log"])
    return _event_list(rows[-query.limit :], has_more=len(rows) > query.limit)


async def _changed(request: Request, change: Callable[[Session, str], steer.Steered]) -> Response:
    """Change one job's state, and tell those who watch it at once."""
    service = service_of(request)
    job, events = await service.write(change, request.path_params["job_id"])
    await service.publish(job.id, events)
    if job.state == JobState.QUEUED:
        service.wake_up_now.set()
    return JSONResponse(job_answer(job).model_dump(mode="json"))


async def submit_once(service: Service, spec: TrainSpec | GenerateSpec, key: IdempotencyKey | None) -> tuple[Job, bool]:
    """Submit a job, or return the one that the key made; and whether it was made before."""
    if key is not None and (known := await service.read(known_resource, key)) is not None:
        return await made_job(service, key, known), True  # whatever of its references is gone by now
    return await submit(service, spec, key)


async def submit(
    service: Service,
    spec: TrainSpec | GenerateSpec,
    key: IdempotencyKey | None,
    also: Callable[[Session, Job], None] | None = None,
) -> tuple[Job, bool]:
    """Submit a job, then wake a worker, waiting at most `PUBLISH_WAIT_S` for the broker.

    `also` is done in the same transaction.
    """

    def insert(session: Session) -> tuple[Job | str, bool]:
        made: list[Job] = []

        def create() -> str:
            made.append(operations.submit_job(session, service.settings, spec))
            if also is not None:
                also(session, made[0])
            return made[0].id

        job_id, is_replay = create_once(session, key, create)
        return (job_id if is_replay else made[0]), is_replay

    job, is_replay = await service.write(insert)
    if isinstance(job, str):
        assert key is not None  # only a key makes a replay
        return await made_job(service, key, job), True
    try:
        async with asyncio.timeout(PUBLISH_WAIT_S):
            await asyncio.to_thread(service.wake_ups.wake_up, job.queue)
    except (TimeoutError, Unavailable):
        logger.warning("the wake-up waits for the broker", extra={"job_id": job.id})
        service.wake_up_now.set()
    return job, is_replay


async def require_references(service: Service, spec: TrainSpec | GenerateSpec, under: str = "#") -> None:
    """Refuse at once what no worker could do. `under` is where the job is in the body.

    Raises:
        ProblemError: 422, with the field.
    """
    try:
        await service.read(operations.require_references, service.settings, spec)
    except InvalidReferences as exc:
        raise ProblemError(422, REFERENCES_DETAIL, kind="invalid-request", errors=reference_faults(exc, under)) from exc


async def require_worker(service: Service, spec: TrainSpec | GenerateSpec) -> None:
    """Refuse what nobody would work on, where somebody waits for it.

    Raises:
        ProblemError: 503.
    """
    alive = await service.read(list_workers, alive_within_s(service.settings))
    if not any(queue_of(spec) in worker.queues for worker in alive):
        raise ProblemError(503, NO_WORKER)


async def _event_page(request: Request, after: int, limit: int, kinds: Sequence[str]) -> Response:
    service = service_of(request)
    job = await service.read(get_job, request.path_params["job_id"])
    rows = await service.read(events_after, job.id, after, limit + 1, kinds)
    return _event_list(rows[:limit], has_more=len(rows) > limit)


def _event_list(rows: Sequence[LoggedEvent], *, has_more: bool) -> Response:
    encoded = [splice_stored(row.seq, row.kind, row.attempt, row.at, row.payload) for row in rows]
    body = b'{"object":"list","data":[%b],"has_more":%b}' % (b",".join(encoded), b"true" if has_more else b"false")
    return Response(body, media_type="application/json")
