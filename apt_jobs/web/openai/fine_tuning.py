"""`/v1/fine_tuning/jobs`: training jobs on uploaded files, as OpenAI's clients make, steer and watch them."""

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, Field, StringConstraints
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.artifacts.conversations import RowKind
from apt_jobs.artifacts.files import file_path
from apt_jobs.db.access import Role
from apt_jobs.db.checkpoints import best_of_job, list_checkpoints
from apt_jobs.db.dialect_models import FineTuning
from apt_jobs.db.events import log_events_before
from apt_jobs.db.files import get_file
from apt_jobs.db.fine_tunings import get_fine_tuning, list_fine_tunings
from apt_jobs.db.idempotency import create_once
from apt_jobs.db.models import Checkpoint, Job
from apt_jobs.errors import InvalidInput, InvalidReferences, NotFound
from apt_jobs.events.codec import LoggedEvent
from apt_jobs.jobs.ids import new_fine_tuning_id
from apt_jobs.jobs.limits import MAX_SEQ
from apt_jobs.jobs.spec import TrainSpec, parse_spec
from apt_jobs.jobs.states import JobState
from apt_jobs.operations import steer
from apt_jobs.operations.submit import submit_job
from apt_jobs.web.api.idempotency import replay_headers
from apt_jobs.web.api.models import require_model
from apt_jobs.web.openai.endpoint import Identified, PageQuery, dialect, owner_of, seconds, seen_by
from apt_jobs.web.openai.files import FINE_TUNE, field_error
from apt_jobs.web.openai.fine_tuning_requests import FineTuningRequest, hyperparameters_of
from apt_jobs.web.openai.generation_jobs import no_such_model
from apt_jobs.web.openai.training_files import check_training_lines, publish_dataset
from apt_jobs.web.service import Service, service_of

Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
_STATUS_OF: dict[str, Status] = {
    JobState.QUEUED: "queued",
    JobState.RUNNING: "running",
    JobState.PAUSING: "running",
    JobState.PAUSED: "paused",
    JobState.SUCCEEDED: "succeeded",
    JobState.FAILED: "failed",
    JobState.DEAD: "failed",
    JobState.CANCELLED: "cancelled",
}
_KINDS = ("state", "started", "validation", "checkpoint", "incident", "failure", "finished")
_LEVELS: dict[str, Literal["info", "warn", "error"]] = {"incident": "warn", "failure": "error"}


class TunedHyperparameters(BaseModel):
    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float


class UsedSupervised(BaseModel):
    hyperparameters: TunedHyperparameters


class UsedMethod(BaseModel):
    type: Literal["supervised"] = "supervised"
    supervised: UsedSupervised


class FineTuningError(BaseModel):
    code: str
    message: str
    param: str | None


class FineTuningObject(Identified):
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    error: FineTuningError | None
    model: str
    fine_tuned_model: str | None = Field(description="The best checkpoint, when the job has succeeded.")
    status: Status
    organization_id: str = ""
    result_files: list[str] = Field(default_factory=list)
    training_file: str
    validation_file: None = None
    trained_tokens: int | None
    hyperparameters: TunedHyperparameters
    method: UsedMethod
    seed: int
    estimated_finish: int | None
    integrations: list[str] = Field(default_factory=list)
    metadata: dict[str, str] | None
    user_provided_suffix: str | None
    job_id: str = Field(description="The training job: `/api/jobs/{id}` has its curves and gradients.")


class FineTuningList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FineTuningObject]
    has_more: bool


class FineTuningEvent(Identified):
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class FineTuningEventList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FineTuningEvent]
    has_more: bool


class CheckpointMetrics(BaseModel):
    step: int
    train_loss: float | None
    valid_loss: float | None


class FineTuningCheckpoint(Identified):
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: CheckpointMetrics


class FineTuningCheckpointList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FineTuningCheckpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool


class EventPageQuery(PageQuery):
    after: Annotated[str, StringConstraints(pattern=r"^ftevent-[0-9]{1,16}$")] | None = Field(
        None, description="Last id seen."
    )


