"""The list of jobs by any filter: which ids are on a page, found in an index that has them in the list's order.

Every combination of state, kind and queue is at most 16 ranges of one index, and the newest ids of each are merged. A
label is found in an index of labels (Postgres) or by one pass over the index `ix_jobs_search` (SQLite), as is a text.
"""

import re
from collections.abc import Sequence
from typing import Any, get_args

from sqlalchemy import ColumnElement, Integer, Select, String, and_, collate, func, or_, select, type_coerce, union_all
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from apt_jobs.db.models import Job
from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.spec import GenerateSpec, TrainSpec
from apt_jobs.jobs.states import JobState

_PART_OF_ID = re.compile(r"[A-Za-z0-9_]{1,24}")
KINDS: tuple[str, ...] = tuple(
    kind for spec in (TrainSpec, GenerateSpec) for kind in get_args(spec.model_fields["kind"].annotation)
)
DEFAULT_SORT = "-created_at"
SORTS: dict[str, ColumnElement[Any]] = {
    "created_at": type_coerce(Job.id, String),  # ids begin with the time
    "priority": type_coerce(Job.priority, Integer),
    "step": func.coalesce(Job.step, -1),
    "name": func.coalesce(Job.name, ""),
}


def list_jobs(
    session: Session,
    *,
    states: Sequence[str] = (),
    kinds: Sequence[str] = (),
    queue: str | None = None,
    label: tuple[str, str] | None = None,
    text: str | None = None,
    terms: Sequence[ColumnElement[bool]] = (),
    sort: str = DEFAULT_SORT,
    after: str | None = None,
    limit: int = 50,
) -> tuple[list[Job], bool]:
    """Return a page of jobs, and whether there are more.

    Args:
        session: An open session.
        states: Only in one of these states; none: in any.
        kinds: Only of one of these kinds.
        queue: Only of this queue.
        label: Only with this label.
        text: Only with this in name or id.
        terms: Conditions of a filter (`db/job_filters.py`).
        sort: One of `SORTS`; with a minus the largest first.
        after: Last id seen.
        limit: Most jobs of the page.

    Raises:
        InvalidInput: the job `after` is gone, whose place in another order than that of ids nobody knows.
    """
    others: list[ColumnElement[bool]] = list(terms)
    is_sqlite = session.get_bind().dialect.name == "sqlite"
    if label is not None:
        others.append(has_label(*label, is_sqlite))
    if text:
        others.append(has_text(text, is_sqlite))
    if sort == DEFAULT_SORT:
        is_search = bool(others)
        if after is not None:
            others.append(Job.id < after)
        ids = list(session.scalars(_page(states, kinds, queue, others, limit + 1, in_ranges=not is_search)))
    else:
        given = ((Job.state, states), (Job.kind, kinds), (Job.queue, (queue,) if queue is not None else ()))
        others += [column.in_(values) for column, values in given if values]
        ids = list(session.scalars(_sorted_page(session, others, sort, after, limit + 1)))
    rows = {job.id: job for job in session.scalars(select(Job).where(Job.id.in_(ids[:limit])))}
    return [rows[job_id] for job_id in ids[:limit]], len(ids) > limit


def _sorted_page(
    session: Session, conditions: Sequence[ColumnElement[bool]], sort: str, after: str | None, limit: int
) -> Select[Any]:
    """Select ids in another order; equal ones by id. No index has it: all that match are sorted."""
    key, is_descending = SORTS[sort.removeprefix("-")], sort.startswith("-")
    found = [*conditions]
    if after is not None:
        place = session.execute(select(key, Job.id).where(Job.id == after)).one_or_none()
        if place is None:
            raise InvalidInput(f"after: job {after!r} is gone, and its place with it; begin again without `after`")
        beyond = key < place[0] if is_descending else key > place[0]
        found.append(or_(beyond, and_(key == place[0], Job.id < after if is_descending else Job.id > after)))
    order = (key.desc(), Job.id.desc()) if is_descending else (key, Job.id)
    return select(Job.id).where(*found).order_by(*order).limit(limit)


def _page(
    states: Sequence[str],
    kinds: Sequence[str],
    queue: str | None,
    others: Sequence[ColumnElement[bool]],
    limit: int,
    *,
    in_ranges: bool,
) -> Select[Any]:
    def newest(*conditions: ColumnElement[bool]) -> Select[str]:
        return select(Job.id).where(*conditions, *others).order_by(Job.id.desc()).limit(limit)

    in_queue = () if queue is None else (Job.queue == queue,)
    if not in_ranges:
        columns = ((Job.state, states), (Job.kind, kinds), (Job.queue, (queue,) if queue is not None else ()))
        # Not the bare columns: SQLite would choose an index of states, and read each row for its name.
        return newest(*(func.coalesce(column, "").in_(values) for column, values in columns if values))
    if not states and not kinds and queue is None:
        return newest()
    ranges = [
        select(newest(Job.state == state, Job.kind == kind, *in_queue).subquery().c.id)
        for state in sorted(set(states or JobState))
        for kind in sorted(set(kinds or KINDS))
    ]
    merged = union_all(*ranges).subquery()
    return select(merged.c.id).order_by(merged.c.id.desc()).limit(limit)


def has_label(key: str, value: str, is_sqlite: bool) -> ColumnElement[bool]:
    """Return the condition that a job has a label."""
    if not is_sqlite:
        found: ColumnElement[bool] = type_coerce(Job.labels, JSONB()).contains({key: value})
        return found
    exact: ColumnElement[bool] = Job.labels[key].as_string() == value
    if not value.isascii() or '"' in value or "\\" in value or not value.isprintable():
        return exact  # JSON may write it in several ways
    quoted = type_coerce(f'"{value}"', String)
    seen: ColumnElement[bool] = func.instr(type_coerce(Job.labels, String), quoted) > 0
    return and_(seen, exact)  # a fifth of the time of parsing JSON


def has_text(text: str, is_sqlite: bool) -> ColumnElement[bool]:
    """Return the condition that name or id has a part, whatever the case of ASCII letters."""
    if is_sqlite:  # its LIKE ignores the case of ASCII letters by itself
        in_name = Job.name.contains(text, autoescape=True)
    elif text.isascii():  # by bytes: half of the time
        in_name = func.lower(collate(func.coalesce(Job.name, ""), "C")).contains(text.lower(), autoescape=True)
    else:
        in_name = Job.name.icontains(text, autoescape=True)
    if not _PART_OF_ID.fullmatch(text):
        return in_name
    return or_(in_name, Job.id.contains(text.lower(), autoescape=True))
