"""Compare training jobs: in which settings they differ, what they reached, and their series on one axis."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sqlalchemy import Row, select
from sqlalchemy.orm import Session

from apt_jobs.db.models import Job
from apt_jobs.db.series.align import Grid, grid_over, means_on
from apt_jobs.db.series.axes import Axes, Axis
from apt_jobs.db.series.custom_metrics import CustomMetric, MetricLogs
from apt_jobs.db.series.read_many import ManyPoints, read_many, read_many_steps
from apt_jobs.db.series.store import CURVES
from apt_jobs.db.series.summaries import Floats, Integers
from apt_jobs.db.sweep_values import as_float

MAX_JOBS = 100
MAX_METRICS = 20  # series of one answer
MAX_NAMES = 100  # of metrics in the table
DEFAULT_METRICS = 5
MAX_LOG_ROWS = 100_000  # of custom metrics that one answer reads; the next one goes on
AT_STEPS = 16  # whose mean is the value of a curve at a step: one batch is noise
VAL_LOSS = "val_loss"
OWN_METRICS = ("train_loss", VAL_LOSS, "learning_rate", "grad_norm", "tokens_per_s", "step_time_ms")
GOALS: dict[str, Literal["min", "max"]] = {
    "train_loss": "min",
    VAL_LOSS: "min",
    "tokens_per_s": "max",
    "step_time_ms": "min",
}
_COLUMNS = (
    Job.id,
    Job.kind,
    Job.name,
    Job.state,
    Job.step,
    Job.num_steps,
    Job.created_at,
    Job.finished_at,
    Job.sweep_id,
    Job.spec,
    Job.progress,
)
JobRow = Row[Any]


@dataclass(slots=True)
class Reached:
    """A metric of each job: null where there is none."""

    goal: Literal["min", "max"] | None
    last: list[float | None]
    best: list[float | None]
    at: list[float | None] | None


@dataclass(frozen=True, slots=True)
class Curve:
    """The series of one metric: J jobs, P points."""

    means_JP: Floats  # NaN: one of its values is not finite
    counts_JP: Integers  # 0: there is no value


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is compared, in the order of the jobs that were asked for."""

    jobs: list[JobRow]
    names: list[str]  # of all metrics that some job has
    reached: dict[str, Reached]
    points: Floats
    curves: dict[str, Curve]
    without_place: list[bool]  # whether the steps of a job have no place on the axis
    is_complete: bool  # the logs of custom metrics were read to their end


def rows_of(session: Session, job_ids: Sequence[str]) -> list[JobRow]:
    """Return what is compared of jobs, in this order; those that are not there are left out."""
    found = {row.id: row for row in session.execute(select(*_COLUMNS).where(Job.id.in_(job_ids)))}
    return [found[job_id] for job_id in job_ids if job_id in found]


def compare(
    session: Session,
    jobs: list[JobRow],
    logs: MetricLogs,
    axis: Axis = "step",
    metrics: Sequence[str] | None = None,
    points: int | None = None,
    at_step: int | None = None,
) -> Comparison:
    """Compare training jobs.

    Args:
        session: An open session.
        jobs: Of `rows_of`.
        logs: The custom metrics that were read before.
        axis: Of the series.
        metrics: Whose series are wanted; default: the first ones.
        points: Most points of a series; default: as many as make 300 KB.
        at_step: Of the values at a step.
    """
    job_ids = [job.id for job in jobs]
    names = _names(jobs)
    wanted = names[:DEFAULT_METRICS] if metrics is None else [name for name in dict.fromkeys(metrics) if name in names]
    max_points = points or points_that_fit(len(jobs), len(wanted))
    steps = read_many(session, job_ids, "metric", max_points)
    validations = read_many(session, job_ids, "validation", max_points)
    logged, is_complete = _logged(session, jobs, wanted, logs)
    axes = Axes(session, job_ids, axis)
    series = {name: _series_of(name, job_ids, steps, validations, logged) for name in wanted}
    places, curves = _curves(series, axes, len(jobs), max_points)
    reached = {name: _reached(name, jobs, steps, validations) for name in names}
    if at_step is not None:
        for name, values in _at(session, job_ids, names, at_step, validations, logged).items():
            reached[name].at = values
    return Comparison(
        jobs=jobs,
        names=names,
        reached=reached,
        points=places,
        curves=curves,
        without_place=[not axes.is_known(index) for index in range(len(jobs))],
        is_complete=is_complete,
    )


