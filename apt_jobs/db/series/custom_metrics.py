"""Read the metrics that user scripts logged: a series for each name, with steps of its own.

They are rows of the event log (`metrics` events). Of a name that several ranks logged, the lowest rank counts. Where a
later attempt goes on from an earlier step, what the attempt before it logged from there on is left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import orjson
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from apt_jobs.db.models import EventRow
from apt_jobs.jobs.limits import MAX_STEP

READ_ROWS = 5_000  # at a time


@dataclass(frozen=True, slots=True)
class CustomMetric:
    """One name, in order of step: N points."""

    name: str
    steps_N: NDArray[np.int64]
    values_N: NDArray[np.float64]
    at_ms_N: NDArray[np.int64]

    @property
    def last(self) -> float:
        """Return the value of the last step."""
        return float(self.values_N[-1])

    def min_max(self) -> tuple[float, float] | None:
        """Return the extremes of the finite values; None if there is none."""
        finite = self.values_N[np.isfinite(self.values_N)]
        return (float(finite.min()), float(finite.max())) if len(finite) else None

    def downsampled(self, max_points: int) -> "CustomMetric":
        """Return at most `max_points` points: of each run of neighbours one that is not finite, else the last one."""
        number = len(self.steps_N)
        if number <= max_points:
            return self
        ends = np.linspace(0, number, max_points + 1).astype(np.int64)[1:]
        chosen = ends - 1
        broken = np.flatnonzero(~np.isfinite(self.values_N))
        chosen[np.searchsorted(ends, broken, side="right")] = broken
        return CustomMetric(self.name, self.steps_N[chosen], self.values_N[chosen], self.at_ms_N[chosen])


class _Points:
    """What is known of one name while the log is read."""

    def __init__(self) -> None:
        self.rank, self.attempt = -1, -1
        self.by_step: dict[int, tuple[float, int]] = {}

    def add(self, rank: int, attempt: int, step: int, value: float, at_ms: int) -> None:
        if self.rank < 0 or rank < self.rank:
            self.rank, self.by_step = rank, {}
        if rank > self.rank:
            return
        if attempt > self.attempt:
            if self.by_step and step <= max(self.by_step):
                self.by_step = {old: point for old, point in self.by_step.items() if old < step}
            self.attempt = attempt
        self.by_step[step] = value, at_ms


def custom_metrics(
    session: Session, job_id: str, from_step: int = 0, to_step: int = MAX_STEP
) -> dict[str, CustomMetric]:
    """Return the whole series of each name, in the order in which they appeared; those without a point are left out."""
    found: dict[str, _Points] = {}
    for attempt, step, rank, values, at_ms in _logged(session, job_id):
        for name, value in values.items():
            points = found.get(name)
            if points is None:
                points = found[name] = _Points()
            points.add(rank, attempt, step, float(value), at_ms)
    series = {}
    for name, points in found.items():
        steps = sorted(step for step in points.by_step if from_step <= step <= to_step)
        if steps:
            series[name] = CustomMetric(
                name,
                np.array(steps, np.int64),
                np.array([points.by_step[step][0] for step in steps], np.float64),
                np.array([points.by_step[step][1] for step in steps], np.int64),
            )
    return series


def _logged(session: Session, job_id: str) -> Iterator[tuple[int, int, int, dict[str, float | str], int]]:
    """Yield attempt, step, rank, values and Unix time in ms of each event, in order of `seq`."""
    query = (
        select(EventRow.seq, EventRow.attempt, EventRow.at, EventRow.payload)
        .where(EventRow.job_id == job_id, EventRow.kind == "metrics")
        .order_by(EventRow.seq)
        .limit(READ_ROWS)
    )
    last_seq = 0
    while rows := session.execute(query.where(EventRow.seq > last_seq)).all():
        for row in rows:
            payload = orjson.loads(row.payload)
            at_ms = round(row.at.timestamp() * 1000)
            yield row.attempt, payload["step"], payload["rank"], payload["values"], at_ms
        last_seq = rows[-1].seq
