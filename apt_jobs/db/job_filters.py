"""What the terms of a filter mean for rows of `jobs`, as conditions of SQL on both dialects."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Float, String, case, cast, false, func, not_, or_, select, type_coerce
from sqlalchemy.orm import Session

from apt_jobs.db.json_numbers import json_number, last_metric, sqlite_path
from apt_jobs.db.listing import KINDS, has_label, has_text, is_sweepless
from apt_jobs.db.models import Job
from apt_jobs.jobs.job_filter import (
    COLUMNS,
    NO_SWEEP,
    EqualTerm,
    LabelTerm,
    NumberTerm,
    Term,
    TextTerm,
    WordTerm,
    parse_filter,
)
from apt_jobs.jobs.states import JobState

_COLUMN_OF = {
    "state": Job.state,
    "kind": Job.kind,
    "queue": Job.queue,
    "sweep": Job.sweep_id,
    "schedule": Job.schedule_id,
    "id": Job.id,
}


_INDEXED = ("sweep", "schedule", "id")  # words that an index of their own finds
_UNIVERSES: dict[str, tuple[str, ...]] = {"state": tuple(JobState), "kind": KINDS}


@dataclass(frozen=True, slots=True)
class Ranges:
    """States, kinds and a queue, which the indexes of the list find; none: all.

    `is_sweepless`: only jobs of no sweep. `is_empty`: no job can match.
    """

    states: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    queue: str | None = None
    is_empty: bool = False
    is_sweepless: bool = False


def conditions(terms: Sequence[Term], *, is_sqlite: bool) -> list[ColumnElement[bool]]:
    """Return one condition a term. A term that is turned round holds where it has no value to compare."""
    found = []
    for term in terms:
        condition = _condition(term, is_sqlite)
        if term.is_negated:
            found.append(not_(func.coalesce(condition, false())))
        elif isinstance(term, WordTerm) and term.field in _INDEXED:
            found.append(condition)
        else:
            found.append(func.coalesce(condition, false()))
    return found


def in_ranges(terms: Sequence[Term], states: Sequence[str], kinds: Sequence[str], queue: str | None) -> Ranges:
    """Return what terms of states, kinds and queues leave of what was asked for beside the filter."""
    left = {"state": set(states or JobState), "kind": set(kinds or KINDS)}
    queues = None if queue is None else {queue}
    is_sweepless = False
    for term in terms:
        if not is_range(term) or not isinstance(term, WordTerm):
            continue
        if term.field == "sweep":
            is_sweepless = True
        elif term.field == "queue":
            queues = set(term.words) if queues is None else queues & set(term.words)
        elif term.is_negated:
            left[term.field] -= set(term.words)
        else:
            left[term.field] &= set(term.words)
    chosen = {
        field: () if len(left[field]) == len(universe) else tuple(value for value in universe if value in left[field])
        for field, universe in _UNIVERSES.items()
    }
    is_empty = not all(left.values()) or queues == set()
    return Ranges(chosen["state"], chosen["kind"], next(iter(queues), None) if queues else None, is_empty, is_sweepless)


def is_range(term: Term) -> bool:
    """Return whether `in_ranges` reads the term; any other one is a condition."""
    if not isinstance(term, WordTerm):
        return False
    return (
        term.field in _UNIVERSES
        or _is_sweepless(term)
        or (term.field == "queue" and not term.is_negated and len(term.words) == 1)
    )


def _is_sweepless(term: WordTerm) -> bool:
    return term.field == "sweep" and term.words == (NO_SWEEP,) and not term.is_negated


def _condition(term: Term, is_sqlite: bool) -> ColumnElement[bool]:
    match term:
        case WordTerm(field="sweep") if NO_SWEEP in term.words:
            others = [word for word in term.words if word != NO_SWEEP]
            return or_(is_sweepless(), Job.sweep_id.in_(others)) if others else is_sweepless()
        case WordTerm():
            is_one: ColumnElement[bool] = _COLUMN_OF[term.field].in_(term.words)
            return is_one
        case TextTerm():
            return has_text(term.text, is_sqlite)
        case LabelTerm(value=None):
            is_there: ColumnElement[bool] = Job.labels[term.name].as_string().is_not(None)
            return is_there
        case LabelTerm():
            return has_label(term.name, term.value or "", is_sqlite)
        case NumberTerm():
            return _compared(_number(term.path, is_sqlite), term)
        case EqualTerm():
            is_same: ColumnElement[bool] = _text_at(term.path.split("."), is_sqlite) == term.value
            return is_same


def _compared(number: ColumnElement[Any], term: NumberTerm) -> ColumnElement[bool]:
    compared: dict[str, ColumnElement[bool]] = {
        "=": number == term.value,
        "!=": number != term.value,
        ">": number > term.value,
        ">=": number >= term.value,
        "<": number < term.value,
        "<=": number <= term.value,
    }
    return compared[term.operator]


def _number(path: str, is_sqlite: bool) -> ColumnElement[Any]:
    """Return the number at a path: of the row, of the spec if the path has a dot, else of the metrics."""
    if path in COLUMNS:
        return cast(getattr(Job, path), Float)
    if "." in path:
        return json_number(Job.spec, path.split("."), is_sqlite)
    return last_metric(path, is_sqlite)


def _text_at(path: Sequence[str], is_sqlite: bool) -> ColumnElement[Any]:
    """Return what the spec has at a path as text, as `true` or `adamw`; NULL: nothing, or an object."""
    if is_sqlite:
        place = sqlite_path(path)
        kind = func.json_type(type_coerce(Job.spec, String), place)
        text = func.json_extract(type_coerce(Job.spec, String), place)
        return case((kind == "true", "true"), (kind == "false", "false"), (kind == "text", text))
    kind = func.json_typeof(func.json_extract_path(Job.spec, *path))
    return case((kind.in_(["boolean", "string"]), func.json_extract_path_text(Job.spec, *path)))


def conditions_of(session: Session, text: str | None) -> list[ColumnElement[bool]]:
    """Return the conditions of a filter as a user wrote it.

    Raises:
        InvalidInput: it cannot be read.
    """
    return conditions(parse_filter(text or ""), is_sqlite=session.get_bind().dialect.name == "sqlite")


def ids_that_match(session: Session, text: str, limit: int) -> list[str]:
    """Return the ids of the jobs that a filter matches, newest first; at most `limit`.

    Raises:
        InvalidInput: it cannot be read.
    """
    return list(
        session.scalars(select(Job.id).where(*conditions_of(session, text)).order_by(Job.id.desc()).limit(limit))
    )


def trainings_that_match(session: Session, text: str, limit: int) -> list[str]:
    """Return the ids of the training jobs that a filter matches, newest first; at most `limit`.

    Raises:
        InvalidInput: it cannot be read.
    """
    query = select(Job.id).where(Job.kind == "train", *conditions_of(session, text))
    return list(session.scalars(query.order_by(Job.id.desc()).limit(limit)))


def num_trainings_that_match(session: Session, text: str) -> int:
    """Return how many training jobs a filter matches.

    Raises:
        InvalidInput: it cannot be read.
    """
    query = select(func.count()).select_from(Job).where(Job.kind == "train", *conditions_of(session, text))
    return session.scalar(query) or 0
