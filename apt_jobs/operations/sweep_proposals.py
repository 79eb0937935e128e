"""The next settings of a sweep that learns from its jobs: chosen when they are released, by what others reached.

All jobs of the sweep are there from the beginning, with sampled settings. One that is held is given its own setting in
the transaction that releases it, so that a process that dies in between has changed nothing.
"""

from collections import defaultdict
from collections.abc import Sequence

from sqlalchemy import update
from sqlalchemy.orm import Session

from apt_jobs.db.job_edits import EDITABLE
from apt_jobs.db.jobs import new_job
from apt_jobs.db.models import Job
from apt_jobs.db.sweep_models import Sweep, SweepTrial
from apt_jobs.db.sweep_values import score_of_setting
from apt_jobs.db.sweeps import trials_of
from apt_jobs.jobs.states import TERMINAL_STATES
from apt_jobs.jobs.sweep_sampler import Sampler
from apt_jobs.jobs.sweeps import InvalidSweep, Setting, SweepSpec, spec_of

_FROM_SPEC = ("spec", "max_attempts", "code_sha256", "needs", "is_preemptible")  # columns that follow from a setting


def choose_settings(session: Session, sweep: Sweep, job_ids: Sequence[str]) -> None:
    """Give the settings of the jobs that are released now, of a locked sweep with method `tpe`."""
    request = SweepSpec.model_validate(sweep.request, strict=False)
    settings: dict[int, list[tuple[SweepTrial, Job | None]]] = defaultdict(list)
    for trial, job in trials_of(session, sweep.id):
        settings[trial.number].append((trial, job))
    wanted = [number for number, jobs in settings.items() if jobs[0][0].job_id in job_ids]  # repeats follow the first
    if not wanted:
        return
    sampler = Sampler(request, is_minimized=sweep.goal == "minimize", number=wanted[0])
    for number, jobs in settings.items():
        if number in wanted or all(job is not None and job.holds for _, job in jobs):
            continue
        score = score_of_setting(sweep.metric, jobs)
        if score is not None:
            sampler.add(jobs[0][0].setting, score.mean)
        elif any(job is not None and job.state not in TERMINAL_STATES for _, job in jobs):
            sampler.add(jobs[0][0].setting, None)
    for number in wanted:
        setting = sampler.propose()
        try:
            for trial, job in settings[number]:
                _give(session, request, setting, trial, job)
        except InvalidSweep:
            pass  # values that do not go together: the sampled setting, which was checked, stays


def _give(session: Session, request: SweepSpec, setting: Setting, trial: SweepTrial, job: Job | None) -> None:
    """Give a waiting job its setting; what somebody edited of it meanwhile stays."""
    if job is None or job.state in TERMINAL_STATES:
        return
    spec = spec_of(request, setting, trial.repeat)
    row = new_job(spec.model_copy(update={field: getattr(job, field) for field in EDITABLE if hasattr(spec, field)}))
    values = {column: getattr(row, column) for column in _FROM_SPEC}
    session.execute(update(Job).where(Job.id == job.id).values(**values).execution_options(synchronize_session=False))
    trial.setting = setting