@dialect(
    role=Role.SUBMITTER,
    body=FineTuningRequest,
    answers={200: FineTuningObject},
    creates=True,
    operation="create_fine_tuning_job",
    problems={404, 507},
)
async def create_job(request: Request) -> Response:
    """Train a model further on an uploaded file: JSON lines with `messages`, `text`, or `prompt` and `completion`."""
    service, body = service_of(request), request.state.body
    owner, seen, key = owner_of(request), seen_by(request), request.state.idempotency_key
    size_bytes, kind = await _checked_file(service, body, seen)
    fine_tuning_id = new_fine_tuning_id()
    dataset = await asyncio.to_thread(publish_dataset, service.settings, body.training_file)
    base_model = (await require_model(service, body.model)).id
    spec = body.job(fine_tuning_id, base_model, dataset, size_bytes, kind)

    def create(session: Session) -> str:
        get_file(session, body.training_file, seen)  # it may have been deleted meanwhile
        job = submit_job(session, service.settings, spec)
        row = FineTuning(
            id=fine_tuning_id,
            owner=owner,
            job_id=job.id,
            model=body.model,
            training_file_id=body.training_file,
            suffix=body.suffix,
            hyperparameters=hyperparameters_of(spec),
            notes=body.metadata,
        )
        session.add(row)
        session.flush()
        return row.id

    def create_or_find(session: Session) -> tuple[FineTuningObject, bool]:
        made_id, is_replay = create_once(session, key, lambda: create(session))
        return _answer(session, *get_fine_tuning(session, made_id, None)), is_replay

    try:
        answer, is_replay = await service.write(create_or_find)
    except InvalidReferences as exc:
        if "base_model" in str(exc):
            raise no_such_model(body.model) from exc
        raise field_error("training_file", str(exc)) from exc
    service.wake_up_now.set()
    return JSONResponse(answer.model_dump(), headers=replay_headers(is_replay))


@dialect(role=Role.VIEWER, query=PageQuery, answers={200: FineTuningList}, operation="list_fine_tuning_jobs")
async def get_jobs(request: Request) -> Response:
    """List fine-tuning jobs, the newest first."""
    query: PageQuery = request.state.query

    def read(session: Session) -> FineTuningList:
        rows, has_more = list_fine_tunings(session, seen_by(request), after=query.after, limit=query.limit)
        return FineTuningList(data=[_answer(session, row, job) for row, job in rows], has_more=has_more)

    return JSONResponse((await service_of(request).read(read)).model_dump())


@dialect(role=Role.VIEWER, answers={200: FineTuningObject}, operation="get_fine_tuning_job")
async def get_one_job(request: Request) -> Response:
    """Return one fine-tuning job."""

    def read(session: Session) -> FineTuningObject:
        return _answer(session, *_found(session, request))

    return JSONResponse((await service_of(request).read(read)).model_dump())


@dialect(role=Role.SUBMITTER, answers={200: FineTuningObject}, operation="cancel_fine_tuning_job", problems={409})
async def cancel_job(request: Request) -> Response:
    """Cancel a fine-tuning job."""
    return await _steered(request, steer.cancel_job)


@dialect(role=Role.SUBMITTER, answers={200: FineTuningObject}, operation="pause_fine_tuning_job", problems={409})
async def pause_job(request: Request) -> Response:
    """Pause a fine-tuning job: it saves its step and frees its GPUs."""
    return await _steered(request, steer.pause_job)


@dialect(role=Role.SUBMITTER, answers={200: FineTuningObject}, operation="resume_fine_tuning_job", problems={409})
async def resume_job(request: Request) -> Response:
    """Let a paused fine-tuning job go on."""
    return await _steered(request, steer.resume_job)


@dialect(
    role=Role.VIEWER, query=EventPageQuery, answers={200: FineTuningEventList}, operation="list_fine_tuning_events"
)
async def get_events(request: Request) -> Response:
    """List what happened to a fine-tuning job, the newest first."""
    query: EventPageQuery = request.state.query
    before = MAX_SEQ if query.after is None else int(query.after.removeprefix("ftevent-"))

    def read(session: Session) -> FineTuningEventList:
        _, job = _found(session, request)
        rows = log_events_before(session, job.id, before, query.limit + 1, _KINDS)[::-1]
        events = [_event(row) for row in rows[: query.limit]]
        return FineTuningEventList(data=events, has_more=len(rows) > query.limit)

    return JSONResponse((await service_of(request).read(read)).model_dump())


@dialect(
    role=Role.VIEWER,
    query=PageQuery,
    answers={200: FineTuningCheckpointList},
    operation="list_fine_tuning_checkpoints",
)
async def get_checkpoints(request: Request) -> Response:
    """List the checkpoints of a fine-tuning job, the newest first. Each is a model of `/v1/models`."""
    query: PageQuery = request.state.query

    def read(session: Session) -> FineTuningCheckpointList:
        row, job = _found(session, request)
        rows, has_more = list_checkpoints(session, job_id=job.id, after=query.after, limit=query.limit)
        found = [_checkpoint(row.id, one) for one in rows]
        first_id, last_id = (found[0].id, found[-1].id) if found else (None, None)
        return FineTuningCheckpointList(data=found, first_id=first_id, last_id=last_id, has_more=has_more)

    return JSONResponse((await service_of(request).read(read)).model_dump())


