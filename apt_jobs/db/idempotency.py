"""What an `Idempotency-Key` made: remembered for a day, for each owner of a key and each route apart.

`create_once` takes the key in the transaction that creates the resource, so of any number of requests with one key one
creates it and the others learn its id. A key that is older than `LIFETIME_S` is as good as unused.
"""

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import ColumnElement, delete, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.models import IdempotencyKeyRow
from apt_jobs.errors import IdempotencyMismatch

LIFETIME_S = 86_400.0


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """A key as one request sent it. `owner` is who sent it, `request_sha256` what was asked for."""

    owner: str
    route: str
    key: str
    request_sha256: str


def known_resource(session: Session, key: IdempotencyKey) -> str | None:
    """Return the id of what the key made; None: it is unused or expired.

    Raises:
        IdempotencyMismatch: the key was used with another body.
    """
    row = session.execute(
        select(IdempotencyKeyRow.resource_id, IdempotencyKeyRow.request_sha256).where(
            *_is(key), IdempotencyKeyRow.created_at > now_plus(-LIFETIME_S)
        )
    ).one_or_none()
    if row is None:
        return None
    if row.request_sha256 != key.request_sha256:
        raise IdempotencyMismatch(
            f"Idempotency-Key {key.key!r} was used on {key.route} with another body; send the same body, or a new key"
        )
    return str(row.resource_id)


def create_once(session: Session, key: IdempotencyKey | None, create: Callable[[], str]) -> tuple[str, bool]:
    """Create a resource unless the key made one before; returns its id and whether it was made before.

    Args:
        session: of the transaction in which `create` makes the resource.
        key: None: it is made in any case.
        create: makes the resource and returns its id.

    Raises:
        IdempotencyMismatch: the key was used with another body.
    """
    if key is None:
        return create(), False
    known = _claim_key(session, key)
    if known is not None:
        return known, True
    resource_id = create()
    _remember(session, key, resource_id)
    return resource_id, False


def sweep_expired(session: Session) -> int:
    """Delete expired keys; returns how many."""
    swept = session.execute(
        delete(IdempotencyKeyRow)
        .where(IdempotencyKeyRow.created_at <= now_plus(-LIFETIME_S))
        .returning(IdempotencyKeyRow.key)
        .execution_options(synchronize_session=False)
    ).all()
    return len(swept)


def _claim_key(session: Session, key: IdempotencyKey) -> str | None:
    """Take the key for this transaction, waiting for another one that has it; or return what it made before."""
    values = {
        "owner": key.owner,
        "route": key.route,
        "key": key.key,
        "request_sha256": key.request_sha256,
        "resource_id": "",
        "created_at": now_plus(0),
    }
    make_insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    claimed = session.execute(
        make_insert(IdempotencyKeyRow)
        .values(**values)
        .on_conflict_do_update(
            index_elements=["owner", "route", "key"],
            set_={name: values[name] for name in ("request_sha256", "resource_id", "created_at")},
            where=IdempotencyKeyRow.created_at <= now_plus(-LIFETIME_S),
        )
        .returning(IdempotencyKeyRow.key)
    ).one_or_none()
    return known_resource(session, key) if claimed is None else None


def _remember(session: Session, key: IdempotencyKey, resource_id: str) -> None:
    """Note what a claimed key made, in the same transaction."""
    session.execute(
        update(IdempotencyKeyRow)
        .where(*_is(key))
        .values(resource_id=resource_id)
        .execution_options(synchronize_session=False)
    )


def _is(key: IdempotencyKey) -> tuple[ColumnElement[bool], ...]:
    """Return the primary key as conditions."""
    return (
        IdempotencyKeyRow.owner == key.owner,
        IdempotencyKeyRow.route == key.route,
        IdempotencyKeyRow.key == key.key,
    )
