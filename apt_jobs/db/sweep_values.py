"""What the jobs of a sweep reached of its metric."""

from collections.abc import Sequence

from apt_jobs.db.models import Job
from apt_jobs.db.sweep_models import SweepTrial
from apt_jobs.events.codec import Number
from apt_jobs.jobs.states import JobState
from apt_jobs.jobs.sweep_scores import Score, score_of


def metric_of(job: Job, metric: str) -> Number | None:
    """Return what a job reported last of a metric, the trainer's or a script's."""
    progress = job.progress or {}
    logged = (progress.get("metrics") or {}).get(metric)
    value: Number | None = progress.get(metric) if logged is None else logged["last"]
    return value if isinstance(value, int | float | str) else None


def score_of_setting(metric: str, jobs: Sequence[tuple[SweepTrial, Job | None]]) -> Score | None:
    """Return what a setting reached: the mean of its jobs that succeeded; None: none did, or one is not finite."""
    ended = [job for _, job in jobs if job is not None and job.state == JobState.SUCCEEDED]
    return score_of([as_float(metric_of(job, metric)) for job in ended])


def as_float(value: Number | None) -> float | None:
    """Return a number of a row as a float: what is not finite is stored by its name."""
    return None if value is None else float(value)
