"""What no transaction of a job says: a worker that went silent, a queue that grew too long. Looked for now and then.

A condition that holds has a row for each webhook that was sent word of it, inserted with the delivery. The row goes
when the condition is over, so that the next time is sent again.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.job_counts import job_counts
from apt_jobs.db.models import WorkerRow
from apt_jobs.db.webhook_models import Webhook, WebhookCondition
from apt_jobs.db.webhook_outbox import enabled_webhooks, enqueue, terms_of
from apt_jobs.events.codec import timestamp
from apt_jobs.jobs.states import JobState
from apt_jobs.jobs.webhook_events import Subject, passes

LOST_WITHIN_S = 86_400.0  # a worker that was lost before that is old news
OVER_AT = 0.8  # a queue is long until it has shrunk to this part of the limit
Conditions = dict[tuple[str, str, str], dict[str, Any]]  # (webhook, event, subject) to what is sent


@dataclass(frozen=True, slots=True)
class ConditionChanges:
    """What is to be written: conditions that begin, and those that are over."""

    begun: Conditions
    ended: set[tuple[str, str, str]]

    def __bool__(self) -> bool:
        return bool(self.begun or self.ended)


def find_changes(session: Session, alive_within_s: float) -> ConditionChanges:
    """Compare what is wrong now with what was sent. Reads only."""
    webhooks = enabled_webhooks(session)
    known = {(row.webhook_id, row.event, row.subject) for row in session.scalars(select(WebhookCondition))}
    if not webhooks:
        return ConditionChanges({}, known)
    now: Conditions = {}
    asked = {event for webhook in webhooks for event in webhook.events}
    if "worker.lost" in asked:
        now |= _lost_workers(session, [hook for hook in webhooks if "worker.lost" in hook.events], alive_within_s)
    if "queue.too_long" in asked:
        now |= _long_queues(session, [hook for hook in webhooks if "queue.too_long" in hook.events], known)
    return ConditionChanges({key: data for key, data in now.items() if key not in known}, known - now.keys())


def apply_changes(session: Session, changes: ConditionChanges) -> int:
    """Write them. Of several processes that found the same one writes it; returns the number of new deliveries."""
    for webhook_id, event, subject in changes.ended:
        session.execute(
            delete(WebhookCondition)
            .where(
                WebhookCondition.webhook_id == webhook_id,
                WebhookCondition.event == event,
                WebhookCondition.subject == subject,
            )
            .execution_options(synchronize_session=False)
        )
    make_insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    num_written = 0
    for (webhook_id, event, subject), data in changes.begun.items():
        inserted = session.execute(
            make_insert(WebhookCondition)
            .values(webhook_id=webhook_id, event=event, subject=subject, since_at=now_plus(0))
            .on_conflict_do_nothing()
            .returning(WebhookCondition.subject)
        ).one_or_none()
        if inserted is not None and enqueue(session, webhook_id, event, data) is not None:
            num_written += 1
    return num_written


def _lost_workers(session: Session, webhooks: list[Webhook], alive_within_s: float) -> Conditions:
    silent = select(WorkerRow).where(
        WorkerRow.heartbeat_at < now_plus(-alive_within_s), WorkerRow.heartbeat_at > now_plus(-LOST_WITHIN_S)
    )
    found: Conditions = {}
    for worker in session.scalars(silent):
        subject = Subject(tuple(worker.queues), worker.kind)
        data = {
            "worker": worker.name,
            "kind": worker.kind,
            "hostname": worker.hostname,
            "queues": list(worker.queues),
            "job_id": worker.current_job_id,
            "heartbeat_at": timestamp(worker.heartbeat_at),
        }
        for webhook in webhooks:
            if worker.heartbeat_at > webhook.created_at and passes(terms_of(webhook), subject):
                found[webhook.id, "worker.lost", worker.name] = data
    return found


def _long_queues(session: Session, webhooks: list[Webhook], known: set[tuple[str, str, str]]) -> Conditions:
    found: Conditions = {}
    for queue, counts in job_counts(session).items():
        num_queued = counts.get(JobState.QUEUED, 0)
        for webhook in webhooks:
            key = (webhook.id, "queue.too_long", queue)
            limit = webhook.queue_above
            if limit is None or not passes(terms_of(webhook), Subject((queue,))):
                continue
            if num_queued > (limit * OVER_AT if key in known else limit):
                found[key] = {"queue": queue, "queued": num_queued, "limit": limit}
    return found
