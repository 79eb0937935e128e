"""Small facts of the whole service, by key. `default_model`: what generates when a request names no model."""

from sqlalchemy import delete, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from apt_jobs.db.models import ServiceValue

DEFAULT_MODEL = "default_model"


def get_value(session: Session, key: str) -> str | None:
    """Return the value, or None."""
    row = session.get(ServiceValue, key, populate_existing=True)
    return None if row is None else row.value


def set_value(session: Session, key: str, value: str | None) -> None:
    """Set a value, the last one wins; None removes it."""
    if value is None:
        session.execute(delete(ServiceValue).where(ServiceValue.key == key))
        return
    if _update(session, key, value):
        return
    try:
        with session.begin_nested():
            session.add(ServiceValue(key=key, value=value))
    except IntegrityError:  # another process set it first
        _update(session, key, value)


def add_value(session: Session, key: str, value: str) -> tuple[str, bool]:
    """Set a value unless there is one. Returns the value that it has, and whether that is this one."""
    try:
        with session.begin_nested():
            session.add(ServiceValue(key=key, value=value))
    except IntegrityError:
        return get_value(session, key) or value, False
    return value, True


def _update(session: Session, key: str, value: str) -> bool:
    known = session.execute(
        update(ServiceValue).where(ServiceValue.key == key).values(value=value).returning(ServiceValue.key)
    )
    return known.scalar() is not None
