"""The list of jobs by any filter: which ids are on a page, found in an index that has them in the list's order.

Every combination of state, kind and queue is at most 16 ranges of one index, and the newest ids of each are merged; the
order `active` does so group by group, and passes over groups that lie before the page by counting them. A label is
found in an index of labels (Postgres) or by one pass over the index `ix_jobs_search` (SQLite), as is a text.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from sqlalchemy import ColumnElement, Select, String, and_, collate, exists, func, or_, select, type_coerce, union_all
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from apt_jobs.db.job_counts import job_counts
from apt_jobs.db.job_orders import sorted_ids
from apt_jobs.db.models import Job
from apt_jobs.db.sweep_models import SweepTrial
from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.job_sort import ACTIVE_GROUPS, ActiveSort, parse_sort
from apt_jobs.jobs.spec import GenerateSpec, TrainSpec
from apt_jobs.jobs.states import JobState

_PART_OF_ID = re.compile(r"[A-Za-z0-9_]{1,24}")
KINDS: tuple[str, ...] = tuple(
    kind for spec in (TrainSpec, GenerateSpec) for kind in get_args(spec.model_fields["kind"].annotation)
)
DEFAULT_SORT = "-created_at"
_RANGES = (Job.state, Job.kind, Job.queue)
MAX_IN_RANGES = 2_000  # ids of each range that are merged; what lies deeper is walked to in one index


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a list is of, and where in it."""

    states: Sequence[str]
    kinds: Sequence[str]
    queue: str | None
    others: list[ColumnElement[bool]]
    limit: int
    is_sweepless: bool = False

    def conditions(self, *, walks: bool = False) -> list[ColumnElement[bool]]:
        """Return what a row has to be. `walks`: an index is walked through, and the rows themselves are not read."""
        queues = () if self.queue is None else (self.queue,)
        given = zip(_RANGES, (self.states, self.kinds, queues), strict=True)
        # Not the bare columns: SQLite would choose an index of states, and read each row for its name.
        ranges = [(func.coalesce(column, "") if walks else column, values) for column, values in given if values]
        return [*self.others, *self.narrowed(), *(column.in_(values) for column, values in ranges)]

    def narrowed(self) -> list[ColumnElement[bool]]:
        """Return what an index says of each id, so that ranges of another one stay as cheap."""
        return [is_sweepless()] if self.is_sweepless else []


def list_jobs(
    session: Session,
    *,
    states: Sequence[str] = (),
    kinds: Sequence[str] = (),
    queue: str | None = None,
    sweepless: bool = False,
    label: tuple[str, str] | None = None,
    text: str | None = None,
    terms: Sequence[ColumnElement[bool]] = (),
    sort: str = DEFAULT_SORT,
    after: str | None = None,
    offset: int = 0,
    limit: int = 50,
) -> tuple[list[Job], bool]:
    """Return a page of jobs, and whether there are more.

    Args:
        session: An open session.
        states: Only in one of these states; none: in any.
        kinds: Only of one of these kinds.
        queue: Only of this queue.
        sweepless: Only of no sweep.
        label: Only with this label.
        text: Only with this in name or id.
        terms: Conditions of a filter (`db/job_filters.py`).
        sort: An order of `jobs/job_sort.py`.
        after: Last id seen.
        offset: Jobs to pass over, after `after`.
        limit: Most jobs of the page.

    Raises:
        InvalidInput: there is no such order; the job `after` is gone, whose place in another order than that of ids
            nobody knows.
    """
    others = [*terms, *search_conditions(session, label, text)]
    wanted = _Wanted(states, kinds, queue, others, limit + 1, sweepless)
    ids = _ids(session, wanted, sort, after, offset)
    rows = {job.id: job for job in session.scalars(select(Job).where(Job.id.in_(ids[:limit])))}
    return [rows[job_id] for job_id in ids[:limit]], len(ids) > limit


def _ids(session: Session, wanted: _Wanted, sort: str, after: str | None, offset: int) -> list[str]:
    """Return the ids of a page in its order."""
    order, is_search = parse_sort(sort), bool(wanted.others)
    if sort == DEFAULT_SORT:
        if after is not None:
            wanted.others.append(Job.id < after)
        return list(session.scalars(_page(wanted, offset, in_ranges=not is_search)))
    if isinstance(order, ActiveSort) and not is_search:
        return _active_ids(session, wanted, after, offset)
    found = wanted.conditions(walks=is_search)
    return list(session.scalars(sorted_ids(session, order, found, after, offset, wanted.limit)))


