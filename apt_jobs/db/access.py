"""Who may do what: API keys, one-time login tokens and browser sessions. Only hashes of secrets are stored.

The secrets have 256 random bits, so a plain SHA-256 is enough: there is no dictionary to try.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.models import ApiKey, BrowserSession, LoginToken
from apt_jobs.errors import Denied, NotFound

KEY_PREFIX = "apt_"
KEY_OWNER = "key:"  # begins the `owner` of a principal that came with a key
_KEY = re.compile(r"apt_([0-9a-f]{16})_([0-9a-f]{64})")


class Role(StrEnum):
    """What a principal may do; each may do what those before it may."""

    VIEWER = "viewer"  # read
    SUBMITTER = "submitter"  # and submit, cancel, generate
    ADMIN = "admin"  # and delete, manage keys

    def includes(self, other: "Role") -> bool:
        """Return whether this role may do all that `other` may."""
        order = list(Role)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who makes a request."""

    name: str
    role: Role
    owner: str = field(default="", compare=False)  # stable id of the key or session; holds no secret


def create_key(session: Session, name: str, role: Role, expires_at: datetime | None = None) -> str:
    """Make an API key `apt_<id>_<secret>` and return it: it can never be shown again."""
    key_id, secret = secrets.token_hex(8), secrets.token_hex(32)
    session.add(ApiKey(id=key_id, name=name, role=role, secret_sha256=_sha256(secret), expires_at=expires_at))
    return f"{KEY_PREFIX}{key_id}_{secret}"


def authenticate_key(session: Session, key: str) -> Principal:
    """Return the owner of a key.

    Raises:
        Denied: the key is unknown, wrong, expired or revoked; the message does not say which.
    """
    parts = _KEY.fullmatch(key)
    if parts is None:
        raise Denied("this API key is not valid")
    key_id, secret = parts.groups()
    row = session.scalar(
        select(ApiKey).where(
            ApiKey.id == key_id,
            ApiKey.revoked_at.is_(None),
            ApiKey.expires_at.is_(None) | (ApiKey.expires_at > now_plus(0)),
        )
    )
    expected = row.secret_sha256 if row is not None else _sha256("")
    right = hmac.compare_digest(expected, _sha256(secret))
    if row is None or not right:
        raise Denied("this API key is not valid")
    return Principal(row.name, Role(row.role), f"{KEY_OWNER}{row.id}")


def list_keys(session: Session) -> list[ApiKey]:
    """Return all keys, oldest first, revoked ones included."""
    return list(session.scalars(select(ApiKey).order_by(ApiKey.created_at, ApiKey.id)))


def revoke_key(session: Session, key_id: str) -> None:
    """End a key at once. Idempotent.

    Raises:
        NotFound: there is no such key.
    """
    row = session.get(ApiKey, key_id)
    if row is None:
        raise NotFound(f"no API key {key_id!r}")
    session.execute(
        update(ApiKey)
        .where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
        .values(revoked_at=now_plus(0))
        .execution_options(synchronize_session=False)
    )


def revoke_keys_named(session: Session, name: str) -> None:
    """End all keys of a name: those that an earlier start of the same program left behind."""
    session.execute(
        update(ApiKey)
        .where(ApiKey.name == name, ApiKey.revoked_at.is_(None))
        .values(revoked_at=now_plus(0))
        .execution_options(synchronize_session=False)
    )


def note_use(session: Session, owners: Collection[str]) -> None:
    """Set `last_used_at` of the keys among these owners of requests to now."""
    key_ids = sorted(owner.removeprefix(KEY_OWNER) for owner in owners if owner.startswith(KEY_OWNER))
    if key_ids:
        session.execute(
            update(ApiKey)
            .where(ApiKey.id.in_(key_ids))
            .values(last_used_at=now_plus(0))
            .execution_options(synchronize_session=False)
        )


def create_login_token(session: Session, role: Role, lifetime_s: float) -> str:
    """Return a token that opens one browser session, once, within `lifetime_s` seconds."""
    token = secrets.token_urlsafe(32)
    session.execute(
        delete(LoginToken).where(LoginToken.expires_at < now_plus(0)).execution_options(synchronize_session=False)
    )
    session.add(LoginToken(token_sha256=_sha256(token), role=role, expires_at=now_plus(lifetime_s)))
    return token


def redeem_login_token(session: Session, token: str, session_hours: float) -> str:
    """Use up a login token and return the secret of a new browser session.

    Raises:
        Denied: the token is unknown, expired or was used.
    """
    role = session.execute(
        update(LoginToken)
        .where(
            LoginToken.token_sha256 == _sha256(token),
            LoginToken.used_at.is_(None),
            LoginToken.expires_at > now_plus(0),
        )
        .values(used_at=now_plus(0))
        .returning(LoginToken.role)
        .execution_options(synchronize_session=False)
    ).scalar()
    if role is None:
        raise Denied("this login link is not valid any more; `apt-jobs login-link` prints a new one")
    session.execute(
        delete(BrowserSession)
        .where(BrowserSession.expires_at < now_plus(0))
        .execution_options(synchronize_session=False)
    )
    secret = secrets.token_urlsafe(32)
    expires_at = now_plus(session_hours * 3600)
    session.add(BrowserSession(token_sha256=_sha256(secret), role=role, expires_at=expires_at))
    return secret


def authenticate_session(session: Session, secret: str) -> Principal:
    """Return the owner of a browser session.

    Raises:
        Denied: the session is unknown or over.
    """
    role = session.scalar(
        select(BrowserSession.role).where(
            BrowserSession.token_sha256 == _sha256(secret), BrowserSession.expires_at > now_plus(0)
        )
    )
    if role is None:
        raise Denied("this browser session is over; `apt-jobs login-link` prints a new link")
    return Principal("browser", Role(role), f"session:{_sha256(secret)[:32]}")


def end_session(session: Session, secret: str) -> None:
    """Log a browser out. Idempotent."""
    session.execute(
        delete(BrowserSession)
        .where(BrowserSession.token_sha256 == _sha256(secret))
        .execution_options(synchronize_session=False)
    )


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
