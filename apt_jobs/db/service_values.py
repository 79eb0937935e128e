"""Small facts of the whole service, by key. `default_model`: what generates when a request names no model."""

from sqlalchemy.orm import Session

from apt_jobs.db.models import ServiceValue

DEFAULT_MODEL = "default_model"


def get_value(session: Session, key: str) -> str | None:
    """The value, or None."""
    row = session.get(ServiceValue, key, populate_existing=True)
    return None if row is None else row.value


def set_value(session: Session, key: str, value: str | None) -> None:
    """Set a value; None removes it."""
    row = session.get(ServiceValue, key)
    if value is None:
        if row is not None:
            session.delete(row)
    else:
        session.merge(ServiceValue(key=key, value=value))
