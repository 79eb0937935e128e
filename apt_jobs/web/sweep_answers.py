"""What REST says of a sweep: its state, its progress, its settings by what they reached."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from apt_jobs.db.models import Job
from apt_jobs.db.sweep_models import Sweep, SweepRung, SweepTrial
from apt_jobs.db.sweep_values import metric_of, score_of_setting
from apt_jobs.events.codec import Number, timestamp
from apt_jobs.jobs.states import TERMINAL_STATES, JobState
from apt_jobs.web.schemas import at

SweepState = Literal["running", "paused", "cancelling", "succeeded", "failed", "cancelled"]
DELETED = "deleted"  # of a job that is gone
STOPPED = "stopped"  # by halving
MAX_NAMED_METRICS = 10


class TrialJob(BaseModel):
    """One job of a setting."""

    id: str
    repeat: int
    state: str = Field(description="A job's state; `stopped`: by halving; `deleted`: it is gone.")
    step: int | None
    num_steps: int | None
    value: Number | None = Field(description="What it reported last of the metric.")
    reason: str | None


class Rung(BaseModel):
    """What halving found at one rung."""

    step: int
    value: float | None = Field(description="null: it is not finite.")
    promoted: bool


class Trial(BaseModel):
    """One setting of a sweep, and what it reached."""

    number: int
    parameters: dict[str, Any]
    value: float | None = Field(description="Mean over the jobs that succeeded; null: none yet, or one is not finite.")
    interval: tuple[float, float] | None = Field(description="95 % interval of the mean; null: of one job.")
    jobs: list[TrialJob]
    rungs: list[Rung]


class SweepBest(BaseModel):
    """The setting that is ahead."""

    number: int
    parameters: dict[str, Any]
    value: float
    interval: tuple[float, float] | None
    job_id: str = Field(description="Its best job.")


class SweepProgress(BaseModel):
    """How many jobs are where."""

    total: int
    ended: int
    states: dict[str, int] = Field(description="Jobs in each state that there are.")


class SweepAnswer(BaseModel):
    object: Literal["sweep"] = "sweep"
    id: str
    name: str | None
    state: SweepState
    reason: str | None = Field(None, description="Why it failed. Only in the view of one sweep.")
    method: str
    metric: str
    goal: Literal["minimize", "maximize"]
    num_jobs: int
    repeats: int
    max_running: int | None
    created_at: str
    finished_at: str | None
    progress: SweepProgress
    spec: dict[str, Any]
    parameters: dict[str, Any]
    best: SweepBest | None = Field(None, description="Only in the view of one sweep.")
    table: list[Trial] | None = Field(None, description="All settings, the best first. Only in the view of one sweep.")


class SweepList(BaseModel):
    object: Literal["list"] = "list"
    data: list[SweepAnswer]
    has_more: bool


def sweep_answer(sweep: Sweep, counts: Mapping[str, int]) -> SweepAnswer:
    """Return a sweep as lists show it, from the number of its jobs in each state."""
    num_ended = sum(counts.get(state, 0) for state in TERMINAL_STATES) + sweep.num_jobs - sum(counts.values())
    return SweepAnswer(
        id=sweep.id,
        name=sweep.name,
        state=_state(sweep, counts, is_ended=num_ended >= sweep.num_jobs),
        method=sweep.request["method"],
        metric=sweep.metric,
        goal="minimize" if sweep.goal == "minimize" else "maximize",
        num_jobs=sweep.num_jobs,
        repeats=sweep.request["repeats"],
        max_running=sweep.max_running,
        created_at=timestamp(sweep.created_at),
        finished_at=at(sweep.finished_at),
        progress=SweepProgress(total=sweep.num_jobs, ended=num_ended, states=dict(counts)),
        spec=sweep.request["spec"],
        parameters=sweep.request["parameters"],
    )


def whole_sweep_answer(
    sweep: Sweep, trials: Sequence[tuple[SweepTrial, Job | None]], rungs: Sequence[SweepRung]
) -> SweepAnswer:
    """Return a sweep with its table and its best setting."""
    counts: dict[str, int] = {}
    for _, job in trials:
        if job is not None:
            counts[job.state] = counts.get(job.state, 0) + 1
    answer = sweep_answer(sweep, counts)
    answer.table = _table(sweep, trials, rungs)
    answer.best = _best(answer.table, is_minimized=sweep.goal == "minimize")
    if answer.state == "succeeded" and answer.best is None:
        answer.state, answer.reason = "failed", _why_no_value(sweep.metric, trials)
    elif answer.state == "failed":
        answer.reason = "no job succeeded"
    return answer


def _state(sweep: Sweep, counts: Mapping[str, int], *, is_ended: bool) -> SweepState:
    if not is_ended:
        if sweep.cancel_requested_at is not None:
            return "cancelling"
        return "running" if sweep.paused_at is None else "paused"
    if sweep.cancel_requested_at is not None:
        return "cancelled"
    return "succeeded" if counts.get(JobState.SUCCEEDED) else "failed"


def _table(sweep: Sweep, trials: Sequence[tuple[SweepTrial, Job | None]], rungs: Sequence[SweepRung]) -> list[Trial]:
    by_number: dict[int, list[tuple[SweepTrial, Job | None]]] = {}
    for trial, job in trials:
        by_number.setdefault(trial.number, []).append((trial, job))
    of_number: dict[int, list[SweepRung]] = {}
    for rung in rungs:
        of_number.setdefault(rung.number, []).append(rung)
    rows = [_trial(sweep.metric, jobs, of_number.get(number, [])) for number, jobs in by_number.items()]
    sign = 1.0 if sweep.goal == "minimize" else -1.0
    return sorted(rows, key=lambda row: (row.value is None, sign * (row.value or 0.0), row.number))


def _trial(metric: str, jobs: Sequence[tuple[SweepTrial, Job | None]], rungs: Sequence[SweepRung]) -> Trial:
    is_stopped = any(not rung.is_promoted for rung in rungs)
    score = score_of_setting(metric, jobs)
    return Trial(
        number=jobs[0][0].number,
        parameters=jobs[0][0].setting,
        value=None if score is None else score.mean,
        interval=None if score is None else score.interval,
        jobs=[_trial_job(metric, trial, job, is_stopped=is_stopped) for trial, job in jobs],
        rungs=[Rung(step=rung.step, value=rung.value, promoted=rung.is_promoted) for rung in rungs],
    )


def _trial_job(metric: str, trial: SweepTrial, job: Job | None, *, is_stopped: bool) -> TrialJob:
    if job is None:
        return TrialJob(
            id=trial.job_id, repeat=trial.repeat, state=DELETED, step=None, num_steps=None, value=None, reason=None
        )
    return TrialJob(
        id=job.id,
        repeat=trial.repeat,
        state=STOPPED if is_stopped and job.state == JobState.CANCELLED else job.state,
        step=job.step,
        num_steps=job.num_steps,
        value=metric_of(job, metric),
        reason=job.reason,
    )


def _best(table: Sequence[Trial], *, is_minimized: bool) -> SweepBest | None:
    if not table or table[0].value is None:
        return None
    first = table[0]
    done = [job for job in first.jobs if job.state == JobState.SUCCEEDED and isinstance(job.value, int | float)]
    choose = min if is_minimized else max
    job = choose(done, key=lambda one: float(one.value or 0.0))
    return SweepBest(
        number=first.number,
        parameters=first.parameters,
        value=table[0].value,
        interval=first.interval,
        job_id=job.id,
    )


def _why_no_value(metric: str, trials: Sequence[tuple[SweepTrial, Job | None]]) -> str:
    names: dict[str, None] = {}
    for _, job in trials:
        progress = (job.progress if job is not None else None) or {}
        names |= dict.fromkeys(name for name, value in progress.items() if isinstance(value, int | float))
        names |= dict.fromkeys(progress.get("metrics") or {})
    if metric in names:
        return f"no job that succeeded ended with a finite {metric!r}"
    shown = ", ".join(sorted(names)[:MAX_NAMED_METRICS]) or "nothing"
    return f"no job reported the metric {metric!r}; what they reported: {shown}"
