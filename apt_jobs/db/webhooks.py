"""Targets, the log of their deliveries, and the tries: claimed under a lease, so that several web processes share them.

A try that its process does not live to record is made again when its lease is over: a message is delivered at least
once, and a receiver knows a second copy by its id.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Select, delete, func, or_, select, union_all, update
from sqlalchemy.orm import Session

from apt_jobs.backoff import Backoff
from apt_jobs.db.clock import now_plus
from apt_jobs.db.webhook_models import Delivery, Webhook, WebhookCondition
from apt_jobs.errors import Conflict, NotFound
from apt_jobs.jobs.webhook_events import TEST_EVENT

MAX_WEBHOOKS = 100
MAX_TRIES = 14
MAX_CLAIMS = 100  # of tries whose process died, or lacks the key of the secrets, before each could be recorded
MAX_WAIT_S = 43_200.0
MAX_LOGGED = 10_000  # ended deliveries of one webhook that are kept
PRUNED_AT_ONCE = 1_000
GONE = 410


@dataclass(frozen=True, slots=True)
class Try:
    """What a process makes of a delivery that it claimed: rows as they were then."""

    delivery: Delivery
    webhook: Webhook


@dataclass(frozen=True, slots=True)
class TryResult:
    """What came of it. `error` is None for a success."""

    status: int | None
    duration_ms: int
    error: str | None = None
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class DeliveryRules:
    """How long to go on."""

    retry_wait_s: float  # after a first failure; doubles
    disable_after_s: float  # without any success in between


def list_webhooks(session: Session) -> Sequence[Webhook]:
    """Return all, oldest first."""
    return session.scalars(select(Webhook).order_by(Webhook.id)).all()


def get_webhook(session: Session, webhook_id: str, *, lock: bool = False) -> Webhook:
    """Return the row as it is now.

    Raises:
        NotFound: there is no such webhook.
    """
    row = session.get(Webhook, webhook_id, populate_existing=True, with_for_update=lock or None)
    if row is None:
        raise NotFound(f"no webhook {webhook_id[:100]!r}; GET /api/webhooks lists them")
    return row


def require_room(session: Session) -> None:
    """Return if another webhook may be made.

    Raises:
        Conflict: there are too many.
    """
    if (session.scalar(select(func.count()).select_from(Webhook)) or 0) >= MAX_WEBHOOKS:
        raise Conflict(f"there are {MAX_WEBHOOKS} webhooks already; delete one")


def delete_webhook(session: Session, webhook_id: str) -> None:
    """Remove a target with its log. What is on its way arrives."""
    session.delete(get_webhook(session, webhook_id, lock=True))
    for table in (Delivery, WebhookCondition):
        session.execute(
            delete(table).where(table.webhook_id == webhook_id).execution_options(synchronize_session=False)
        )


def num_waiting(session: Session, webhook_ids: Sequence[str]) -> dict[str, int]:
    """Return how many deliveries of each webhook are not over."""
    counted = (
        select(Delivery.webhook_id, func.count())
        .where(Delivery.webhook_id.in_(webhook_ids), Delivery.state == "waiting")
        .group_by(Delivery.webhook_id)
    )
    return dict(session.execute(counted).all())


def list_deliveries(
    session: Session, webhook_id: str, *, state: str | None = None, after: str | None = None, limit: int = 50
) -> tuple[list[Delivery], bool]:
    """Return a page of the log, newest first, and whether there are more.

    Raises:
        NotFound: there is no such webhook.
    """
    get_webhook(session, webhook_id)
    query = select(Delivery).where(Delivery.webhook_id == webhook_id)
    if state is not None:
        query = query.where(Delivery.state == state)
    if after is not None:
        query = query.where(Delivery.id < after)
    rows = list(session.scalars(query.order_by(Delivery.id.desc()).limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def replay_delivery(session: Session, webhook_id: str, delivery_id: str) -> Delivery:
    """Send a message again, with its id, from the first try on. One that waits is due now.

    Raises:
        NotFound: it is not in the log of this webhook.
        Conflict: the webhook is disabled.
    """
    webhook = get_webhook(session, webhook_id)
    if webhook.disabled_at is not None:
        raise Conflict(f"webhook {webhook_id} is disabled: {webhook.disabled_reason}; enable it first")
    row = session.scalars(
        update(Delivery)
        .where(Delivery.id == delivery_id, Delivery.webhook_id == webhook_id)
        .values(state="waiting", next_try_at=now_plus(0), num_tries=0, ended_at=None)
        .returning(Delivery)
        .execution_options(synchronize_session=False, populate_existing=True)
    ).one_or_none()
    if row is None:
        raise NotFound(f"webhook {webhook_id} has no delivery {delivery_id[:100]!r} in its log")
    return row


def due_deliveries(session: Session, num_taken: Mapping[str, int], max_at_once: int) -> list[str]:
    """Return ids of deliveries that are due, of each webhook so many as still may be under way in this process.

    Args:
        session: for reading.
        num_taken: Deliveries that this process has under way, by webhook.
        max_at_once: Most of one webhook: a target that hangs holds up only its own.
    """
    firsts: list[Select[tuple[str]]] = []
    for webhook_id, disabled_at in session.execute(select(Webhook.id, Webhook.disabled_at)):
        room = max_at_once - num_taken.get(webhook_id, 0)
        if room > 0:
            is_sent = Delivery.event == TEST_EVENT if disabled_at is not None else None
            firsts.append(_first_due(webhook_id, is_sent, room))
    if not firsts:
        return []
    return list(session.scalars(union_all(*firsts)))


def _first_due(webhook_id: str, is_sent: ColumnElement[bool] | None, limit: int) -> Select[tuple[str]]:
    due = select(Delivery.id).where(
        Delivery.webhook_id == webhook_id, Delivery.state == "waiting", Delivery.next_try_at <= now_plus(0)
    )
    if is_sent is not None:
        due = due.where(is_sent)
    return select(due.order_by(Delivery.next_try_at, Delivery.id).limit(limit).subquery().c.id)


def claim_deliveries(session: Session, delivery_ids: Sequence[str], lease_s: float) -> list[Try]:
    """Take those of the deliveries that nobody else took meanwhile, for as long as a try can take."""
    session.execute(
        update(Delivery)
        .where(Delivery.id.in_(delivery_ids), Delivery.state == "waiting", Delivery.num_tries >= MAX_CLAIMS)
        .values(state="failed", ended_at=now_plus(0), error=f"no process recorded one of {MAX_CLAIMS} tries")
        .execution_options(synchronize_session=False)
    )
    claimed = session.scalars(
        update(Delivery)
        .where(Delivery.id.in_(delivery_ids), Delivery.state == "waiting", Delivery.next_try_at <= now_plus(0))
        .values(num_tries=Delivery.num_tries + 1, next_try_at=now_plus(lease_s))
        .returning(Delivery)
        .execution_options(synchronize_session=False, populate_existing=True)
    ).all()
    rows = {row.id: row for row in session.scalars(select(Webhook).where(_is_of(claimed)))}
    return [Try(row, rows[row.webhook_id]) for row in claimed if row.webhook_id in rows]


def _is_of(deliveries: Sequence[Delivery]) -> ColumnElement[bool]:
    return Webhook.id.in_({row.webhook_id for row in deliveries})


def record_try(session: Session, attempt: Try, result: TryResult, rules: DeliveryRules) -> str | None:
    """Note what came of a try. None: its lease was over and another process has taken the delivery.

    Returns:
        The state that the delivery has now.
    """
    tries = attempt.delivery.num_tries
    state, wait_s = "delivered", 0.0
    if result.error is not None:
        state = "failed" if tries >= MAX_TRIES or result.status == GONE else "waiting"
        wait_s = Backoff(rules.retry_wait_s, MAX_WAIT_S).wait_s(tries)
    recorded = session.scalar(
        update(Delivery)
        .where(Delivery.id == attempt.delivery.id, Delivery.num_tries == tries, Delivery.state == "waiting")
        .values(
            state=state,
            next_try_at=now_plus(wait_s),
            ended_at=None if state == "waiting" else now_plus(0),
            status=result.status,
            duration_ms=result.duration_ms,
            error=result.error,
            answer=result.answer,
        )
        .returning(Delivery.id)
        .execution_options(synchronize_session=False)
    )
    _note_health(session, attempt.webhook.id, result, rules)
    return None if recorded is None else state


def _note_health(session: Session, webhook_id: str, result: TryResult, rules: DeliveryRules) -> None:
    """Remember since when a target fails, and disable one that does so for too long or says that it is gone."""
    is_it = Webhook.id == webhook_id
    unsynchronized = {"synchronize_session": False}
    if result.error is None:
        working = update(Webhook).where(is_it, Webhook.failing_since_at.is_not(None)).values(failing_since_at=None)
        session.execute(working.execution_options(**unsynchronized))
        return
    since, now = (
        session.scalars(
            update(Webhook)
            .where(is_it)
            .values(failing_since_at=func.coalesce(Webhook.failing_since_at, now_plus(0)))
            .returning(Webhook.failing_since_at)
            .execution_options(**unsynchronized)
        ).one_or_none(),
        session.scalars(select(now_plus(0))).one(),
    )
    reason = _why_disable(since, now, result, rules)
    if reason is not None:
        disabled = update(Webhook).where(is_it, Webhook.disabled_at.is_(None))
        session.execute(
            disabled.values(disabled_at=now_plus(0), disabled_reason=reason).execution_options(**unsynchronized)
        )


def _why_disable(since: datetime | None, now: datetime, result: TryResult, rules: DeliveryRules) -> str | None:
    if result.status == GONE:
        return "its target answered 410: it is gone"
    if since is not None and now - since >= timedelta(seconds=rules.disable_after_s):
        return f"nothing was delivered for {rules.disable_after_s / 3600:g} hours; the last failure: {result.error}"
    return None


def prune_deliveries(session: Session, keep_s: float) -> int:
    """Delete some of what is older than `keep_s`, beyond `MAX_LOGGED`, or of no webhook; returns how many."""
    found: set[str] = set(
        session.scalars(
            select(Delivery.id)
            .where(
                or_(Delivery.created_at < now_plus(-keep_s), Delivery.webhook_id.not_in(select(Webhook.id))),
                or_(Delivery.state != "waiting", Delivery.next_try_at < now_plus(0)),  # no try is under way
            )
            .limit(PRUNED_AT_ONCE)
        )
    )
    for webhook in list_webhooks(session):
        ended = select(Delivery.id).where(Delivery.webhook_id == webhook.id, Delivery.state != "waiting")
        found |= set(session.scalars(ended.order_by(Delivery.id.desc()).offset(MAX_LOGGED).limit(PRUNED_AT_ONCE)))
    if found:
        session.execute(delete(Delivery).where(Delivery.id.in_(found)).execution_options(synchronize_session=False))
    return len(found)