def points_that_fit(num_jobs: int, num_metrics: int) -> int:
    """Return how many points make an answer of at most 300 KB."""
    return max(10, min(1000, int((280_000 - 500 * num_jobs) / (8.5 * num_jobs * max(num_metrics, 1)))))


@dataclass(frozen=True, slots=True)
class _Series:
    jobs_R: Integers
    steps_R: Integers
    at_ms_R: Integers
    values_R: Floats  # NaN: one is not finite
    weights_R: Integers


def _names(jobs: Sequence[JobRow]) -> list[str]:
    """Return the metrics that some job has: losses, what scripts logged, the other ones of the trainer."""
    have = {name for job in jobs for name, value in (job.progress or {}).items() if value is not None}
    if "learning_rate" in have:
        have.add("step_time_ms")  # in no row: it is read
    logged = dict.fromkeys(name for job in jobs for name in _summaries(job))
    first = [name for name in OWN_METRICS[:2] if name in have]
    own = [name for name in OWN_METRICS[2:] if name in have]
    return [*first, *(f"custom/{name}" if name in OWN_METRICS else name for name in logged), *own][:MAX_NAMES]


def _summaries(job: JobRow) -> Mapping[str, Any]:
    """Return what a script logged of each metric: last, best, goal."""
    return (job.progress or {}).get("metrics") or {}


def _logged_name(name: str) -> str | None:
    """Return the name under which a script logged a metric; None: it is the trainer's own."""
    return None if name in OWN_METRICS else name.removeprefix("custom/") if _is_renamed(name) else name


def _is_renamed(name: str) -> bool:
    return name.startswith("custom/") and name.removeprefix("custom/") in OWN_METRICS


def _logged(
    session: Session, jobs: Sequence[JobRow], wanted: Sequence[str], logs: MetricLogs
) -> tuple[dict[str, dict[str, CustomMetric]], bool]:
    """Return the series that scripts logged, by job and name."""
    names = {logged for name in wanted if (logged := _logged_name(name)) is not None}
    having = [job.id for job in jobs if names & _summaries(job).keys()]
    return logs.series_of_many(session, having, names, MAX_LOG_ROWS) if having else ({}, True)


def _series_of(
    name: str,
    job_ids: Sequence[str],
    steps: ManyPoints,
    validations: ManyPoints,
    logged: Mapping[str, Mapping[str, CustomMetric]],
) -> _Series:
    if (logged_name := _logged_name(name)) is None:
        many, column = (validations, 0) if name == VAL_LOSS else (steps, CURVES.index(name))
        values_R = np.where(many.num_nonfinite_RC[:, column] > 0, np.nan, many.mean_RC[:, column])
        weights_R = many.num_steps_R
        if name == "tokens_per_s":
            weights_R = np.where(values_R == 0, 0, weights_R)  # nobody measured it
        return _Series(many.jobs_R, many.last_steps_R, many.last_at_ms_R, values_R, weights_R)
    own = [
        (index, logged[job_id][logged_name])
        for index, job_id in enumerate(job_ids)
        if logged_name in logged.get(job_id, ())
    ]
    empty = np.zeros(0, np.int64)
    values_R = np.concatenate([empty.astype(np.float64), *(metric.values_N for _, metric in own)])
    return _Series(
        jobs_R=np.concatenate([empty, *(np.full(len(metric.steps_N), index) for index, metric in own)]),
        steps_R=np.concatenate([empty, *(metric.steps_N for _, metric in own)]),
        at_ms_R=np.concatenate([empty, *(metric.at_ms_N for _, metric in own)]),
        values_R=np.where(np.isfinite(values_R), values_R, np.nan),
        weights_R=np.ones(len(values_R), np.int64),
    )


def _curves(
    series: Mapping[str, _Series], axes: Axes, num_jobs: int, max_points: int
) -> tuple[Floats, dict[str, Curve]]:
    """Return the points of one axis on which something lies, and each metric there."""
    places = {name: axes.places(one.jobs_R, one.steps_R, one.at_ms_R) for name, one in series.items()}
    grid = _grid(list(places.values()), max_points, is_whole=axes.is_whole)
    curves = {
        name: Curve(*means_on(grid, num_jobs, one.jobs_R, places[name], one.values_R, one.weights_R))
        for name, one in series.items()
    }
    has_any_P = sum((curve.counts_JP.sum(axis=0) for curve in curves.values()), np.zeros(grid.num_points)) > 0
    return grid.places()[has_any_P], {
        name: Curve(curve.means_JP[:, has_any_P], curve.counts_JP[:, has_any_P]) for name, curve in curves.items()
    }


