"""Making and changing webhooks: what a target needs is checked, and what signs for it is encrypted as secrets of jobs.

The key of the signatures is answered once, when it is made. The URL of a chat or of a mailbox holds its password, so it
is a secret as a whole and never answered.
"""

import base64
import binascii
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.job_filters import ids_that_match
from apt_jobs.db.webhook_models import Webhook
from apt_jobs.db.webhooks import get_webhook, require_room
from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.ids import new_webhook_id
from apt_jobs.jobs.webhook_events import WebhookEvent
from apt_jobs.operations.secrets import decrypt_text, encrypt_text
from apt_jobs.settings import Settings
from apt_jobs.webhook_targets import MAX_URL_CHARS, TargetRules, parse_address, parse_target

KEY_PREFIX = "whsec_"
KEY_BYTES = 32
MIN_KEY_BYTES, MAX_KEY_BYTES = 24, 64  # as Standard Webhooks have it


@dataclass(frozen=True, slots=True)
class WebhookValues:
    """What an administrator sets of a webhook."""

    name: str
    kind: Literal["webhook", "apprise"]
    url: str | None  # None: the secret one of a chat or mailbox stays
    events: Sequence[WebhookEvent]
    filter: str | None
    queue_above: int | None


def check_values(settings: Settings, values: WebhookValues) -> None:
    """Return if target and events can be used. Ask before a transaction: apprise loads its services when first used.

    Raises:
        InvalidInput: not so.
    """
    if ("queue.too_long" in values.events) != (values.queue_above is not None):
        raise InvalidInput("`queue_above`, a number of jobs, and the event queue.too_long belong together: give both")
    if values.kind == "apprise":
        if values.url is not None:
            require_apprise(settings, values.url)
        return
    if values.url is None:
        raise InvalidInput("a webhook has a URL; write https://receiver.example/path")
    target = parse_target(values.url)
    address = parse_address(target.host)
    rules = TargetRules.parse(settings.webhook_allow_targets)
    if address is not None and (why := rules.why_refused(target.host, address)) is not None:
        raise InvalidInput(
            f"{address} is {why}; nothing is sent there unless the operator sets APT_JOBS_WEBHOOK_ALLOW_TARGETS"
        )


def create_webhook(
    session: Session, settings: Settings, values: WebhookValues, secret: str | None
) -> tuple[Webhook, str | None]:
    """Add a target that was checked; returns the row and, of a webhook, the key of its signatures.

    Nothing shows that key again.

    Raises:
        InvalidInput: its filter or secret cannot be used.
        Conflict: there are too many.
        Unavailable: the key that encrypts cannot be read.
    """
    require_room(session)
    ids_that_match(session, values.filter or "", 1)  # parsed and asked once: later it must not fail
    if values.kind == "apprise":
        if secret is not None:
            raise InvalidInput("a chat or mailbox has no key of signatures; leave `secret` out")
        hidden = values.url or ""
    else:
        hidden = new_secret() if secret is None else require_secret(secret)
    row = Webhook(id=new_webhook_id(), encrypted=encrypt_text(settings, hidden), created_at=now_plus(0))
    _set(row, values)
    session.add(row)
    session.flush()
    session.refresh(row)
    return row, hidden if values.kind == "webhook" else None


def change_webhook(
    session: Session, settings: Settings, webhook_id: str, values: WebhookValues, *, is_enabled: bool
) -> Webhook:
    """Set what an administrator may set. One that is enabled again begins with no failures.

    Raises:
        NotFound, InvalidInput, Unavailable: as above.
    """
    row = get_webhook(session, webhook_id, lock=True)
    ids_that_match(session, values.filter or "", 1)
    _set(row, values)
    if row.kind == "apprise" and values.url is not None:
        row.encrypted = encrypt_text(settings, values.url)
    if is_enabled:
        if row.disabled_at is not None:
            row.failing_since_at = None
        row.disabled_at = row.disabled_reason = None
    elif row.disabled_at is None:
        row.disabled_at, row.disabled_reason = now_plus(0), "an administrator disabled it"
    session.flush()
    session.refresh(row)
    return row


def hidden_value(settings: Settings, row: Webhook) -> str:
    """Return the key of the signatures, or the URL for apprise.

    Raises:
        Unavailable: this machine does not have the key that decrypts it.
    """
    return decrypt_text(settings, row.encrypted, f"webhook {row.id}")


def new_secret() -> str:
    """Return a random key of signatures, as Standard Webhooks write it."""
    return KEY_PREFIX + base64.b64encode(os.urandom(KEY_BYTES)).decode()


def require_secret(secret: str) -> str:
    """Return a key of signatures that a user brought.

    Raises:
        InvalidInput: it is none. The message does not show it.
    """
    try:
        key = base64.b64decode(secret.removeprefix(KEY_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith(KEY_PREFIX) or not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        raise InvalidInput(
            f"the secret is no key of signatures; expected {KEY_PREFIX} and {MIN_KEY_BYTES} to {MAX_KEY_BYTES} "
            "bytes in base64, or leave it out"
        )
    return secret


def service_of_url(url: str) -> str:
    """Return the service of an apprise URL, as `slack`."""
    return url.partition("://")[0].lower() if "://" in url else ""


def _set(row: Webhook, values: WebhookValues) -> None:
    row.name, row.kind, row.events = values.name, values.kind, list(values.events)
    row.filter, row.queue_above = values.filter or None, values.queue_above
    if values.kind == "webhook":
        row.url = values.url


def require_apprise(settings: Settings, url: str) -> None:
    """Return if apprise can send to this URL, and the operator lets it.

    Raises:
        InvalidInput: not so. The message shows the service only.
    """
    service = service_of_url(url)
    if service not in settings.alert_services:
        allowed = ", ".join(settings.alert_services) or "none"
        raise InvalidInput(
            f"alerts by {service[:40] or 'a URL without a service'!r} are not allowed; APT_JOBS_ALERT_SERVICES allows "
            f"{allowed}"
        )
    if len(url) > MAX_URL_CHARS or not url.isprintable():
        raise InvalidInput(f"the URL has more than {MAX_URL_CHARS:,} characters, or some that cannot be printed")
    try:
        import apprise
    except ImportError as exc:
        raise InvalidInput("alerts need the package apprise: pip install 'apt-jobs[alerts]'") from exc
    if apprise.Apprise.instantiate(url, suppress_exceptions=True) is None:
        raise InvalidInput(f"apprise cannot read this {service}:// URL; see https://appriseit.com for its form")
