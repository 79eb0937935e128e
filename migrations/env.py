"""Alembic's entry: migrations run on the connection that `apt_jobs.db.upgrade` hands over."""

from typing import Any

from alembic import context
from sqlalchemy import DateTime, Index, String
from sqlalchemy.sql.elements import UnaryExpression

from apt_jobs.db.clock import UtcDateTime
from apt_jobs.db.dialect_models import FileRow
from apt_jobs.db.job_counts import JobCount
from apt_jobs.db.sweep_models import Sweep
from apt_jobs.db.webhook_models import Webhook

connection = context.config.attributes["connection"]
ONLY_SQLITE, ONLY_POSTGRES = {"ix_jobs_search"}, {"ix_jobs_labels", "ix_jobs_text"}
is_sqlite = connection.dialect.name == "sqlite"


def _include(item: Any, _name: str | None, _kind: str, _reflected: bool, _compared: Any) -> bool:
    """Leave out indexes of the other dialect, and those whose order of columns Alembic cannot read back on SQLite."""
    if isinstance(item, Index) and item.name in (ONLY_POSTGRES if is_sqlite else ONLY_SQLITE):
        return False
    has_order = isinstance(item, Index) and any(isinstance(part, UnaryExpression) for part in item.expressions)
    return not (is_sqlite and has_order)


def _type_differs(_context: Any, _column: Any, _model_column: Any, found: Any, wanted: Any) -> bool | None:
    """An instant has another type in each dialect; None leaves all other types to Alembic."""
    if not isinstance(wanted, UtcDateTime):
        return None
    return not (isinstance(found, String) if is_sqlite else isinstance(found, DateTime) and found.timezone)


context.configure(
    connection=connection,
    # One: that of all tables, these included.
    target_metadata=[*{FileRow.metadata, JobCount.metadata, Sweep.metadata, Webhook.metadata}],
    render_as_batch=True,
    include_object=_include,
    compare_type=_type_differs,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
