"""`/api/jobs/{id}/metrics` and `/gradients`: the histories of one job, or a range of its steps, in bounded answers."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal, Self

import orjson
from pydantic import BaseModel, Field, model_validator
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from apt_jobs.db.access import Role
from apt_jobs.db.jobs import get_job
from apt_jobs.db.series.custom_metrics import CustomMetric, MetricLogs
from apt_jobs.db.series.histories import gradient_export, gradient_overview, layer_names, training_history
from apt_jobs.db.series.table import HistoryTable
from apt_jobs.events.codec import finite_or_name
from apt_jobs.jobs.limits import MAX_STEP
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.api.exports import MEDIA_TYPES, ExportFormat, export_filename, exported
from apt_jobs.web.api.jobs import Query
from apt_jobs.web.api.overviews import (
    MAX_POINTS,
    MEDIA_TYPE,
    GradientOverviewAnswer,
    TrainingCurves,
    overview_answer,
    overview_bytes,
    points_that_fit,
    training_curves,
)
from apt_jobs.web.problems import ProblemError
from apt_jobs.web.service import Service, service_of

BINARY = {MEDIA_TYPE: {"type": "string", "format": "binary", "description": "docs/histories.md has the form."}}
FILES = {kind: {} if kind == "application/json" else {"type": "string"} for kind in MEDIA_TYPES.values()}
MAX_EXPORTS = 4  # at once in one process: each keeps a thread busy
MAX_METRIC_LOG_BYTES = 256 << 20  # of custom metrics that are kept for the next request
METRIC_LOGS = MetricLogs(MAX_METRIC_LOG_BYTES)
_exports = asyncio.Semaphore(MAX_EXPORTS)


class PointsQuery(Query):
    points: int = Field(1000, ge=1, le=10_000, description="Max. points in the answer, evenly spread.")


class RangeQuery(Query):
    from_step: int = Field(0, ge=0, le=MAX_STEP, description="First step of the range.")
    to_step: int = Field(MAX_STEP, ge=0, le=MAX_STEP, description="Last step of the range; it belongs to it.")

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.from_step > self.to_step:
            raise ValueError(f"from_step {self.from_step} is after to_step {self.to_step}")
        return self


class MetricsQuery(RangeQuery, PointsQuery):
    pass


class OverviewQuery(RangeQuery):
    points: int | None = Field(
        None, ge=1, le=MAX_POINTS, description="Max. points in the answer; default: as many as make 200 KB."
    )
    format: Literal["json", "binary"] | None = Field(
        None, description="Default: binary if `Accept` names its media type, else json."
    )


class ExportQuery(Query):
    format: ExportFormat = Field(description="Of the file.")


class CustomMetricAnswer(BaseModel):
    """A metric that the job's script logged. A value that is not finite is "NaN", "Infinity" or "-Infinity"."""

    steps: list[int]
    values: list[float | str]
    last: float | str = Field(description="Of the last step in the range.")
    min: float | None = Field(description="Of the finite values in the range; null: there is none.")
    max: float | None = Field(description="The same.")


class MetricsAnswer(BaseModel):
    job_id: str
    training_history: TrainingCurves
    custom: dict[str, CustomMetricAnswer] = Field(
        default_factory=dict, description="What the script logged, by name; see `current_run().log`."
    )


class GradientsAnswer(BaseModel):
    """Gradient norms of all layers, step by step."""

    gradient_timeline: list[dict[str, Any]]
    layer_statistics: dict[str, dict[str, Any]]
    anomaly_summary: dict[str, int]
    total_steps: int
    timestamp: float


@endpoint(role=Role.VIEWER, tag="jobs", query=MetricsQuery, answers={200: MetricsAnswer})
async def get_metrics(request: Request) -> Response:
    """Return loss, rate and speed over steps: mean, min and max of each point, and what a user script logged."""
    job_id, query = request.path_params["job_id"], request.state.query
    service = service_of(request)
    curves = await curves_of(service, job_id, query.points, query.from_step, query.to_step)
    series = await service.read(METRIC_LOGS.series, job_id, query.from_step, query.to_step)
    custom = {name: _custom_answer(metric, query.points) for name, metric in series.items()}
    answer = MetricsAnswer(job_id=job_id, training_history=curves, custom=custom)
    return JSONResponse(answer.model_dump(mode="json"))