async def _checked_file(service: Service, body: FineTuningRequest, seen: str | None) -> tuple[int, RowKind]:
    """Return the size of the training file, whose lines can all train, and what they hold.

    Raises:
        ProblemError: 400, they cannot, or there is no such file.
    """
    try:
        file = await service.read(get_file, body.training_file, seen)
    except NotFound as exc:
        raise field_error("training_file", str(exc), body.training_file) from exc
    if file.purpose != FINE_TUNE:
        raise field_error("training_file", f"the file's purpose is {file.purpose!r}; upload it for {FINE_TUNE!r}")
    try:
        kind = await asyncio.to_thread(check_training_lines, file_path(service.settings, file.id))
    except InvalidInput as exc:
        raise field_error("training_file", str(exc)) from exc
    except OSError as exc:
        raise field_error("training_file", f"its content cannot be read: {exc.strerror}") from exc
    return file.size_bytes, kind


async def _steered(request: Request, change: Callable[[Session, str], steer.Steered]) -> Response:
    service = service_of(request)

    def write(session: Session) -> tuple[FineTuningObject, steer.Steered]:
        row, job = _found(session, request)
        changed = change(session, job.id)
        return _answer(session, row, changed[0]), changed

    answer, (job, events) = await service.write(write)
    await service.publish(job.id, events)
    if job.state == JobState.QUEUED:
        service.wake_up_now.set()
    return JSONResponse(answer.model_dump())


def _found(session: Session, request: Request) -> tuple[FineTuning, Job]:
    return get_fine_tuning(session, request.path_params["fine_tuning_job_id"], seen_by(request))


def _answer(session: Session, row: FineTuning, job: Job) -> FineTuningObject:
    best = best_of_job(session, job.id) if job.state == JobState.SUCCEEDED else None
    spec = parse_spec(job.spec)
    assert isinstance(spec, TrainSpec)
    status = _STATUS_OF[job.state]
    error = None
    if status == "failed":
        error = FineTuningError(code="training_failed", message=job.reason or "no reason was given", param=None)
    progress = job.progress or {}
    eta_s = progress.get("eta_s") if status == "running" else None
    return FineTuningObject(
        id=row.id,
        created_at=seconds(row.created_at),
        finished_at=seconds(job.finished_at),
        error=error,
        model=row.model,
        fine_tuned_model=None if best is None else best.id,
        status=status,
        training_file=row.training_file_id,
        trained_tokens=None,
        hyperparameters=TunedHyperparameters(**row.hyperparameters),
        method=UsedMethod(supervised=UsedSupervised(hyperparameters=TunedHyperparameters(**row.hyperparameters))),
        seed=spec.training.seed,
        estimated_finish=None if eta_s is None else int(time.time() + float(eta_s)),
        metadata=row.notes,
        user_provided_suffix=row.suffix,
        job_id=job.id,
    )


def _event(row: LoggedEvent) -> FineTuningEvent:
    data: dict[str, Any] = orjson.loads(row.payload)
    return FineTuningEvent(
        id=f"ftevent-{row.seq}",
        created_at=seconds(row.at),
        level=_LEVELS.get(row.kind, "info"),
        message=_words(row.kind, data),
        type="metrics" if row.kind == "validation" else "message",
        data=data,
    )


def _words(kind: str, data: dict[str, Any]) -> str:
    match kind:
        case "state":
            reason = f": {data['reason']}" if data.get("reason") else ""
            return f"The job is {data['state']}{reason}"
        case "started":
            return f"Training began: {data['num_steps']} steps of {data['tokens_per_step']} tokens on {data['device']}"
        case "validation":
            return f"Step {data['step']}: validation loss {data['val_loss']}"
        case "checkpoint":
            return f"Checkpoint {data['checkpoint_id']} was saved at step {data['step']}"
        case "finished":
            return f"Training finished at step {data['step']}"
    return str(data.get("message", kind))


def _checkpoint(fine_tuning_id: str, row: Checkpoint) -> FineTuningCheckpoint:
    return FineTuningCheckpoint(
        id=row.id,
        created_at=seconds(row.created_at),
        fine_tuning_job_id=fine_tuning_id,
        fine_tuned_model_checkpoint=row.id,
        step_number=row.step,
        metrics=CheckpointMetrics(step=row.step, train_loss=row.train_loss, valid_loss=row.val_loss),
    )
