"""Sweeps: insert one with all of its jobs, and do its next steps, for REST and for the loop of every web process."""

import json
from collections.abc import Callable, Sequence

from sqlalchemy.orm import Session

from apt_jobs.db.engine import Database
from apt_jobs.db.sweep_models import Sweep
from apt_jobs.db.sweep_rungs import insert_decision
from apt_jobs.db.sweeps import finish_sweep, get_sweep, insert_sweep, lock_jobs, mark_paused, next_step, release
from apt_jobs.errors import Conflict, NotFound
from apt_jobs.events.kinds import StoredEvent
from apt_jobs.jobs import sweep_sampler
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.jobs.sweeps import InvalidSweep, PlannedJob, SweepFault, SweepSpec, single_changes
from apt_jobs.operations import steer
from apt_jobs.operations.data_directory import require_room
from apt_jobs.operations.submit import ReferenceFault, hold_model, reference_faults
from apt_jobs.operations.sweep_proposals import choose_settings
from apt_jobs.settings import Settings

MAX_STEPS_AT_ONCE = 100  # of one sweep: more are left to the next look
CANCELLED_WITH_SWEEP = "cancelled with its sweep"
PAUSED_WITH_SWEEP = "paused with its sweep"
_NO_REFERENCES = frozenset({"name", "labels", "priority", "arguments", "argv", "env", "training", "data", "monitor"})


def create_sweep(session: Session, settings: Settings, spec: SweepSpec, planned: Sequence[PlannedJob]) -> Sweep:
    """Check the jobs of a sweep and insert it with all of them. The caller wakes workers after the commit.

    Raises:
        InvalidSweep: a job names what does not exist.
        OutOfSpace: the disk has no room.
        Unavailable: too many jobs wait.
    """
    require_room(settings)
    specs = [one.spec for one in planned]
    if spec.method == "tpe":
        if not sweep_sampler.is_installed():
            raise InvalidSweep([SweepFault(("method",), "tpe", "needs Optuna: pip install 'apt-jobs[sweeps]'")])
        specs += single_changes(spec, planned)
    checked: dict[str, list[ReferenceFault]] = {}
    for one in specs:
        key = _references_of(one)
        if key not in checked:
            hold_model(session, one.base_model)
            checked[key] = reference_faults(session, settings, one)
        if checked[key]:
            raise InvalidSweep([_fault_of(spec, fault) for fault in checked[key]])
    return insert_sweep(session, spec, planned, settings.max_queued_jobs)


def advance_sweep(database: Database, sweep_id: str) -> tuple[list[StoredEvent], bool]:
    """Do what is to be done for a sweep now, in transactions of a few jobs.

    Returns the events to publish, and whether anything was done: held jobs that may be claimed now have no event.

    Raises:
        NotFound: there is no such sweep.
    """
    events: list[StoredEvent] = []
    is_changed = False
    for _ in range(MAX_STEPS_AT_ONCE):
        with database.read() as session:  # most looks find nothing: no write transaction for them
            sweep = get_sweep(session, sweep_id)
            step = next_step(session, sweep)
        if not step:
            break
        if step.release and sweep.request["method"] == "tpe":
            sweep_sampler.load()
        with database.write() as session:
            events += apply_step(session, sweep_id)
        is_changed = True
    return events, is_changed


def apply_step(session: Session, sweep_id: str) -> list[StoredEvent]:
    """Do what is to be done for a sweep now, with its row locked; returns the events to publish."""
    sweep = get_sweep(session, sweep_id, lock=True)
    step = next_step(session, sweep)
    lock_jobs(session, step)
    events: list[StoredEvent] = []
    for job_id in step.cancel:
        events += _steered(steer.cancel_job, session, job_id, CANCELLED_WITH_SWEEP)
    for job_id in step.pause:
        events += _steered(steer.pause_job, session, job_id, PAUSED_WITH_SWEEP)
    for job_id in step.resume:
        events += _steered(steer.resume_job, session, job_id)
    mark_paused(session, step.pause, is_paused=True)
    mark_paused(session, step.resume, is_paused=False)
    if step.release and sweep.request["method"] == "tpe":
        choose_settings(session, sweep, step.release)
    release(session, step.release)
    for decision in step.decisions:
        insert_decision(session, sweep_id, decision)
        if not decision.is_promoted:
            events += _steered(steer.cancel_job, session, decision.job_id, decision.reason)
    if step.finish:
        finish_sweep(session, sweep)
    return events


def _steered(verb: Callable[..., steer.Steered], session: Session, job_id: str, *reason: str) -> list[StoredEvent]:
    """Steer a job, unless it ended or was steered otherwise meanwhile."""
    try:
        return verb(session, job_id, *reason)[1]
    except (Conflict, NotFound):
        return []


def _references_of(spec: TrainSpec) -> str:
    """Return the same text for jobs that refer to the same things."""
    return json.dumps(spec.model_dump(mode="json", exclude=set(_NO_REFERENCES)), sort_keys=True)


def _fault_of(sweep: SweepSpec, fault: ReferenceFault) -> SweepFault:
    field = fault.field.replace("/", ".")
    where = ("parameters", field) if field in sweep.parameters else ("spec", *field.split("."))
    return SweepFault(where, fault.seen, fault.expected)
