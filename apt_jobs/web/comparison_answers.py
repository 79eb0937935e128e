"""The answer of `GET /api/compare`: what differs between jobs, what they reached, their series on one axis."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from apt_jobs.db.comparisons import Comparison, Curve, JobRow, Reached
from apt_jobs.db.series.axes import Axis
from apt_jobs.db.series.summaries import Floats
from apt_jobs.events.codec import Number, finite_or_name, timestamp
from apt_jobs.jobs.setting_paths import differing_settings
from apt_jobs.jobs.states import JobState

DIGITS = 5  # of a point: a tenth of a pixel on any chart


class ComparedJob(BaseModel):
    """One of the jobs, whose place in `jobs` is its place in every list of the answer."""

    id: str
    name: str | None
    state: JobState
    step: int | None
    num_steps: int | None
    created_at: str
    finished_at: str | None
    sweep_id: str | None
    without_x: str | None = Field(description="Why it has no series on this axis; null: it has them.")


class NotCompared(BaseModel):
    """What was asked for and is not compared."""

    id: str
    why: str


class ComparedMetric(BaseModel):
    """What each job reached, in the order of `jobs`. null: it has no such value."""

    goal: Literal["min", "max"] | None = Field(description="Which values are better; null: neither.")
    last: list[Number | None]
    best: list[float | None] = Field(description="Of the finite values. A curve without a goal has none.")
    at: list[Number | None] | None = Field(
        None,
        description="At `at_step`: of a curve the mean of the 16 steps up to it, of validations and what a script "
        "logged the last value; null: not asked for.",
    )
    last_delta: list[float | None] | None = Field(None, description="`last` less that of the baseline.")
    best_delta: list[float | None] | None = Field(None, description="The same of `best`.")
    at_delta: list[float | None] | None = Field(None, description="The same of `at`.")


class Objective(BaseModel):
    """What the sweep is about that all jobs are of."""

    metric: str
    goal: Literal["min", "max"]


class ComparisonAnswer(BaseModel):
    """Jobs side by side. A value that is not finite is "NaN", "Infinity" or "-Infinity"."""

    object: Literal["comparison"] = "comparison"
    jobs: list[ComparedJob]
    not_compared: list[NotCompared] = Field(description="Ids that are unknown, of another kind, or given twice.")
    num_matched: int = Field(
        description="Jobs that the filter or the sweep has; more than `jobs`: the first are there."
    )
    baseline: str | None
    objective: Objective | None
    settings: dict[str, list[Any]] = Field(
        description="Those that differ, by dotted path: the value of each job. Long ones are cut."
    )
    num_settings_left_out: int = Field(description="Further ones that differ.")
    metrics: dict[str, ComparedMetric] = Field(description="All that some job has, by name.")
    x: Axis
    points: list[float] = Field(description="Places on the axis; each stands for what is beyond the one before it.")
    series: dict[str, list[list[Number | None]]] = Field(
        description='By metric, of each job: the mean in each of `points`; null: nothing is there; "NaN": one of its '
        "values is not finite."
    )
    is_complete: bool = Field(description="false: long logs of scripts are still being read; ask again.")


def comparison_answer(
    comparison: Comparison,
    axis: Axis,
    baseline: str | None,
    objective: Objective | None,
    not_compared: Sequence[NotCompared],
    num_matched: int,
) -> dict[str, Any]:
    """Return `ComparisonAnswer` as JSON."""
    settings, num_left_out = differing_settings([job.spec for job in comparison.jobs])
    ids = [job.id for job in comparison.jobs]
    index = ids.index(baseline) if baseline in ids else None
    return {
        "object": "comparison",
        "jobs": [
            _job(job, axis, has_place=not without)
            for job, without in zip(comparison.jobs, comparison.without_place, strict=True)
        ],
        "not_compared": [one.model_dump() for one in not_compared],
        "num_matched": num_matched,
        "baseline": baseline if index is not None else None,
        "objective": None if objective is None else objective.model_dump(),
        "settings": settings,
        "num_settings_left_out": num_left_out,
        "metrics": {name: _metric(reached, index) for name, reached in comparison.reached.items()},
        "x": axis,
        "points": short_numbers(comparison.points).tolist(),
        "series": {name: _series(curve) for name, curve in comparison.curves.items()},
        "is_complete": comparison.is_complete,
    }


def _job(job: JobRow, axis: Axis, *, has_place: bool) -> dict[str, Any]:
    why = "it has not begun" if axis == "seconds" else f"it does not say how many steps make {axis}"
    return {
        "id": job.id,
        "name": job.name,
        "state": job.state,
        "step": job.step,
        "num_steps": job.num_steps,
        "created_at": timestamp(job.created_at),
        "finished_at": None if job.finished_at is None else timestamp(job.finished_at),
        "sweep_id": job.sweep_id,
        "without_x": None if has_place else why,
    }


def _metric(reached: Reached, baseline: int | None) -> dict[str, Any]:
    values = {"last": reached.last, "best": reached.best, "at": reached.at}
    shown: dict[str, Any] = {"goal": reached.goal}
    for name, column in values.items():
        shown[name] = None if column is None else [None if one is None else finite_or_name(one) for one in column]
        shown[f"{name}_delta"] = None if column is None or baseline is None else _deltas(column, column[baseline])
    return shown


def _deltas(values: Sequence[float | None], base: float | None) -> list[float | None]:
    deltas = [None if base is None or value is None else value - base for value in values]
    return [delta if delta is not None and math.isfinite(delta) else None for delta in deltas]


def _series(curve: Curve) -> list[list[Number | None]]:
    shown_JP = short_numbers(curve.means_JP).astype(object)
    shown_JP[curve.counts_JP == 0] = None
    shown_JP[(curve.counts_JP > 0) & ~np.isfinite(curve.means_JP)] = "NaN"
    rows: list[list[Number | None]] = shown_JP.tolist()
    return rows


def short_numbers(values: Floats) -> Floats:
    """Round to the digits that somebody sees."""
    with np.errstate(all="ignore"):  # of 0, of what is not finite, and of numbers near the ends of the range
        digits = DIGITS - 1 - np.floor(np.log10(np.abs(values)))
        usable = np.isfinite(digits) & (np.abs(digits) < 300)
        scale = 10.0 ** np.where(usable, np.abs(digits), 0)
        rounded = np.where(digits >= 0, np.round(values * scale) / scale, np.round(values / scale) * scale)
    return np.where(usable & np.isfinite(rounded), rounded, values)
