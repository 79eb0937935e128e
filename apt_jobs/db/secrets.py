"""Rows of secrets, which this room neither encrypts nor reads: see `operations/secrets.py`."""

from collections.abc import Sequence

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.models import Secret
from apt_jobs.errors import NotFound


def get_secret(session: Session, name: str) -> Secret | None:
    """Return a row, or None."""
    return session.get(Secret, name, populate_existing=True)


def list_secrets(session: Session) -> Sequence[Secret]:
    """Return all rows, by name."""
    return session.scalars(select(Secret).order_by(Secret.name)).all()


def num_secrets(session: Session) -> int:
    """Return how many there are."""
    return session.scalar(select(func.count()).select_from(Secret)) or 0


def missing_secrets(session: Session, names: Sequence[str]) -> list[str]:
    """Return those of the names that no secret has."""
    if not names:
        return []
    found = set(session.scalars(select(Secret.name).where(Secret.name.in_(names))))
    return [name for name in names if name not in found]


def store_secret(session: Session, name: str, encrypted: str) -> Secret:
    """Write a row, over one that is there."""
    row = get_secret(session, name)
    if row is None:
        row = Secret(name=name, encrypted=encrypted, created_at=now_plus(0), updated_at=now_plus(0))
        session.add(row)
    else:
        row.encrypted, row.updated_at = encrypted, now_plus(0)
    session.flush()
    session.refresh(row)
    return row


def delete_secret(session: Session, name: str) -> None:
    """Remove a row.

    Raises:
        NotFound: there is none.
    """
    if session.scalar(delete(Secret).where(Secret.name == name).returning(Secret.name)) is None:
        raise NotFound(f"there is no secret {name[:100]!r}; GET /api/secrets lists them")