def _grid(places: Sequence[Floats], max_points: int, *, is_whole: bool) -> Grid:
    known = [values[np.isfinite(values)] for values in places]
    known = [values for values in known if len(values)]
    if not known:
        return grid_over(1.0, 1.0, 1, is_whole=is_whole)
    first, last = min(float(values.min()) for values in known), max(float(values.max()) for values in known)
    return grid_over(first, last, max_points, is_whole=is_whole)


def _reached(name: str, jobs: Sequence[JobRow], steps: ManyPoints, validations: ManyPoints) -> Reached:
    if (logged_name := _logged_name(name)) is not None:
        summaries = [_summaries(job).get(logged_name) for job in jobs]
        goals = [summary["goal"] for summary in summaries if summary is not None]
        last = [None if one is None else float(one["last"]) for one in summaries]
        return Reached(
            goals[0] if goals else None, last, [None if one is None else one["best"] for one in summaries], None
        )
    many, column = (validations, 0) if name == VAL_LOSS else (steps, CURVES.index(name))
    goal = GOALS.get(name)
    if name == "step_time_ms":
        last = _newest(many, column, len(jobs))
    else:
        last = [as_float((job.progress or {}).get(name)) for job in jobs]
    best: list[float | None] = [None] * len(jobs)
    if goal is not None:
        best = _extremes(many, column, len(jobs), goal)
    if name == "tokens_per_s":
        last, best = ([None if value == 0 else value for value in values] for values in (last, best))  # not measured
    return Reached(goal, last, best, None)


def _newest(many: ManyPoints, column: int, num_jobs: int) -> list[float | None]:
    last: list[float | None] = [None] * num_jobs
    order = np.argsort(many.last_steps_R, kind="stable")
    for index, value in zip(many.jobs_R[order].tolist(), many.mean_RC[order, column].tolist(), strict=True):
        last[index] = value
    return last


def _extremes(many: ManyPoints, column: int, num_jobs: int, goal: Literal["min", "max"]) -> list[float | None]:
    """Return the best finite value of each job."""
    worst = math.inf if goal == "min" else -math.inf
    best = np.full(num_jobs, worst)
    values_R = many.min_RC[:, column] if goal == "min" else many.max_RC[:, column]
    known_R = np.isfinite(values_R)
    (np.minimum if goal == "min" else np.maximum).at(best, many.jobs_R[known_R], values_R[known_R])
    return [value if math.isfinite(value) else None for value in best.tolist()]


def _at(
    session: Session,
    job_ids: Sequence[str],
    names: Sequence[str],
    step: int,
    validations: ManyPoints,
    logged: Mapping[str, Mapping[str, CustomMetric]],
) -> dict[str, list[float | None]]:
    """Return what metrics were at a step: the mean of the last steps of a curve, else the last value."""
    window = read_many_steps(session, job_ids, max(step - AT_STEPS + 1, 0), step)
    before_R = validations.last_steps_R <= step
    earlier = ManyPoints(*(getattr(validations, name)[before_R] for name in ManyPoints.__slots__))
    found: dict[str, list[float | None]] = {}
    for name in names:
        if (logged_name := _logged_name(name)) is not None:
            found[name] = [_last_until(logged.get(job_id, {}).get(logged_name), step) for job_id in job_ids]
        elif name == VAL_LOSS:
            found[name] = _newest(earlier, 0, len(job_ids))
        else:
            found[name] = _means(window, CURVES.index(name), len(job_ids))
    return found


def _means(many: ManyPoints, column: int, num_jobs: int) -> list[float | None]:
    """Return the mean of all steps of each job; NaN if one of them is not finite."""
    counts = np.bincount(many.jobs_R, minlength=num_jobs)
    values_R = np.where(many.num_nonfinite_RC[:, column] > 0, np.nan, many.mean_RC[:, column])
    means = np.bincount(many.jobs_R, values_R / counts[many.jobs_R], num_jobs)
    return [value if count else None for value, count in zip(means.tolist(), counts.tolist(), strict=True)]


def _last_until(metric: CustomMetric | None, step: int) -> float | None:
    if metric is None:
        return None
    number = int(np.searchsorted(metric.steps_N, step, side="right"))
    return float(metric.values_N[number - 1]) if number else None
