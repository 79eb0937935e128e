"""The orders of `jobs/job_sort.py` in SQL: the keys of a row, its place in the order, and what lies beyond it."""

from typing import Any

from sqlalchemy import ColumnElement, Integer, Select, String, and_, case, func, or_, select, type_coerce
from sqlalchemy.orm import Session

from apt_jobs.db.json_numbers import best_metric, last_metric
from apt_jobs.db.models import Job
from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.job_sort import ACTIVE_GROUPS, ActiveSort, MetricSort, Sort

_COLUMNS: dict[str, ColumnElement[Any]] = {
    "created_at": type_coerce(Job.id, String),  # ids begin with the time
    "priority": type_coerce(Job.priority, Integer),
    "step": func.coalesce(Job.step, -1),
    "name": func.coalesce(Job.name, ""),
    "queue": type_coerce(Job.queue, String),
}
_GROUP_OF_STATE = {state: number for number, group in enumerate(ACTIVE_GROUPS) for state in group}


def sorted_ids(
    session: Session, sort: Sort, conditions: list[ColumnElement[bool]], after: str | None, offset: int, limit: int
) -> Select[Any]:
    """Select the ids of a page in an order that no index has: all that match are sorted; equal ones by id.

    Raises:
        InvalidInput: the job `after` is gone, and its place in this order with it.
    """
    is_sqlite = session.get_bind().dialect.name == "sqlite"
    key, key_is_descending, is_descending = _key(sort, is_sqlite)
    found = [*conditions]
    if after is not None:
        found.append(_beyond(session, key, after, key_is_descending, is_descending))
    order: list[ColumnElement[Any]] = [key.is_(None)] if isinstance(sort, MetricSort) else []
    order += [key.desc() if key_is_descending else key.asc(), Job.id.desc() if is_descending else Job.id.asc()]
    return select(Job.id).where(*found).order_by(*order).offset(offset or None).limit(limit)


def _key(sort: Sort, is_sqlite: bool) -> tuple[ColumnElement[Any], bool, bool]:
    """Return what is compared, whether its largest comes first, and whether the newest of equal ones does."""
    if isinstance(sort, ActiveSort):
        # Not the bare column: SQLite would choose an index of states, and read each row.
        state = func.coalesce(Job.state, "")
        return case(_GROUP_OF_STATE, value=state, else_=len(ACTIVE_GROUPS)), False, True
    if isinstance(sort, MetricSort):
        key = (best_metric if sort.is_best else last_metric)(sort.name, is_sqlite)
        return key, sort.is_descending, sort.is_descending
    return _COLUMNS[sort.column], sort.is_descending, sort.is_descending


def _beyond(
    session: Session, key: ColumnElement[Any], after: str, key_is_descending: bool, is_descending: bool
) -> ColumnElement[bool]:
    place = session.execute(select(key, Job.id).where(Job.id == after)).one_or_none()
    if place is None:
        raise InvalidInput(f"after: job {after!r} is gone, and its place with it; begin again without `after`")
    next_id = Job.id < after if is_descending else Job.id > after
    if place[0] is None:  # of those without a value, which are the last
        return and_(key.is_(None), next_id)
    beyond = key < place[0] if key_is_descending else key > place[0]
    return or_(key.is_(None), beyond, and_(key == place[0], next_id))
