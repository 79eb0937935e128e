"""Halving: what the jobs of a sweep had reached at each rung, and which of them go on.

Asynchronous successive halving (ASHA, Li et al. 2018, "A System for Massively Parallel Hyperparameter Tuning") in the
form that stops jobs: each job begins with all of its steps before it. When it reaches a rung, it is compared with those
that were there before, and goes on if it is among the best 1 / reduction_factor.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from apt_jobs.db.models import Job
from apt_jobs.db.series.custom_metrics import MetricLog
from apt_jobs.db.series.metric_summary import MAX_SUMMARIZED
from apt_jobs.db.series.read import read_buckets
from apt_jobs.db.series.store import CURVES
from apt_jobs.db.sweep_models import Sweep, SweepRung, SweepTrial
from apt_jobs.jobs.states import JobState
from apt_jobs.jobs.sweep_scores import is_promoted
from apt_jobs.jobs.sweeps import SweepSpec, rung_steps

SMOOTHED_SHARE = 10  # a value of every step is the mean of the last tenth of the steps: one batch is noise
_COMPARED = (JobState.RUNNING, JobState.PAUSING, JobState.PAUSED, JobState.SUCCEEDED)


@dataclass(frozen=True, slots=True)
class Decision:
    """That a job goes on at a rung, or is stopped there."""

    job_id: str
    number: int  # of its trial
    rung: int  # from 0
    step: int
    value: float
    is_promoted: bool
    reason: str


def decide(session: Session, sweep: Sweep) -> list[Decision]:
    """Return what is to be decided now: of each job that reached a rung and has a value there. Reads only."""
    halving = SweepSpec.model_validate(sweep.request, strict=False).halving
    if halving is None:
        return []
    made = session.scalars(select(SweepRung).where(SweepRung.sweep_id == sweep.id))
    decided = {(one.rung, one.number): one for one in made}
    values: dict[int, list[float]] = {}
    for (rung, _), one in decided.items():
        values.setdefault(rung, []).append(float("nan") if one.value is None else one.value)
    stopped = {one.number for one in decided.values() if not one.is_promoted}
    query = select(SweepTrial.number, Job.id, Job.state, Job.step, Job.num_steps)
    query = query.join(Job, Job.id == SweepTrial.job_id).where(Job.sweep_id == sweep.id, Job.state.in_(_COMPARED))
    found: list[Decision] = []
    for row in session.execute(query.order_by(SweepTrial.number)):
        if row.step is None:
            continue
        num_steps = halving.max_steps or row.num_steps or row.step + 1
        for rung, step in enumerate(rung_steps(halving, num_steps)):
            if row.number in stopped or row.step < step or (rung, row.number) in decided:
                continue
            if (value := value_at(session, row.id, sweep.metric, step, row.step)) is None:
                continue
            others = values.setdefault(rung, [])
            goes_on = is_promoted(value, others, halving.reduction_factor, is_minimized=sweep.goal == "minimize")
            others.append(value)
            if not goes_on and row.state != JobState.SUCCEEDED:
                stopped.add(row.number)
            reason = (
                f"stopped by its sweep at step {step}: {sweep.metric} {value:.6g} is not among the best "
                f"1/{halving.reduction_factor} of {len(others)}"
            )
            found.append(Decision(row.id, row.number, rung, step, value, goes_on, reason))
    return found


def insert_decision(session: Session, sweep_id: str, decision: Decision) -> None:
    """Store a decision. Its key exists once: whoever decides twice fails."""
    session.add(
        SweepRung(
            sweep_id=sweep_id,
            rung=decision.rung,
            number=decision.number,
            step=decision.step,
            value=decision.value if np.isfinite(decision.value) else None,
            is_promoted=decision.is_promoted,
        )
    )
    session.flush()


def value_at(session: Session, job_id: str, metric: str, step: int, last_step: int) -> float | None:
    """Return what a metric was at a step, from what was stored up to it; of a metric that began later, its first value.

    A curve of every step is averaged over the last tenth of the steps; a validation loss is the best so far; of what a
    script logs it is the last value. None: there is no value up to `last_step`.
    """
    if metric in CURVES:
        first = step - max(step // SMOOTHED_SHARE, 1) + 1
        bucket = read_buckets(session, job_id, "metric", 1, from_step=first, to_step=step)
        return None if not bucket.num_buckets else _of_bucket(bucket, bucket.mean_BL, CURVES.index(metric))
    if metric in ("val_loss", "best_val_loss"):
        for to_step in (step, last_step):
            bucket = read_buckets(session, job_id, "validation", 1, to_step=to_step)
            if bucket.num_buckets:
                return _of_bucket(bucket, bucket.min_BL, 0)
        return None
    logged = ((session.scalar(select(Job.progress).where(Job.id == job_id)) or {}).get("metrics")) or {}
    if metric not in logged and len(logged) < MAX_SUMMARIZED:
        return None  # it logged others only: its log need not be read
    log = MetricLog(job_id)
    log.read_on(session)
    for to_step in (step, last_step):
        if (series := log.series(to_step=to_step).get(metric)) is not None:
            return series.last
    return None


def _of_bucket(bucket: Any, statistic_BL: Any, column: int) -> float:
    """Return a statistic of one bucket; NaN if one of its values is not finite."""
    return float("nan") if bucket.num_nonfinite_BL[0, column] else float(statistic_BL[0, column])
