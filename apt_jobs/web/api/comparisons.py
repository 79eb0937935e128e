"""`GET /api/compare`: up to 100 training jobs side by side, by their ids, a filter or a sweep."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import orjson
from pydantic import AfterValidator, Field, StringConstraints, model_validator
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import Response

from apt_jobs.db.access import Role
from apt_jobs.db.comparisons import MAX_JOBS, MAX_METRICS, JobRow, compare, rows_of
from apt_jobs.db.job_filters import num_trainings_that_match, trainings_that_match
from apt_jobs.db.series.axes import Axis
from apt_jobs.db.sweep_values import metric_of
from apt_jobs.db.sweeps import get_sweep, trials_of
from apt_jobs.errors import NotFound
from apt_jobs.jobs.job_filter import parse_filter
from apt_jobs.jobs.limits import MAX_STEP
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.api.histories import METRIC_LOGS
from apt_jobs.web.api.job_queries import FilterText
from apt_jobs.web.api.jobs import Query
from apt_jobs.web.comparison_answers import ComparisonAnswer, NotCompared, Objective, comparison_answer
from apt_jobs.web.service import service_of

MAX_IDS_CHARS = 6_000
MAX_VALUES = 400_000  # jobs x metrics x points of one answer: 3.5 MB
_MAX_NAME_CHARS = 200


def _require_names(text: str) -> str:
    names = text.split(",")
    if len(names) > MAX_METRICS:
        raise ValueError(f"{len(names)} metrics; one answer has the series of {MAX_METRICS} at most")
    if any(not name or len(name) > _MAX_NAME_CHARS for name in names):
        raise ValueError(f"expected names of metrics of 1 to {_MAX_NAME_CHARS} characters, with commas between them")
    return text


def _require_ids(text: str) -> str:
    ids = dict.fromkeys(text.split(","))
    if len(ids) > MAX_JOBS:
        raise ValueError(f"{len(ids)} jobs; at most {MAX_JOBS} are compared at once")
    if "" in ids:
        raise ValueError("an id is empty; write ids of jobs with commas between them")
    return text


class CompareQuery(Query):
    jobs: Annotated[str, StringConstraints(max_length=MAX_IDS_CHARS), AfterValidator(_require_ids)] | None = Field(
        None, description=f"Ids with commas between them, at most {MAX_JOBS}."
    )
    filter: FilterText | None = Field(None, description="As of `GET /api/jobs`: the newest training jobs it matches.")
    sweep: Annotated[str, StringConstraints(max_length=40)] | None = Field(
        None, description="Id of a sweep: its jobs, the best first."
    )
    metrics: Annotated[str, StringConstraints(max_length=4_000), AfterValidator(_require_names)] | None = Field(
        None, description=f"Names with commas between them whose series are wanted, at most {MAX_METRICS}; default: 5."
    )
    x: Axis = Field("step", description="Axis of the series. seconds: of the clock, since the first attempt began.")
    points: int | None = Field(
        None, ge=1, le=2_000, description="Most points of a series; default: as many as make 300 KB."
    )
    at_step: int | None = Field(None, ge=0, le=MAX_STEP, description="Return the values at this step, too.")
    baseline: Annotated[str, StringConstraints(max_length=40)] | None = Field(
        None, description="Id of one of the jobs; the others are compared with it."
    )

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        given = [name for name in ("jobs", "filter", "sweep") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"send one of jobs, filter and sweep; got {' and '.join(given) or 'none'}")
        if self.filter is not None and not parse_filter(self.filter):
            raise ValueError("the filter is empty, and would match every job; name them by state, label or id")
        return self


@dataclass(slots=True)
class _Chosen:
    """The jobs that are compared."""

    jobs: list[JobRow]
    num_matched: int
    not_compared: list[NotCompared]
    objective: Objective | None = None


@endpoint(
    role=Role.VIEWER,
    tag="jobs",
    query=CompareQuery,
    answers={200: ComparisonAnswer},
    problems={404},
    operation="compare_jobs",
)
async def get_comparison(request: Request) -> Response:
    """Compare training jobs: settings that differ, last and best values, series on one axis."""
    query: CompareQuery = request.state.query

    def read(session: Session) -> bytes:
        chosen = _chosen(session, query)
        metrics = None if query.metrics is None else query.metrics.split(",")
        compared = compare(
            session, chosen.jobs, METRIC_LOGS, query.x, metrics, _bounded(query, len(chosen.jobs)), query.at_step
        )
        if query.baseline is not None and query.baseline not in {job.id for job in chosen.jobs}:
            why = "it was to be the baseline, and is none of the jobs that are compared"
            chosen.not_compared.append(NotCompared(id=query.baseline, why=why))
        return orjson.dumps(
            comparison_answer(
                compared, query.x, query.baseline, chosen.objective, chosen.not_compared, chosen.num_matched
            )
        )

    return Response(await service_of(request).read(read), media_type="application/json")


def _bounded(query: CompareQuery, num_jobs: int) -> int | None:
    """Return the points of each series, fewer than wanted where the answer would be too large."""
    if query.points is None:
        return None
    num_metrics = MAX_METRICS if query.metrics is None else query.metrics.count(",") + 1
    return max(1, min(query.points, MAX_VALUES // (num_jobs * num_metrics)))


def _chosen(session: Session, query: CompareQuery) -> _Chosen:
    if query.jobs is not None:
        chosen = _by_ids(session, query.jobs.split(","))
    elif query.sweep is not None:
        chosen = _by_sweep(session, query.sweep)
    else:
        ids = trainings_that_match(session, query.filter or "", MAX_JOBS)
        jobs = rows_of(session, ids)
        num_matched = len(jobs) if len(jobs) < MAX_JOBS else num_trainings_that_match(session, query.filter or "")
        chosen = _Chosen(jobs, num_matched, [])
    if not chosen.jobs:
        reasons = "; ".join(f"{one.id}: {one.why}" for one in chosen.not_compared[:3])
        raise NotFound(f"no training job to compare{f' ({reasons})' if reasons else ''}")
    sweeps = {job.sweep_id for job in chosen.jobs}
    if len(sweeps) == 1 and (sweep_id := sweeps.pop()) is not None:
        sweep = get_sweep(session, sweep_id)
        chosen.objective = Objective(metric=sweep.metric, goal="min" if sweep.goal == "minimize" else "max")
    return chosen


def _by_ids(session: Session, ids: Sequence[str]) -> _Chosen:
    rows = {row.id: row for row in rows_of(session, list(dict.fromkeys(ids)))}
    chosen = _Chosen([], 0, [])
    seen: set[str] = set()
    for job_id in ids:
        row = rows.get(job_id)
        if job_id in seen:
            chosen.not_compared.append(NotCompared(id=job_id, why="it was named twice, and is there once"))
        elif row is None:
            chosen.not_compared.append(NotCompared(id=job_id, why="there is no such job; it may have been deleted"))
        elif row.kind != "train":
            chosen.not_compared.append(
                NotCompared(id=job_id, why=f"its kind is {row.kind}; training jobs are compared")
            )
        else:
            chosen.jobs.append(row)
        seen.add(job_id)
    chosen.num_matched = len(chosen.jobs)
    return chosen


def _by_sweep(session: Session, sweep_id: str) -> _Chosen:
    sweep = get_sweep(session, sweep_id)
    jobs = [job for _, job in trials_of(session, sweep_id) if job is not None]
    sign = 1.0 if sweep.goal == "minimize" else -1.0
    values = {job.id: metric_of(job, sweep.metric) for job in jobs}

    def place(job_id: str) -> tuple[bool, float]:
        value = float("nan") if values[job_id] is None else float(values[job_id] or 0)
        return value != value, 0.0 if value != value else sign * value

    ids = sorted(values, key=place)[:MAX_JOBS]
    return _Chosen(rows_of(session, ids), len(jobs), [])
