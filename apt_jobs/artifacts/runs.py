"""Run folders: one for each attempt of a job, with its run file, spools and logs."""

from pathlib import Path

from apt_jobs.artifacts.paths import inside
from apt_jobs.settings import Settings


def runs_of_job(settings: Settings, job_id: str) -> Path:
    """Return the folder of all attempts of a job.

    Raises:
        ValueError: the id is no name of a folder.
    """
    folder = inside(settings.runs_dir, job_id)
    if folder is None:
        raise ValueError(f"{job_id!r} is no id of a job")
    return folder


def run_dir(settings: Settings, job_id: str, attempt: int) -> Path:
    """Return the folder of one attempt."""
    return runs_of_job(settings, job_id) / f"attempt-{attempt}"
