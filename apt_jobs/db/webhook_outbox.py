"""The outbox: deliveries written in the very transaction of what they are about, thus kept or lost together with it.

What ends a job, opens an incident or misses a due time calls in here. Without webhooks that is one look at an empty
table; whatever is wrong with a webhook, the job's transaction goes on.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import func, insert, literal, select
from sqlalchemy.orm import Session

from apt_jobs.db.documents import encode_document
from apt_jobs.db.job_filters import conditions
from apt_jobs.db.models import Job, Schedule
from apt_jobs.db.webhook_models import Delivery, Webhook
from apt_jobs.errors import InvalidInput
from apt_jobs.events.codec import timestamp
from apt_jobs.events.kinds import Event, IncidentChanged
from apt_jobs.jobs.ids import new_delivery_id
from apt_jobs.jobs.job_filter import Term, parse_filter
from apt_jobs.jobs.states import JobState
from apt_jobs.jobs.webhook_events import JOB_ENDED, TEST_EVENT, Subject, passes

logger = logging.getLogger(__name__)

MAX_WAITING = 10_000  # deliveries of one webhook; further events are not kept for it
WARN_EVERY_S = 60.0
_quiet_until_s: dict[str, float] = {}  # by webhook, CLOCK_MONOTONIC
_ENABLED = select(Webhook).where(Webhook.disabled_at.is_(None)).order_by(Webhook.id)  # built once: it is asked often
_NUM_WAITING = "apt_jobs_num_waiting_deliveries"
MAX_TEXT_CHARS = 1_000  # of a reason or an error in a message


def enqueue_ended(session: Session, jobs: Sequence[Job]) -> None:
    """Write what webhooks are to be sent of jobs that have just ended."""
    if not jobs:
        return
    enabled = enabled_webhooks(session)
    for job in jobs if enabled else ():
        event = JOB_ENDED[JobState(job.state)]
        for webhook in _subscribed(enabled, event):
            if _job_passes(session, job.id, webhook):
                enqueue(session, webhook.id, event, _job_data(job))


def enqueue_incidents(session: Session, job: Job, events: Iterable[Event]) -> None:
    """Write what webhooks are to be sent of incidents that begin in a batch of a job's events."""
    begun = [event for event in events if isinstance(event, IncidentChanged) and event.phase == "begun"]
    if not begun:
        return
    for webhook in _subscribed(enabled_webhooks(session), "incident.opened"):
        if not _job_passes(session, job.id, webhook):
            continue
        for event in begun:
            incident = {
                "incident": event.incident,
                "anomaly": event.anomaly,
                "group": event.group,
                "began_step": event.began_step,
                "message": _cut(event.message),
            }
            enqueue(session, webhook.id, "incident.opened", {**_job_data(job), "incident": incident})


def enqueue_missed(session: Session, schedule: Schedule, outcome: str, times: Sequence[datetime], reason: str) -> None:
    """Write what webhooks are to be sent of due times of a schedule for which no job was submitted."""
    spec = schedule.spec
    kind = str(spec.get("kind", "train"))
    labels = spec.get("labels") if isinstance(spec.get("labels"), dict) else {}
    subject = Subject((str(spec.get("queue") or kind),), kind, schedule.id, labels)
    data = {
        "schedule_id": schedule.id,
        "name": schedule.name,
        "outcome": outcome,
        "first_due_at": timestamp(times[0]),
        "last_due_at": timestamp(times[-1]),
        "num_due_times": len(times),
        "reason": _cut(reason),
    }
    for webhook in _subscribed(enabled_webhooks(session), "schedule.missed"):
        if passes(terms_of(webhook), subject):
            enqueue(session, webhook.id, "schedule.missed", data)


def enqueue_test(session: Session, webhook: Webhook) -> Delivery:
    """Write a delivery that says nothing but that the target works."""
    data = {"webhook_id": webhook.id, "name": webhook.name}
    delivery_id = enqueue(session, webhook.id, TEST_EVENT, data, max_waiting=2 * MAX_WAITING)
    if delivery_id is None:
        raise InvalidInput(f"{2 * MAX_WAITING:,} deliveries of this webhook wait; delete it, or make its target answer")
    return session.scalars(select(Delivery).where(Delivery.id == delivery_id)).one()


def enqueue(
    session: Session, webhook_id: str, event: str, data: Mapping[str, Any], *, max_waiting: int = MAX_WAITING
) -> str | None:
    """Insert one delivery, due now; returns its id, or None if too many wait."""
    num_waiting: dict[str, int] = session.info.setdefault(_NUM_WAITING, {})  # as of this transaction
    if webhook_id not in num_waiting:
        waiting = select(literal(1)).where(Delivery.webhook_id == webhook_id, Delivery.state == "waiting")
        counted = select(func.count()).select_from(waiting.limit(max_waiting).subquery())  # in the index alone
        num_waiting[webhook_id] = session.scalar(counted) or 0
    if num_waiting[webhook_id] >= max_waiting:
        _warn_of_full(webhook_id, event)
        return None
    num_waiting[webhook_id] += 1
    delivery_id = new_delivery_id()
    body = encode_document({"type": event, "timestamp": timestamp(datetime.now(UTC)), "data": dict(data)})
    session.execute(insert(Delivery).values(id=delivery_id, webhook_id=webhook_id, event=event, body=body))
    return delivery_id


def _warn_of_full(webhook_id: str, event: str) -> None:
    """Log that an event is not kept: of one webhook at most once a minute."""
    now_s = time.monotonic()
    if now_s >= _quiet_until_s.get(webhook_id, 0.0):
        _quiet_until_s[webhook_id] = now_s + WARN_EVERY_S
        extra = {"webhook": webhook_id, "event": event}
        logger.warning("too many deliveries wait; events are not kept for the webhook", extra=extra)


def enabled_webhooks(session: Session) -> Sequence[Webhook]:
    """Return those that events are kept for. They are few: see `db/webhooks.py`."""
    return session.scalars(_ENABLED).all()


def terms_of(webhook: Webhook) -> list[Term]:
    """Return the terms of a webhook's filter, which was checked when it was set."""
    return parse_filter(webhook.filter or "")


def _subscribed(webhooks: Iterable[Webhook], event: str) -> list[Webhook]:
    return [webhook for webhook in webhooks if event in webhook.events]


def _job_passes(session: Session, job_id: str, webhook: Webhook) -> bool:
    if not webhook.filter:
        return True
    terms = conditions(terms_of(webhook), is_sqlite=session.get_bind().dialect.name == "sqlite")
    return session.scalar(select(Job.id).where(Job.id == job_id, *terms)) is not None


def _job_data(job: Job) -> dict[str, Any]:
    """Return what a message says of a job: enough to decide by, never its spec."""
    message = (job.error or {}).get("message")
    return {
        "job_id": job.id,
        "kind": job.kind,
        "name": job.name,
        "queue": job.queue,
        "labels": dict(job.labels),
        "state": job.state,
        "reason": _cut(job.reason),
        "error": _cut(message) if isinstance(message, str) else None,
        "attempt": job.attempt,
        "step": job.step,
        "num_steps": job.num_steps,
        "schedule_id": job.schedule_id,
        "sweep_id": job.sweep_id,
        "created_at": timestamp(job.created_at),
        "finished_at": None if job.finished_at is None else timestamp(job.finished_at),
    }


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= MAX_TEXT_CHARS else text[: MAX_TEXT_CHARS - 1] + "\u2026"