def count_by_state(
    session: Session,
    *,
    kinds: Sequence[str] = (),
    queue: str | None = None,
    sweepless: bool = False,
    others: Sequence[ColumnElement[bool]] = (),
) -> dict[str, int]:
    """Count jobs by state, of those that `list_jobs` finds in any state.

    Of all jobs, or those of a queue, the counts are kept; else it is one pass over an index without the rows.
    """
    if not (kinds or sweepless or others):
        return _kept_counts(session, queue)
    wanted = _Wanted((), kinds, queue, [*others], 0, sweepless).conditions(walks=bool(others))
    state = func.coalesce(Job.state, "") if others else Job.state
    counted = session.execute(select(state, func.count()).where(*wanted).group_by(state))
    return {str(name): count for name, count in counted}


def _kept_counts(session: Session, queue: str | None) -> dict[str, int]:
    total: Counter[str] = Counter()
    for name, counts in job_counts(session).items():
        if queue in (None, name):
            total.update(counts)
    return dict(total)


def search_conditions(session: Session, label: tuple[str, str] | None, text: str | None) -> list[ColumnElement[bool]]:
    """Return the conditions that a job has a label, and a text in its name or id."""
    is_sqlite = session.get_bind().dialect.name == "sqlite"
    found = [] if label is None else [has_label(*label, is_sqlite)]
    return [*found, has_text(text, is_sqlite)] if text else found


def _active_ids(session: Session, wanted: _Wanted, after: str | None, offset: int) -> list[str]:
    """Return the ids of a page, of what runs first: group by group, each a few ranges of an index."""
    begin = None if after is None else session.scalar(select(Job.state).where(Job.id == after))
    if after is not None and begin is None:
        raise InvalidInput(f"after: job {after!r} is gone, and its place with it; begin again without `after`")
    ids: list[str] = []
    for group in ACTIVE_GROUPS:
        states = [state for state in group if not wanted.states or state in wanted.states]
        seen: list[ColumnElement[bool]] = [Job.id < after] if begin in group and after is not None else []
        is_before = begin is not None and begin not in group
        begin = begin if is_before else None
        if is_before or not states:
            continue
        part = _Wanted(states, wanted.kinds, wanted.queue, seen, wanted.limit - len(ids), wanted.is_sweepless)
        if offset and (count := _count(session, part)) <= offset:
            offset -= count
            continue
        ids += session.scalars(_page(part, offset, in_ranges=True))
        offset = 0
        if len(ids) == wanted.limit:
            break
    return ids


def _count(session: Session, part: _Wanted) -> int:
    return session.scalar(select(func.count()).select_from(Job).where(*part.conditions())) or 0


def _page(wanted: _Wanted, offset: int, *, in_ranges: bool) -> Select[Any]:
    """Select the newest ids after the first `offset`."""
    reach = offset + wanted.limit

    def newest(*conditions: ColumnElement[bool]) -> Select[str]:
        return select(Job.id).where(*conditions, *wanted.others, *wanted.narrowed()).order_by(Job.id.desc())

    if not in_ranges or reach > MAX_IN_RANGES:
        walked = select(Job.id).where(*wanted.conditions(walks=True)).order_by(Job.id.desc())
        return walked.offset(offset or None).limit(wanted.limit)
    if not wanted.states and not wanted.kinds and wanted.queue is None:
        return newest().offset(offset or None).limit(wanted.limit)
    in_queue = () if wanted.queue is None else (Job.queue == wanted.queue,)
    ranges = [
        select(newest(Job.state == state, Job.kind == kind, *in_queue).limit(reach).subquery().c.id)
        for state in sorted(set(wanted.states or JobState))
        for kind in sorted(set(wanted.kinds or KINDS))
    ]
    merged = union_all(*ranges).subquery()
    return select(merged.c.id).order_by(merged.c.id.desc()).offset(offset or None).limit(wanted.limit)


def is_sweepless() -> ColumnElement[bool]:
    """Return the condition that no sweep has a job: by the index of trials, as the column lies behind large ones."""
    return ~exists().where(SweepTrial.job_id == Job.id)


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
