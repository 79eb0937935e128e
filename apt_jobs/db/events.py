"""The event log of a job: appended by the attempt that owns it, read by everyone after a `seq`.

Appending is one transaction: fence, `seq`, events, and the rows that events imply (progress, checkpoints, attempts, and
the levels of the histories). The numbers of every step are kept as columns (db/series/store.py), and shown by the log.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

from apt_jobs.db.jobs import StopRequests, fence, stop_requests_of
from apt_jobs.db.models import Attempt, Checkpoint, EventRow, Job
from apt_jobs.db.series.metric_summary import summarized
from apt_jobs.db.series.store import chunked_events, store_series
from apt_jobs.db.webhook_outbox import enqueue_incidents
from apt_jobs.errors import NotFound
from apt_jobs.events.codec import LoggedEvent, encode_payload, finite_or_name
from apt_jobs.events.columns import COLUMN_TYPES
from apt_jobs.events.kinds import (
    CheckpointRemoved,
    CheckpointSaved,
    Event,
    MetricsLogged,
    ProgressReported,
    StepTrained,
    StoredEvent,
    TrainingStarted,
    Validated,
)


@dataclass(frozen=True, slots=True)
class Appended:
    """What `append_events` did. `stored` is contiguous in `seq`."""

    stored: list[StoredEvent]
    stop_requests: StopRequests


def append_events(
    session: Session, job_id: str, attempt: int, events: Sequence[tuple[datetime, Event]], lease_s: float
) -> Appended:
    """Store a batch for an attempt and extend its lease.

    Raises:
        Fenced: the attempt no longer owns the job; nothing was stored.
    """
    job = fence(session, job_id, attempt, lease_s)
    stop_requests = stop_requests_of(job)
    if not events:
        return Appended([], stop_requests)
    stored = [
        StoredEvent(job_id, job.last_seq + number, attempt, at, event)
        for number, (at, event) in enumerate(events, start=1)
    ]
    _insert(session, stored)
    _apply(session, job, [event for _, event in events])
    enqueue_incidents(session, job, [event for _, event in events])
    return Appended(stored, stop_requests)


def append_service_event(session: Session, job_id: str, event: Event) -> StoredEvent:
    """Store an event that the service itself made, whoever owns the job.

    Raises:
        NotFound: there is no such job.
    """
    row = session.execute(
        update(Job)
        .where(Job.id == job_id)
        .values(last_seq=Job.last_seq + 1)
        .returning(Job.last_seq, Job.attempt)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    if row is None:
        raise NotFound(f"no job {job_id!r}")
    stored = StoredEvent(job_id, row.last_seq, row.attempt, datetime.now(UTC), event)
    _insert(session, [stored])
    return stored


def events_after(session: Session, job_id: str, after: int, limit: int, kinds: Sequence[str] = ()) -> list[LoggedEvent]:
    """At most `limit` events with `seq > after`, in order."""
    query = select(EventRow).where(EventRow.job_id == job_id, EventRow.seq > after)
    if kinds:
        query = query.where(EventRow.kind.in_(kinds))
    rows = session.scalars(query.order_by(EventRow.seq).limit(limit))
    found = [LoggedEvent(row.seq, row.kind, row.attempt, row.step, row.at, row.payload) for row in rows]
    for kind in COLUMN_TYPES.keys() & kinds if kinds else COLUMN_TYPES:
        last_seq = after + limit if not kinds else None  # `seq` has no hole
        found += chunked_events(session, job_id, kind, after, limit, last_seq)
    return sorted(found, key=lambda event: event.seq)[:limit]


def log_events_before(
    session: Session, job_id: str, before: int, limit: int, kinds: Sequence[str]
) -> list[LoggedEvent]:
    """Return at most `limit` events of `kinds` with `seq < before`, the newest ones, in order.

    Args:
        session: An open session.
        job_id: Id of a job.
        before: First `seq` that is not wanted.
        limit: Most events.
        kinds: Kinds that are stored as rows, thus none of `COLUMN_TYPES`.
    """
    query = select(EventRow).where(EventRow.job_id == job_id, EventRow.seq < before, EventRow.kind.in_(kinds))
    rows = list(session.scalars(query.order_by(EventRow.seq.desc()).limit(limit)))
    return [LoggedEvent(row.seq, row.kind, row.attempt, row.step, row.at, row.payload) for row in reversed(rows)]


def head_and_state(session: Session, job_id: str) -> tuple[int, str | None]:
    """Return the last `seq` of a job and its state; 0 and None: there is no such job."""
    row = session.execute(select(Job.last_seq, Job.state).where(Job.id == job_id)).one_or_none()
    return (0, None) if row is None else (row.last_seq, row.state)


def head_seqs(session: Session, job_ids: Sequence[str]) -> dict[str, int]:
    """Return the last `seq` of each of these jobs that exists."""
    rows = session.execute(select(Job.id, Job.last_seq).where(Job.id.in_(job_ids)))
    return {row.id: row.last_seq for row in rows}


def _insert(session: Session, stored: Sequence[StoredEvent]) -> None:
    rows = [event for event in stored if event.event.kind not in COLUMN_TYPES]
    if rows:
        _insert_rows(session, rows)
    store_series(session, stored)


def _insert_rows(session: Session, stored: Sequence[StoredEvent]) -> None:
    session.execute(
        insert(EventRow),
        [
            {
                "job_id": event.job_id,
                "seq": event.seq,
                "attempt": event.attempt,
                "kind": event.event.kind,
                "step": getattr(event.event, "step", None),
                "at": event.at,
                "payload": encode_payload(event.event),
            }
            for event in stored
        ],
    )


def _apply(session: Session, job: Job, events: Sequence[Event]) -> None:
    """Bring the job's row, its attempt and its checkpoints up to date with a batch that was just stored."""
    values: dict[str, Any] = {"last_seq": job.last_seq + len(events)}
    of_attempt: dict[str, Any] = {}
    progress = dict(job.progress or {})
    for event in events:
        match event:
            case TrainingStarted():
                values |= {"step": event.resumed_from_step, "num_steps": event.num_steps}
                of_attempt["resumed_from_step"] = event.resumed_from_step
                progress |= {
                    "step": event.resumed_from_step,
                    "eta_s": None,
                    "num_parameters": event.num_parameters,
                    "num_trainable_parameters": event.num_trainable_parameters,
                    "steps_per_epoch": event.steps_per_epoch,
                }
            case StepTrained():
                values["step"] = of_attempt["last_step"] = event.step
                progress |= _progress_of(event, values.get("num_steps", job.num_steps))
            case ProgressReported():
                values["step"] = of_attempt["last_step"] = event.step
                values["num_steps"] = event.num_steps
                eta_s = None if event.eta_s is None else finite_or_name(event.eta_s)
                progress |= {"step": event.step, "eta_s": eta_s}
            case MetricsLogged():
                progress["metrics"] = summarized(progress.get("metrics"), event)
            case Validated():
                progress["val_loss"] = finite_or_name(event.val_loss)
                if event.is_best:
                    progress["best_val_loss"] = finite_or_name(event.val_loss)
            case CheckpointSaved():
                values |= {"num_job_faults_without_checkpoint": 0, "num_infrastructure_faults": 0}
                _insert_checkpoint(session, job, event)
            case CheckpointRemoved():
                session.execute(
                    delete(Checkpoint)
                    .where(Checkpoint.id == event.checkpoint_id, Checkpoint.job_id == job.id)
                    .execution_options(synchronize_session=False)
                )
    values["progress"] = progress or None
    session.execute(update(Job).where(Job.id == job.id).values(**values).execution_options(synchronize_session=False))
    if of_attempt:
        session.execute(
            update(Attempt)
            .where(Attempt.job_id == job.id, Attempt.attempt == job.attempt)
            .values(**of_attempt)
            .execution_options(synchronize_session=False)
        )


