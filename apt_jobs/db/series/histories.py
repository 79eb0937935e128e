"""Read histories of a training: curves, gradient norms, statistics of layers.

A history is at most so many points. A point stands for one step, or for a bucket of neighbouring steps if there are
more; db/series/read.py says which steps count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from sqlalchemy import case, select
from sqlalchemy.orm import Session

from apt_jobs.db.models import EventRow, Job
from apt_jobs.db.series.read import read_buckets
from apt_jobs.db.series.summaries import Summary
from apt_jobs.events.codec import decode_payload, finite_or_name
from apt_jobs.events.kinds import ANOMALY_KINDS, Event, LayersNamed, TrainingStarted
from apt_jobs.jobs.limits import MAX_STEP
from apt_jobs.jobs.states import OWNED_STATES


@dataclass(frozen=True, slots=True)
class TrainingHistory:
    """Curves of one job. `points` has the columns of `CURVES`, `validations` one: the loss."""

    points: Summary
    validations: Summary
    num_steps_recorded: int  # in the range that was asked for


@dataclass(frozen=True, slots=True)
class GradientOverview:
    """Norms of all layers over steps, and what is known of the whole job."""

    names: tuple[str, ...]
    points: Summary
    of_all_steps: Summary  # one bucket, or none
    anomaly_counts: dict[str, int]  # by kind; those that were found


def training_history(
    session: Session, job_id: str, max_points: int, from_step: int = 0, to_step: int = MAX_STEP
) -> TrainingHistory:
    """Return loss and rates over steps, and validation losses: at most `max_points` points of each."""
    points = read_buckets(session, job_id, "metric", max_points, from_step=from_step, to_step=to_step)
    validations = read_buckets(session, job_id, "validation", max_points, from_step=from_step, to_step=to_step)
    return TrainingHistory(points, validations, points.num_steps)


def shown_values(points: Summary, column: int) -> list[float]:
    """Return one value a point: that of its step, or the mean of its steps; NaN if one of several is not finite."""
    values = points.mean_BL[:, column].astype(np.float64)
    has_nonfinite = (points.num_nonfinite_BL[:, column] > 0) & (points.num_steps_B > 1)
    shown: list[float] = np.where(has_nonfinite, np.nan, values).tolist()
    return shown


def gradient_overview(
    session: Session, job_id: str, max_points: int, from_step: int = 0, to_step: int = MAX_STEP
) -> GradientOverview:
    """Return at most `max_points` buckets of a range of steps, and statistics of all steps, whatever the range is."""
    names = layer_names(session, job_id)
    return GradientOverview(
        names=names,
        points=read_buckets(session, job_id, "gradient", max_points, len(names), from_step, to_step),
        of_all_steps=read_buckets(session, job_id, "gradient", 1, len(names)),
        anomaly_counts=_anomaly_counts(session, job_id),
    )


def gradient_export(session: Session, job_id: str, max_points: int) -> dict[str, Any]:
    """Return gradient norms in the form of `export_for_webui`: a timeline of at most `max_points` points, statistics.

    A point that stands for several steps has the mean norm of each layer. Downsampling hides no anomaly: of an
    anomalous layer it has the norm farthest from the mean, or "NaN" if a norm was not finite, and the point is at its
    first anomalous step. A norm that is not finite is the string "NaN", "Infinity" or "-Infinity"; a layer without any
    finite norm has null for its mean, std, min and max.
    """
    overview = gradient_overview(session, job_id, max_points)
    return {
        "gradient_timeline": _timeline(overview.names, overview.points),
        "layer_statistics": layer_statistics(overview),
        "anomaly_summary": overview.anomaly_counts,
        "total_steps": overview.of_all_steps.num_steps,
        "timestamp": datetime.now(UTC).timestamp(),
    }


def layer_statistics(overview: GradientOverview) -> dict[str, dict[str, Any]]:
    """Return statistics of each layer over all steps. Norms that are not finite count as steps, not in the mean."""
    whole = overview.of_all_steps
    if whole.num_buckets == 0:
        nothing = {"mean": None, "std": None, "min": None, "max": None, "total_steps": 0, "anomaly_count": 0}
        return {name: dict(nothing) for name in overview.names}
    statistics: dict[str, dict[str, Any]] = {}
    finite = whole.num_finite_BL[0].tolist()
    numbers = [values[0].tolist() for values in (whole.mean_BL, whole.std_BL, whole.min_BL, whole.max_BL)]
    counts = whole.num_anomalous_BL[0].tolist()
    for index, name in enumerate(overview.names):
        of_layer = [finite_or_name(column[index]) if finite[index] else None for column in numbers]
        statistics[name] = {
            **dict(zip(("mean", "std", "min", "max"), of_layer, strict=True)),
            "total_steps": whole.num_steps,
            "anomaly_count": counts[index],
        }
    return statistics


def timeline_steps(points: Summary) -> list[int]:
    """Return the step of each point: its first anomalous one, else its last one; of the first point its first step."""
    steps = points.last_steps_B.copy()
    if len(steps):
        steps[0] = points.first_steps_B[0]
    shown: list[int] = np.where(points.anomalous_steps_B >= 0, points.anomalous_steps_B, steps).tolist()
    return shown


def timeline_norms(points: Summary) -> np.ndarray[Any, Any]:
    """Return the norm of each point and layer that shows what was wrong, if something was."""
    mean = points.mean_BL.astype(np.float64)
    with np.errstate(all="ignore"):
        is_high = points.max_BL * points.min_BL >= mean * mean  # max / mean >= mean / min
    extreme = np.where(is_high, points.max_BL, points.min_BL)
    is_bucket = (points.num_steps_B > 1)[:, None]
    norms = np.where(is_bucket & (points.num_anomalous_BL > 0), extreme, mean)
    shown: np.ndarray[Any, Any] = np.where(is_bucket & (points.num_nonfinite_BL > 0), np.nan, norms)
    return shown


def layer_names(session: Session, job_id: str) -> tuple[str, ...]:
    """Return the names of the layers, in the order of `gradient` events; empty before the first one."""
    event = _last_event(session, job_id, "layers")
    return event.names if isinstance(event, LayersNamed) else ()


def last_start(session: Session, job_id: str) -> TrainingStarted | None:
    """Return what the newest attempt reported when its ranks were up."""
    event = _last_event(session, job_id, "started")
    return event if isinstance(event, TrainingStarted) else None


def current_training_job(session: Session) -> Job | None:
    """Return the training job that runs (the newest, if several); else the newest that ever ran; else the newest."""
    owned = case((Job.state.in_(OWNED_STATES), 0), (Job.attempt > 0, 1), else_=2)
    return session.scalar(select(Job).where(Job.kind == "train").order_by(owned, Job.id.desc()).limit(1))


def _timeline(names: Sequence[str], points: Summary) -> list[dict[str, Any]]:
    anomalous = (points.num_anomalous_BL > 0).tolist()
    rows = zip(
        timeline_steps(points), points.last_at_ms_B.tolist(), timeline_norms(points).tolist(), anomalous, strict=True
    )
    return [
        {
            "step": step,
            "timestamp": at_ms / 1000.0,
            "layers": {
                name: {"norm": finite_or_name(norm), "is_anomaly": is_anomaly}
                for name, norm, is_anomaly in zip(names, norms, flags, strict=True)
            },
        }
        for step, at_ms, norms, flags in rows
    ]


def _anomaly_counts(session: Session, job_id: str) -> dict[str, int]:
    whole = read_buckets(session, job_id, "anomaly", 1)
    if whole.num_buckets == 0:
        return {}
    counts = [round(count) for count in (whole.mean_BL[0] * whole.num_steps).tolist()]
    return {kind: count for kind, count in zip(ANOMALY_KINDS, counts, strict=True) if count}


def _last_event(session: Session, job_id: str, kind: str) -> Event | None:
    payload = session.scalar(
        select(EventRow.payload)
        .where(EventRow.job_id == job_id, EventRow.kind == kind)
        .order_by(EventRow.seq.desc())
        .limit(1)
    )
    return None if payload is None else decode_payload(kind, payload)
