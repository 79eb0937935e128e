"""The tables of webhooks: targets, what is to be delivered to them, and what is wrong now and was sent already.

A delivery has no foreign key: the end of a job never waits for, or fails by, who changes a webhook.
"""

from datetime import datetime

from sqlalchemy import CheckConstraint, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from apt_jobs.db.clock import now_plus
from apt_jobs.db.documents import DOCUMENT, Words
from apt_jobs.db.models import Base

TARGET_KINDS = ("webhook", "apprise")
DELIVERY_STATES = ("waiting", "delivered", "failed")


class Webhook(Base):
    """One target."""

    __tablename__ = "webhooks"
    __table_args__ = (
        CheckConstraint("kind IN ('webhook', 'apprise')", name="kind"),
        CheckConstraint("queue_above >= 0", name="queue_above"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    kind: Mapped[str] = mapped_column(String(20))
    url: Mapped[str | None] = mapped_column(String(2_000))  # None: it is the secret
    encrypted: Mapped[str]  # key of the signatures, or URL for apprise: see operations/webhooks.py
    events: Mapped[list[str]] = mapped_column(DOCUMENT)
    filter: Mapped[str | None] = mapped_column(String(2_000))
    queue_above: Mapped[int | None]
    created_at: Mapped[datetime] = mapped_column(default=now_plus(0))
    failing_since_at: Mapped[datetime | None]  # first failure after the last success
    disabled_at: Mapped[datetime | None]  # nothing is sent, and nothing is kept to be sent
    disabled_reason: Mapped[str | None] = mapped_column(Words)


class Delivery(Base):
    """One message for one target, written in the transaction of what it is about; also the log of its tries."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        CheckConstraint("state IN ('waiting', 'delivered', 'failed')", name="state"),
        Index("ix_webhook_deliveries_due", "webhook_id", "state", "next_try_at"),
        Index("ix_webhook_deliveries_log", "webhook_id", "id"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)  # the message's `webhook-id`
    webhook_id: Mapped[str] = mapped_column(String(40))
    event: Mapped[str] = mapped_column(String(40))
    body: Mapped[str] = mapped_column(Words)  # JSON, as it is signed and sent
    state: Mapped[str] = mapped_column(String(20), default="waiting")
    created_at: Mapped[datetime] = mapped_column(default=now_plus(0))
    next_try_at: Mapped[datetime] = mapped_column(default=now_plus(0))  # during a try: when it counts as lost
    num_tries: Mapped[int] = mapped_column(default=0)  # the fencing token of a try
    ended_at: Mapped[datetime | None]
    status: Mapped[int | None]  # of the last answer
    duration_ms: Mapped[int | None]
    error: Mapped[str | None] = mapped_column(Words)  # why the last try failed
    answer: Mapped[str | None] = mapped_column(Words)  # the beginning of the last answer's body


class WebhookCondition(Base):
    """Something that is wrong now, of which a webhook was sent word. The primary key is the promise: once."""

    __tablename__ = "webhook_conditions"

    webhook_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    event: Mapped[str] = mapped_column(String(40), primary_key=True)
    subject: Mapped[str] = mapped_column(String(300), primary_key=True)  # name of the worker or queue
    since_at: Mapped[datetime] = mapped_column(default=now_plus(0))
