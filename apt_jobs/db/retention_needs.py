"""What ended jobs are still needed for: no retention, however it is set, may remove it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from sqlalchemy import select
from sqlalchemy.orm import Session

from apt_jobs.db.checkpoints import newest_checkpoint
from apt_jobs.db.dialect_models import BatchRequest
from apt_jobs.db.model_aliases import list_aliases
from apt_jobs.db.models import Checkpoint, Job, JobParent, Schedule
from apt_jobs.db.service_values import DEFAULT_MODEL, get_value
from apt_jobs.db.sweep_models import Sweep, SweepTrial
from apt_jobs.jobs.spec import CHECKPOINT_ID_PATTERN, JOB_ID_PATTERN
from apt_jobs.jobs.states import TERMINAL_STATES, JobState

UNENDED = tuple(state for state in JobState if state not in TERMINAL_STATES)
_IDS_AT_ONCE = 500


@dataclass(slots=True)
class Needed:
    """Jobs that stay, with the reason, and the checkpoints among theirs that do."""

    jobs: dict[str, str] = field(default_factory=dict)
    checkpoints: set[str] = field(default_factory=set)
    with_all_checkpoints: set[str] = field(default_factory=set)  # jobs: any of theirs may be asked for

    def add_models(self, session: Session, names: Iterable[str | None], why: str) -> None:
        """Note what models are called: ids of checkpoints, or of jobs as `job_...` or `job_...@best`."""
        checkpoint_ids: list[str] = []
        for name in names:
            job_id = (name or "").partition("@")[0]
            if name is not None and CHECKPOINT_ID_PATTERN.match(name):
                checkpoint_ids.append(name)
            elif JOB_ID_PATTERN.match(job_id):
                self.jobs.setdefault(job_id, why)
                self.with_all_checkpoints.add(job_id)
        for begin in range(0, len(checkpoint_ids), _IDS_AT_ONCE):
            some = checkpoint_ids[begin : begin + _IDS_AT_ONCE]
            self.checkpoints.update(some)
            for job_id in session.scalars(select(Checkpoint.job_id).where(Checkpoint.id.in_(some))):
                self.jobs.setdefault(job_id, why)

    def add_jobs(self, ids: Iterable[str | None], why: str) -> None:
        """Note whole jobs."""
        for job_id in ids:
            if job_id is not None:
                self.jobs.setdefault(job_id, why)
                self.with_all_checkpoints.add(job_id)

    def merged_with(self, other: "Needed") -> "Needed":
        """Return what either of the two says."""
        return Needed(
            {**other.jobs, **self.jobs},
            self.checkpoints | other.checkpoints,
            self.with_all_checkpoints | other.with_all_checkpoints,
        )


def needed_now(session: Session) -> Needed:
    """Return what is promoted, and what unfinished jobs, sweeps, batches and schedules refer to.

    What it costs grows with what has not ended, not with what is kept.
    """
    found = Needed()
    default = get_value(session, DEFAULT_MODEL)
    if default is None and (newest := newest_checkpoint(session)) is not None:
        default = newest.id  # what a request without a name gets
    found.add_models(session, [default], "its model is the default one")
    found.add_models(session, list_aliases(session).values(), "its model has an alias")
    bases = select(Job.spec["base_model"].as_string()).where(Job.state.in_(UNENDED), Job.kind == "train")
    models = select(Job.spec["model"].as_string()).where(Job.state.in_(UNENDED), Job.kind == "generate")
    for query in (bases, models):
        found.add_models(session, session.scalars(query.distinct()), "a job that has not ended needs its model")
    specs = list(session.scalars(select(Schedule.spec)))
    named = [spec.get(name) for spec in specs for name in ("base_model", "model")]
    found.add_models(session, [name for name in named if isinstance(name, str)], "a schedule needs its model")
    found.add_jobs([after.get("job") for spec in specs for after in spec.get("after") or ()], "a schedule names it")
    parents = select(JobParent.parent_id).join(Job, Job.id == JobParent.job_id).where(Job.state.in_(UNENDED))
    found.add_jobs(session.scalars(parents.distinct()), "a job that has not ended comes after it")
    trials = select(SweepTrial.job_id).join(Sweep, Sweep.id == SweepTrial.sweep_id)
    found.add_jobs(session.scalars(trials.where(Sweep.finished_at.is_(None))), "its sweep has not ended")
    lines = select(BatchRequest.job_id).where(BatchRequest.is_failed.is_(None))
    found.add_jobs(session.scalars(lines), "its batch has not ended")
    return found


def needed_by_adapters(session: Session) -> Needed:
    """Return the base models of adapters that are kept. It reads all jobs with checkpoints: once for each run."""
    found = Needed()
    query = select(Job.spec["base_model"].as_string()).where(
        Job.spec["training"]["lora"]["r"].as_string().is_not(None), Job.id.in_(select(Checkpoint.job_id))
    )
    found.add_models(session, session.scalars(query.distinct()), "an adapter that is kept needs its model")
    return found
