"""Numbers inside JSON columns, as SQL on both dialects: what has no number at the place is NULL."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Float, String, case, cast, func, type_coerce

from apt_jobs.db.models import Job

FIELD_OF_METRIC = {"loss": "train_loss"}  # of the built-in trainer; a script may log its own `loss`


def json_number(column: Any, path: Sequence[str], is_sqlite: bool) -> ColumnElement[Any]:
    """Return a number of a document; NULL: there is something else, or nothing."""
    if is_sqlite:
        place = sqlite_path(path)
        is_number = func.json_type(type_coerce(column, String), place).in_(["integer", "real"])
        return case((is_number, cast(func.json_extract(type_coerce(column, String), place), Float)))
    inner = func.json_extract_path(column, *path)
    return case((func.json_typeof(inner) == "number", cast(func.json_extract_path_text(column, *path), Float)))


def last_metric(name: str, is_sqlite: bool) -> ColumnElement[Any]:
    """Return the last value of a metric that a script logged, or that the built-in trainer reports."""
    return _first_of([["metrics", name, "last"], [FIELD_OF_METRIC.get(name, name)]], is_sqlite)


def best_metric(name: str, is_sqlite: bool) -> ColumnElement[Any]:
    """Return the best value of a metric so far, as far as it is kept."""
    return _first_of([["metrics", name, "best"], [f"best_{name}"]], is_sqlite)


def sqlite_path(path: Sequence[str]) -> str:
    """Return a path of SQLite's JSON functions. No part has a quote: see the grammars of filters and orders."""
    return "$" + "".join(f'."{part}"' for part in path)


def _first_of(paths: Sequence[Sequence[str]], is_sqlite: bool) -> ColumnElement[Any]:
    return func.coalesce(*(json_number(Job.progress, path, is_sqlite) for path in paths))