def _progress_of(event: StepTrained, num_steps: int | None) -> dict[str, Any]:
    eta_s = None if num_steps is None else max(num_steps - event.step, 0) * event.step_time_ms / 1000.0
    return {
        "step": event.step,
        "epoch": event.epoch,
        "train_loss": finite_or_name(event.train_loss),
        "learning_rate": finite_or_name(event.learning_rate),
        "grad_norm": finite_or_name(event.grad_norm),
        "tokens_per_s": finite_or_name(event.tokens_per_s),
        "eta_s": None if eta_s is None else finite_or_name(eta_s),
    }


def _insert_checkpoint(session: Session, job: Job, event: CheckpointSaved) -> None:
    if event.is_best:
        session.execute(
            update(Checkpoint)
            .where(Checkpoint.job_id == job.id)
            .values(is_best=False)
            .execution_options(synchronize_session=False)
        )
    session.add(
        Checkpoint(
            id=event.checkpoint_id,
            job_id=job.id,
            attempt=job.attempt,
            filename=event.filename,
            step=event.step,
            epoch=event.epoch,
            val_loss=_finite_or_none(event.val_loss),
            train_loss=_finite_or_none(event.train_loss),
            size_bytes=event.size_bytes,
            is_best=event.is_best,
        )
    )
    session.flush()


def _finite_or_none(loss: float | None) -> float | None:
    """SQLite stores NaN as NULL; so does Postgres, then. The event keeps the value."""
    return loss if loss is not None and math.isfinite(loss) else None
