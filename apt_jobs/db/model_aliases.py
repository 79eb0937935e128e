"""Names that people gave to models, as `prod`. Promoting another model is one write; requests follow at once."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from apt_jobs.db.models import ServiceValue
from apt_jobs.db.service_values import get_value, set_value
from apt_jobs.errors import NotFound

_PREFIX = "model_alias:"


def alias_target(session: Session, name: str) -> str | None:
    """Return the id that an alias stands for; None: it is none."""
    return get_value(session, _PREFIX + name) if len(name) <= 80 else None


def list_aliases(session: Session) -> dict[str, str]:
    """Return the ids of all aliases, by name."""
    rows = session.scalars(
        select(ServiceValue).where(ServiceValue.key.startswith(_PREFIX, autoescape=True)).order_by(ServiceValue.key)
    )
    return {row.key.removeprefix(_PREFIX): row.value for row in rows}


def set_alias(session: Session, name: str, model_id: str) -> None:
    """Let a name stand for a model from now on."""
    set_value(session, _PREFIX + name, model_id)


def remove_alias(session: Session, name: str) -> None:
    """Let a name stand for nothing.

    Raises:
        NotFound: it does not stand for anything.
    """
    if alias_target(session, name) is None:
        raise NotFound(f"there is no alias {name[:100]!r}; GET /api/models lists those that there are")
    set_value(session, _PREFIX + name, None)
