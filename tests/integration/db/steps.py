"""Steps that the tests of the database layer share: submit, claim, store events, let a lease end."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import update
from sqlalchemy.orm import Session

from apt_jobs.db import events as event_log
from apt_jobs.db import jobs
from apt_jobs.db.clock import now_plus
from apt_jobs.db.engine import Database
from apt_jobs.db.models import Job
from apt_jobs.events.codec import decode_payload
from apt_jobs.events.kinds import CheckpointSaved, Event, StateChanged, StepTrained, TrainingStarted
from apt_jobs.jobs.spec import TrainSpec

LEASE_S = 60.0


def submit(database: Database, **fields: Any) -> str:
    with database.write() as session:
        return jobs.insert_job(session, TrainSpec(kind="train", **fields)).id


def claim(database: Database, queue: str = "train", lease_s: float = LEASE_S) -> Job:
    with database.write() as session:
        claimed = jobs.claim_next(session, queue, "worker-a", lease_s)
    assert claimed is not None
    return claimed.job


def running(database: Database, **fields: Any) -> Job:
    """A job that its first attempt owns."""
    submit(database, **fields)
    return claim(database)


def job_of(database: Database, job_id: str) -> Job:
    with database.read() as session:
        return jobs.get_job(session, job_id)


def state_of(database: Database, job_id: str) -> str:
    return job_of(database, job_id).state


def states_in_log(database: Database, job_id: str) -> list[str]:
    with database.read() as session:
        rows = event_log.events_after(session, job_id, 0, 1000, kinds=["state"])
    changes = [decode_payload(row.kind, row.payload) for row in rows]
    return [change.state for change in changes if isinstance(change, StateChanged)]


def expire_lease(database: Database, job_id: str) -> None:
    """Let the lease end in the past, as if its owner had been dead for an hour."""
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=now_plus(-3600)))


def due_now(session: Session, job_id: str) -> None:
    """Skip the pause before the next attempt."""
    session.execute(update(Job).where(Job.id == job_id).values(not_before_at=now_plus(-1)))


def lose_worker(database: Database, job_id: str) -> None:
    """The owner dies; the reaper finds out; the pause passes."""
    expire_lease(database, job_id)
    with database.write() as session:
        assert jobs.reap_expired(session, 0)
        due_now(session, job_id)


def store(database: Database, job: Job, *events: Event) -> event_log.Appended:
    return store_at(database, job, [(datetime.now(UTC), event) for event in events])


def store_at(database: Database, job: Job, events: Sequence[tuple[datetime, Event]]) -> event_log.Appended:
    with database.write() as session:
        return event_log.append_events(session, job.id, job.attempt, events, LEASE_S)


def started(resumed_from_step: int = 0, num_steps: int = 100) -> TrainingStarted:
    return TrainingStarted(2, "cpu", "gloo", 1000, num_steps, 10, 256, resumed_from_step, {"d_model": 64})


def trained(step: int, loss: float = 2.0) -> StepTrained:
    return StepTrained(step, 0, loss, 1e-3, 0.5, step_time_ms=100.0, tokens_per_s=1000.0)


def saved(
    name: str, step: int, *, val_loss: float | None = 2.0, train_loss: float | None = 2.0, is_best: bool = False
) -> CheckpointSaved:
    return CheckpointSaved(f"ckpt_{name}", f"folder/{name}", step, 0, val_loss, train_loss, 10, is_best)
