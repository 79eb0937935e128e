"""What the terms of a filter mean for rows of `jobs`, as conditions of SQL on both dialects."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Float, String, case, cast, false, func, not_, select, type_coerce
from sqlalchemy.orm import Session

from apt_jobs.db.listing import has_label, has_text
from apt_jobs.db.models import Job
from apt_jobs.jobs.job_filter import (
    COLUMNS,
    EqualTerm,
    LabelTerm,
    NumberTerm,
    Term,
    TextTerm,
    WordTerm,
    parse_filter,
)

_COLUMN_OF = {
    "state": Job.state,
    "kind": Job.kind,
    "queue": Job.queue,
    "sweep": Job.sweep_id,
    "schedule": Job.schedule_id,
    "id": Job.id,
}


def conditions(terms: Sequence[Term], *, is_sqlite: bool) -> list[ColumnElement[bool]]:
    """Return one condition a term. A term that is turned round holds where it has no value to compare."""
    found = []
    for term in terms:
        condition = func.coalesce(_condition(term, is_sqlite), false())
        found.append(not_(condition) if term.is_negated else condition)
    return found


def _condition(term: Term, is_sqlite: bool) -> ColumnElement[bool]:
    match term:
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
        return _json_number(Job.spec, path.split("."), is_sqlite)
    logged = _json_number(Job.progress, ["metrics", path, "last"], is_sqlite)
    return func.coalesce(logged, _json_number(Job.progress, [path], is_sqlite))


def _json_number(column: Any, path: Sequence[str], is_sqlite: bool) -> ColumnElement[Any]:
    """Return a number of a document; NULL: there is something else, or nothing."""
    if is_sqlite:
        place = _sqlite_path(path)
        is_number = func.json_type(type_coerce(column, String), place).in_(["integer", "real"])
        return case((is_number, cast(func.json_extract(type_coerce(column, String), place), Float)))
    inner = func.json_extract_path(column, *path)
    return case((func.json_typeof(inner) == "number", cast(func.json_extract_path_text(column, *path), Float)))


def _text_at(path: Sequence[str], is_sqlite: bool) -> ColumnElement[Any]:
    """Return what the spec has at a path as text, as `true` or `adamw`; NULL: nothing, or an object."""
    if is_sqlite:
        place = _sqlite_path(path)
        kind = func.json_type(type_coerce(Job.spec, String), place)
        text = func.json_extract(type_coerce(Job.spec, String), place)
        return case((kind == "true", "true"), (kind == "false", "false"), (kind == "text", text))
    kind = func.json_typeof(func.json_extract_path(Job.spec, *path))
    return case((kind.in_(["boolean", "string"]), func.json_extract_path_text(Job.spec, *path)))


def _sqlite_path(path: Sequence[str]) -> str:
    return "$" + "".join(f'."{part}"' for part in path)  # no part has a quote: see the grammar


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
