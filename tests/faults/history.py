"""The judge: what must hold of every job's log, whatever was killed meanwhile."""

from collections.abc import Collection
from itertools import pairwise

from sqlalchemy import select
from sqlalchemy.orm import Session

from apt_jobs.db.engine import Database
from apt_jobs.db.events import events_after
from apt_jobs.db.models import Attempt, Job
from apt_jobs.events.codec import LoggedEvent, decode_payload
from apt_jobs.events.kinds import StateChanged
from apt_jobs.jobs.states import TERMINAL_STATES, TRANSITIONS, JobState


def faults_in(database: Database, job_ids: Collection[str] = ()) -> list[str]:
    """Every way in which a history (default: of all jobs) is not what a single owner at a time would have written."""
    with database.read() as session:
        jobs = [job for job in session.scalars(select(Job).order_by(Job.id)) if not job_ids or job.id in job_ids]
        return [fault for job in jobs for fault in _faults_of(session, job)]


def _faults_of(session: Session, job: Job) -> list[str]:
    events = events_after(session, job.id, 0, job.last_seq + 1)
    attempts = list(session.scalars(select(Attempt).where(Attempt.job_id == job.id)))
    faults = []
    if [event.seq for event in events] != list(range(1, job.last_seq + 1)):
        faults.append(f"{job.id}: seq is not contiguous up to {job.last_seq}")
    if any(later.attempt < earlier.attempt for earlier, later in pairwise(events)):
        faults.append(f"{job.id}: an attempt wrote after the next one had begun")
    if job.state not in TERMINAL_STATES:
        faults.append(f"{job.id}: never ended, is {job.state}")
    if len(attempts) != job.attempt or any(attempt.ended_at is None for attempt in attempts):
        faults.append(f"{job.id}: {job.attempt} attempts, of which the history knows {len(attempts)}, or not their end")
    return faults + _faults_of_states(job, events)


def _faults_of_states(job: Job, events: list[LoggedEvent]) -> list[str]:
    changes = [decode_payload(event.kind, event.payload) for event in events if event.kind == "state"]
    states = [JobState(change.state) for change in changes if isinstance(change, StateChanged)]
    faults = [
        f"{job.id}: {source} became {target}"
        for source, target in pairwise(states)
        if target not in TRANSITIONS[source]
    ]
    if sum(state in TERMINAL_STATES for state in states) != 1:
        faults.append(f"{job.id}: ended {sum(state in TERMINAL_STATES for state in states)} times")
    return faults
