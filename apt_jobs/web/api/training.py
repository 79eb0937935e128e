"""`/api/training/*`: what trains now (or did last), its history and gradients; `?job_id=` names another job."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.db.access import Role
from apt_jobs.db.jobs import get_job
from apt_jobs.db.models import Job
from apt_jobs.db.series.histories import current_training_job, gradient_export, last_start
from apt_jobs.errors import NotFound
from apt_jobs.events.codec import Number
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.jobs.states import OWNED_STATES
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.api.histories import GradientsAnswer, PointsQuery, curves_of
from apt_jobs.web.api.overviews import TrainingCurves
from apt_jobs.web.schemas import is_user_script, measured
from apt_jobs.web.service import Service, service_of


class TrainingQuery(PointsQuery):
    job_id: Annotated[str, StringConstraints(max_length=40)] | None = Field(
        None, description="Default: the training that runs, else the latest."
    )


class CheckpointInfo(BaseModel):
    best_loss: Number | None
    current_epoch: int
    global_step: int


class HistoryAnswer(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    job_id: str
    training_history: TrainingCurves
    model_config_: dict[str, Any] = Field(serialization_alias="model_config", description="d_model, num_layers, ...")
    checkpoint_info: CheckpointInfo


class StatusAnswer(BaseModel):
    job_id: str | None
    is_training: bool
    state: str | None
    epoch: int | None
    num_epochs: int | None
    step: int | None
    num_steps: int | None
    train_loss: Number | None
    learning_rate: Number | None
    tokens_per_s: Number | None
    eta_s: Number | None


@endpoint(
    role=Role.VIEWER,
    tag="training",
    query=TrainingQuery,
    answers={200: HistoryAnswer},
    operation="get_training_history",
    problems={404},
)
async def get_history(request: Request) -> Response:
    """Return curves, model configuration and where the training is."""
    service = service_of(request)
    query: TrainingQuery = request.state.query
    job = await _job(service, query.job_id)
    progress = job.progress or {}
    answer = HistoryAnswer(
        job_id=job.id,
        training_history=await curves_of(service, job.id, query.points),
        model_config_=await service.read(_model_config, job),
        checkpoint_info=CheckpointInfo(
            best_loss=progress.get("best_val_loss"),
            current_epoch=progress.get("epoch", 0),
            global_step=job.step or 0,
        ),
    )
    return JSONResponse(answer.model_dump(mode="json", by_alias=True))


@endpoint(role=Role.VIEWER, tag="training", query=TrainingQuery, answers={200: GradientsAnswer}, problems={404})
async def get_training_gradients(request: Request) -> Response:
    """Return gradient norms of every layer: timeline, statistics, anomalies."""
    service = service_of(request)
    query: TrainingQuery = request.state.query
    job = await _job(service, query.job_id)
    return JSONResponse(await service.read(gradient_export, job.id, query.points))


@endpoint(
    role=Role.VIEWER,
    tag="training",
    query=TrainingQuery,
    answers={200: StatusAnswer},
    operation="get_training_status",
    problems={404},
)
async def get_status(request: Request) -> Response:
    """Return what is training now, and where it is."""
    service = service_of(request)
    query: TrainingQuery = request.state.query
    try:
        job = await _job(service, query.job_id)
    except NotFound:
        if query.job_id is not None:
            raise
        nothing = StatusAnswer(**{**dict.fromkeys(StatusAnswer.model_fields), "is_training": False})
        return JSONResponse(nothing.model_dump(mode="json"))
    progress = job.progress or {}
    answer = StatusAnswer(
        job_id=job.id,
        is_training=job.state in OWNED_STATES,
        state=job.state,
        epoch=progress.get("epoch"),
        num_epochs=None if is_user_script(job.spec) else TrainSpec.model_validate(job.spec).training.epochs,
        step=job.step,
        num_steps=job.num_steps,
        train_loss=progress.get("train_loss"),
        learning_rate=progress.get("learning_rate"),
        tokens_per_s=measured(progress.get("tokens_per_s")),
        eta_s=progress.get("eta_s"),
    )
    return JSONResponse(answer.model_dump(mode="json"))


async def _job(service: Service, job_id: str | None) -> Job:
    if job_id is None:
        job = await service.read(current_training_job)
        if job is None:
            raise NotFound("nothing was trained yet; submit a job: POST /api/jobs")
        return job
    job = await service.read(get_job, job_id)
    if job.kind != "train":
        raise NotFound(f"job {job_id!r} is a {job.kind} job; only training jobs have a history")
    return job


def _model_config(session: Session, job: Job) -> dict[str, Any]:
    """Return what the ranks built, before they are up what was asked for, and nothing of a silent user script."""
    started = last_start(session, job.id)
    if started:
        return dict(started.model_config)
    return {} if is_user_script(job.spec) else _as_history(TrainSpec.model_validate(job.spec))


def _as_history(spec: TrainSpec) -> dict[str, Any]:
    config = spec.model.model_dump()
    return {**config, "num_heads": spec.model.num_attention_heads}
