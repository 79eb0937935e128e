"""Where a step of a job lies on the axes of a comparison: steps, tokens, epochs, seconds since its first attempt."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import orjson
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from apt_jobs.db.models import Attempt, EventRow
from apt_jobs.db.series.summaries import Floats, Integers

Axis = Literal["step", "tokens", "seconds", "epoch"]
AXES: tuple[Axis, ...] = get_args(Axis)


@dataclass(slots=True)
class _Rate:
    """From a step on, so much a step: an attempt with other sizes goes on where the one before it was."""

    steps: list[int] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)  # at those steps
    rates: list[float] = field(default_factory=list)

    def resume(self, step: int, rate: float) -> None:
        total = float(self.at(np.array([step]))[0]) if self.steps else step * rate
        while self.steps and self.steps[-1] >= step:
            for column in (self.steps, self.totals, self.rates):
                column.pop()
        self.steps.append(step)
        self.totals.append(total)
        self.rates.append(rate)

    def at(self, steps_N: Integers) -> Floats:
        if not self.steps:
            return np.full(len(steps_N), np.nan)
        which = np.maximum(np.searchsorted(self.steps, steps_N, side="left") - 1, 0)
        totals, rates, begins = np.array(self.totals), np.array(self.rates), np.array(self.steps)
        places: Floats = totals[which] + (steps_N - begins[which]) * rates[which]
        return places


class Axes:
    """The places of the steps of several jobs on one axis."""

    def __init__(self, session: Session, job_ids: Sequence[str], axis: Axis) -> None:
        self._axis = axis
        self._began_ms = np.full(len(job_ids), np.nan)
        self._rates = [_Rate() for _ in job_ids]
        indices = {job_id: index for index, job_id in enumerate(job_ids)}
        if axis == "seconds":
            began = select(Attempt.job_id, func.min(Attempt.started_at)).where(Attempt.job_id.in_(job_ids))
            for job_id, started_at in session.execute(began.group_by(Attempt.job_id)):
                self._began_ms[indices[job_id]] = started_at.timestamp() * 1000
        elif axis != "step":
            started = select(EventRow.job_id, EventRow.payload)
            started = started.where(EventRow.job_id.in_(job_ids), EventRow.kind == "started")
            for job_id, payload in session.execute(started.order_by(EventRow.job_id, EventRow.seq)):
                event = orjson.loads(payload)
                per_step = event["tokens_per_step"] if axis == "tokens" else 1 / max(event["steps_per_epoch"], 1)
                self._rates[indices[job_id]].resume(event["resumed_from_step"], per_step)

    @property
    def is_whole(self) -> bool:
        return self._axis == "step"

    def is_known(self, index: int) -> bool:
        """Return whether the steps of a job have a place on the axis."""
        if self._axis == "seconds":
            return bool(np.isfinite(self._began_ms[index]))
        return self._axis == "step" or bool(self._rates[index].steps)

    def places(self, jobs_R: Integers, steps_R: Integers, at_ms_R: Integers) -> Floats:
        """Return the place of each step of each job; NaN: nobody knows."""
        if self._axis == "step":
            return steps_R.astype(np.float64)
        if self._axis == "seconds":
            seconds_R: Floats = np.maximum((at_ms_R - self._began_ms[jobs_R]) / 1000, 0.0)
            return seconds_R
        places_R = np.full(len(jobs_R), np.nan)
        for index in np.unique(jobs_R).tolist():
            own_R = jobs_R == index
            places_R[own_R] = self._rates[index].at(steps_R[own_R])
        return places_R
