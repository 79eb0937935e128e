"""Histories of a training, read from its event log: curves, gradient norms, statistics of layers.

A resumed attempt does again what its predecessor had done after the checkpoint. The rule: nothing of an attempt counts
after the earliest step that a later attempt resumed from.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, and_, case, func, or_, select
from sqlalchemy.orm import Session

from apt_jobs.db.models import Attempt, EventRow, Job
from apt_jobs.events.codec import decode_payload, finite_or_name
from apt_jobs.events.kinds import (
    AnomaliesFound,
    Event,
    GradientsRecorded,
    LayersNamed,
    StepTrained,
    TrainingStarted,
    Validated,
)
from apt_jobs.jobs.states import OWNED_STATES

_READ_ROWS = 500
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class TrainingHistory:
    """Curves of one job, thinned evenly to a bounded number of steps. Lists of one group have one length."""

    steps: list[int]
    train_loss: list[float]
    learning_rate: list[float]
    grad_norm: list[float]
    step_time_ms: list[float]
    tokens_per_s: list[float]
    val_steps: list[int]
    val_loss: list[float]
    num_steps_recorded: int  # before thinning


@dataclass(slots=True)
class LayerStatistics:
    """Running mean and variance (Welford 1962). Broken norms count as steps and anomalies, not in the mean."""

    num_finite: int = 0
    mean: float = 0.0
    sum_squares: float = 0.0  # of differences from the mean
    least: float = math.inf
    most: float = -math.inf
    total_steps: int = 0
    anomaly_count: int = 0

    def add(self, norm: float, *, is_anomaly: bool) -> None:
        self.total_steps += 1
        self.anomaly_count += is_anomaly
        if not math.isfinite(norm):
            return
        self.num_finite += 1
        delta = norm - self.mean
        self.mean += delta / self.num_finite
        self.sum_squares += delta * (norm - self.mean)
        self.least, self.most = min(self.least, norm), max(self.most, norm)

    def export(self) -> dict[str, Any]:
        known = self.num_finite > 0
        return {
            "mean": self.mean if known else None,
            "std": math.sqrt(self.sum_squares / self.num_finite) if known else None,
            "min": self.least if known else None,
            "max": self.most if known else None,
            "total_steps": self.total_steps,
            "anomaly_count": self.anomaly_count,
        }


@dataclass(slots=True)
class _GradientFold:
    """What one pass over the `gradient` events collects: statistics of all steps, a timeline of `shown` ones."""

    names: tuple[str, ...]
    shown: set[int]  # numbers of the steps that an even thinning would show
    layers: dict[str, LayerStatistics]
    timeline: list[dict[str, Any]] = field(default_factory=list)
    total_steps: int = 0
    passed_over: tuple[datetime, GradientsRecorded] | None = None  # first anomalous step since the last shown one

    def add(self, at: datetime, event: GradientsRecorded) -> None:
        anomalous = set(event.anomalous)
        for index, (name, norm) in enumerate(zip(self.names, event.norms, strict=False)):
            self.layers[name].add(norm, is_anomaly=index in anomalous)
        if anomalous and self.passed_over is None:
            self.passed_over = at, event
        if self.total_steps in self.shown:
            self.timeline.append(self._record(*(self.passed_over or (at, event))))
            self.passed_over = None
        self.total_steps += 1

    def _record(self, at: datetime, event: GradientsRecorded) -> dict[str, Any]:
        anomalous = set(event.anomalous)
        layers = {
            name: {"norm": finite_or_name(norm), "is_anomaly": index in anomalous}
            for index, (name, norm) in enumerate(zip(self.names, event.norms, strict=False))
        }
        return {"step": event.step, "timestamp": at.timestamp(), "layers": layers}


def training_history(session: Session, job_id: str, max_points: int) -> TrainingHistory:
    """Loss and rates over steps, and validation losses: at most `max_points` steps of each, evenly spread."""
    trained = [event for _, event in _effective(session, job_id, "metric") if isinstance(event, StepTrained)]
    validated = [event for _, event in _effective(session, job_id, "validation") if isinstance(event, Validated)]
    shown = thinned(trained, max_points)
    shown_validated = thinned(validated, max_points)
    return TrainingHistory(
        steps=[event.step for event in shown],
        train_loss=[event.train_loss for event in shown],
        learning_rate=[event.learning_rate for event in shown],
        grad_norm=[event.grad_norm for event in shown],
        step_time_ms=[event.step_time_ms for event in shown],
        tokens_per_s=[event.tokens_per_s for event in shown],
        val_steps=[event.step for event in shown_validated],
        val_loss=[event.val_loss for event in shown_validated],
        num_steps_recorded=len(trained),
    )


def gradient_export(session: Session, job_id: str, max_points: int) -> dict[str, Any]:
    """The payload of SPEC S1: timeline thinned evenly to `max_points` steps, statistics over all steps.

    Thinning never hides trouble: of the steps between two shown ones, the first anomalous one takes the place of the
    second. A norm that is not finite is the string "NaN", "Infinity" or "-Infinity"; a layer that never had a finite
    norm has null for its mean, std, min and max.
    """
    names = layer_names(session, job_id)
    num_steps = _count_effective(session, job_id, "gradient")
    fold = _GradientFold(names, set(thinned(range(num_steps), max_points)), {name: LayerStatistics() for name in names})
    for at, event in _effective(session, job_id, "gradient"):
        if isinstance(event, GradientsRecorded):
            fold.add(at, event)
    return {
        "gradient_timeline": fold.timeline,
        "layer_statistics": {name: statistics.export() for name, statistics in fold.layers.items()},
        "anomaly_summary": _anomaly_summary(session, job_id),
        "total_steps": fold.total_steps,
        "timestamp": datetime.now(UTC).timestamp(),
    }


def layer_names(session: Session, job_id: str) -> tuple[str, ...]:
    """Names of the layers, in the order of `gradient` events; empty before the first one."""
    event = _last_event(session, job_id, "layers")
    return event.names if isinstance(event, LayersNamed) else ()


def last_start(session: Session, job_id: str) -> TrainingStarted | None:
    """What the newest attempt said when its ranks were up."""
    event = _last_event(session, job_id, "started")
    return event if isinstance(event, TrainingStarted) else None


def current_training_job(session: Session) -> Job | None:
    """The training job that runs (the newest, if several); else the newest one that ever ran; else the newest."""
    owned = case((Job.state.in_(OWNED_STATES), 0), (Job.attempt > 0, 1), else_=2)
    return session.scalar(select(Job).where(Job.kind == "train").order_by(owned, Job.id.desc()).limit(1))


def thinned(items: Sequence[Item], max_items: int) -> list[Item]:
    """At most `max_items` of `items`, evenly spread, first and last included."""
    if len(items) <= max_items:
        return list(items)
    if max_items <= 1:
        return list(items[-1:])
    last = len(items) - 1
    return [items[round(number * last / (max_items - 1))] for number in range(max_items)]


def _anomaly_summary(session: Session, job_id: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for _, event in _effective(session, job_id, "anomaly"):
        if isinstance(event, AnomaliesFound):
            for layer in event.layers:
                counts[layer.anomaly] = counts.get(layer.anomaly, 0) + 1
    return counts


def _effective(session: Session, job_id: str, kind: str) -> Iterator[tuple[datetime, Event]]:
    """Events of one kind that count, one a step, in order of step, read in pieces.

    A step that was trained again after a roll-back counts as it was the last time.
    """
    query = (
        select(EventRow.at, EventRow.payload, EventRow.step)
        .where(_counts(session, job_id), EventRow.kind == kind)
        .order_by(EventRow.step, EventRow.seq)
        .execution_options(yield_per=_READ_ROWS)
    )
    held: tuple[datetime, bytes, int | None] | None = None
    for at, payload, step in session.execute(query):
        if held is not None and (held[2] != step or step is None):
            yield held[0], decode_payload(kind, held[1])
        held = at, payload, step
    if held is not None:
        yield held[0], decode_payload(kind, held[1])


def _count_effective(session: Session, job_id: str, kind: str) -> int:
    query = select(func.count(EventRow.step.distinct())).where(_counts(session, job_id), EventRow.kind == kind)
    return session.scalar(query) or 0


def _counts(session: Session, job_id: str) -> ColumnElement[bool]:
    """Which events count: of each attempt those up to the earliest step that a later attempt resumed from."""
    resumed = session.execute(
        select(Attempt.attempt, Attempt.resumed_from_step)
        .where(Attempt.job_id == job_id, Attempt.resumed_from_step.is_not(None))
        .order_by(Attempt.attempt.desc())
    ).all()
    clauses: list[ColumnElement[bool]] = []
    limit: int | None = None
    for attempt, resumed_from_step in resumed:
        assert resumed_from_step is not None  # the query asks for it
        of_attempt = EventRow.attempt == attempt
        clauses.append(of_attempt if limit is None else and_(of_attempt, EventRow.step <= limit))
        limit = resumed_from_step if limit is None else min(limit, resumed_from_step)
    if not clauses:
        return EventRow.job_id == job_id
    return and_(EventRow.job_id == job_id, or_(*clauses))


def _last_event(session: Session, job_id: str, kind: str) -> Event | None:
    payload = session.scalar(
        select(EventRow.payload)
        .where(EventRow.job_id == job_id, EventRow.kind == kind)
        .order_by(EventRow.seq.desc())
        .limit(1)
    )
    return None if payload is None else decode_payload(kind, payload)