@endpoint(role=Role.VIEWER, tag="jobs", query=PointsQuery, answers={200: GradientsAnswer})
async def get_gradients(request: Request) -> Response:
    """Return gradient norms of every layer: timeline (downsampled evenly), statistics, anomalies."""
    service = service_of(request)
    job = await service.read(get_job, request.path_params["job_id"])
    return JSONResponse(await service.read(gradient_export, job.id, request.state.query.points))


@endpoint(role=Role.VIEWER, tag="jobs", query=OverviewQuery, answers={200: GradientOverviewAnswer}, media=BINARY)
async def get_gradient_overview(request: Request) -> Response:
    """Return gradient norms of every layer over a range of steps: mean, min and max of each point; statistics."""
    query: OverviewQuery = request.state.query
    job_id = request.path_params["job_id"]
    is_binary = query.format == "binary" or (query.format is None and _accepts_binary(request))

    def read(session: Session) -> bytes:
        get_job(session, job_id)
        points = query.points or points_that_fit(len(layer_names(session, job_id)))
        overview = gradient_overview(session, job_id, points, query.from_step, query.to_step)
        return overview_bytes(overview) if is_binary else orjson.dumps(overview_answer(overview))

    body = await service_of(request).read(read)
    return Response(body, media_type=MEDIA_TYPE if is_binary else "application/json", headers={"vary": "accept"})


@endpoint(role=Role.VIEWER, tag="jobs", query=ExportQuery, answers={200: None}, media=FILES)
async def export_history(request: Request) -> Response:
    """Return the full histories as a file: a row for each step, a column for each curve and layer."""
    form: ExportFormat = request.state.query.format
    job_id = request.path_params["job_id"]
    if _exports.locked():
        raise ProblemError(429, f"{MAX_EXPORTS} exports are being sent already; try again later")
    table = await asyncio.to_thread(HistoryTable, service_of(request).database, job_id)
    parts = await asyncio.to_thread(exported, table, form)
    headers = {"content-disposition": f'attachment; filename="{export_filename(table.job_id, form)}"'}
    return _ExportResponse(_read(parts), media_type=MEDIA_TYPES[form], headers=headers)


class _ExportResponse(StreamingResponse):
    """Of several that passed the check at the same moment the fifth waits here."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with _exports:
            await super().__call__(scope, receive, send)


async def _read(parts: Iterator[bytes]) -> AsyncIterator[bytes]:
    while (part := await asyncio.to_thread(next, parts, None)) is not None:
        yield part


async def curves_of(
    service: Service, job_id: str, points: int, from_step: int = 0, to_step: int = MAX_STEP
) -> TrainingCurves:
    """Return histories of a job that exists.

    Raises:
        NotFound: there is no such job.
    """

    def read(session: Session) -> TrainingCurves:
        get_job(session, job_id)
        return training_curves(training_history(session, job_id, points, from_step, to_step))

    return await service.read(read)


def _custom_answer(metric: CustomMetric, max_points: int) -> CustomMetricAnswer:
    shown = metric.downsampled(max_points)
    extremes = metric.min_max()
    return CustomMetricAnswer(
        steps=shown.steps_N.tolist(),
        values=[finite_or_name(value) for value in shown.values_N.tolist()],
        last=finite_or_name(metric.last),
        min=None if extremes is None else extremes[0],
        max=None if extremes is None else extremes[1],
    )


def _accepts_binary(request: Request) -> bool:
    accepted = request.headers.get("accept", "").split(",")
    return any(kind.partition(";")[0].strip().lower() == MEDIA_TYPE for kind in accepted)
