"""The filter language against a slow reference, on both dialects: the same jobs for any filter."""

import json
import operator
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import update

from apt_jobs.db.engine import Database
from apt_jobs.db.job_filters import ids_that_match
from apt_jobs.db.models import Job
from tests.integration.db.steps import job_of, submit

OPERATORS = {
    "=": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
STATES = ("queued", "paused", "succeeded", "failed")
NAMES = (None, "Nightly run", "a b", 'x"y', "50%_off")
LABELS: tuple[dict[str, str], ...] = ({}, {"team": "a"}, {"team": "b", "x.y": "1"}, {"team": "a b"})
RATES = (0.5, 0.01, 1e-4)
OPTIMIZERS = ("adamw", "lion")
PROGRESS = (None, {"train_loss": 2.5, "step": 3}, {"train_loss": "NaN"}, {"metrics": {"eval/acc": {"last": 0.5}}})
PATHS = (
    "training.learning_rate",
    "lr",
    "train_loss",
    "eval/acc",
    "priority",
    "step",
    "model.d_model",
    "training.optimizer",
    "a.b",
)

numbers = st.sampled_from([0, 1, 3, 0.5, 0.01, 2.5, 64, -1])
words = st.sampled_from(
    [("state", states) for states in (["queued"], ["queued", "failed"], ["dead"])]
    + [("queue", ["train"]), ("queue", ["x"])]
)
labels = st.sampled_from(["team", "team=a", 'team="a b"', "x.y=1", "x.y", "nope", "team="])
texts = st.sampled_from(["night", "NIGHT", "a b", "%", "_", "job_", "50%"])
terms = st.tuples(
    st.booleans(),
    st.one_of(
        st.tuples(st.just("words"), words),
        st.tuples(st.just("label"), labels),
        st.tuples(st.just("text"), texts),
        st.tuples(st.just("number"), st.tuples(st.sampled_from(PATHS), st.sampled_from(sorted(OPERATORS)), numbers)),
        st.tuples(
            st.just("equal"),
            st.tuples(
                st.sampled_from(["training.optimizer", "training.deterministic"]),
                st.booleans(),
                st.sampled_from(["adamw", "lion", "true"]),
            ),
        ),
    ),
)


def written(term: tuple[bool, tuple[str, Any]]) -> str:
    minus, (kind, what) = term
    match kind:
        case "words":
            text = f"{what[0]}:{','.join(what[1])}"
        case "label":
            name, _, value = what.partition("=")
            text = f'label:"{name}={value.strip(chr(34))}"' if '"' in what else f"label:{what}"
        case "text":
            text = f'"{what}"'
        case "number":
            text = f"{what[0]}{what[1]}{what[2]}"
        case _:
            text = f"{what[0]}{'=' if what[1] else '!='}{what[2]}"
    return ("-" if minus else "") + text


def holds(term: tuple[bool, tuple[str, Any]], job: Mapping[str, Any]) -> bool:
    minus, (kind, what) = term
    match kind:
        case "words":
            found = job[what[0]] in what[1]
        case "label":
            name, equals, value = what.replace('"', "").partition("=")
            found = name in job["labels"] and (not equals or job["labels"][name] == value)
        case "text":
            found = what.lower() in (job["name"] or "").lower() or (what.isidentifier() and what.lower() in job["id"])
        case "number":
            value = number_of(what[0], job)
            found = value is not None and OPERATORS[what[1]](value, what[2])
        case _:
            value = at(job["spec"], what[0].split("."))
            text = json.dumps(value).strip('"') if isinstance(value, str | bool) else None
            found = (text == what[2]) == what[1]
    return bool(found) != minus


def number_of(path: str, job: Mapping[str, Any]) -> float | None:
    path = "training.learning_rate" if path == "lr" else path
    progress = job["progress"] or {}
    if path in ("priority", "step"):
        value = job[path]
    elif "." in path:
        value = at(job["spec"], path.split("."))
    else:
        value = progress.get("metrics", {}).get(path, {}).get("last", progress.get(path))
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def at(document: Any, path: list[str]) -> Any:
    for part in path:
        document = document.get(part) if isinstance(document, dict) else None
    return document


def jobs_in(database: Database) -> list[dict[str, Any]]:
    """Twelve jobs that differ in all that a filter looks at."""
    found = []
    for number in range(12):
        training = {"learning_rate": RATES[number % 3], "optimizer": OPTIMIZERS[number % 2]}
        fields: dict[str, Any] = {"name": NAMES[number % 5], "labels": LABELS[number % 4], "priority": number % 3}
        job_id = submit(database, training=training, **fields)
        values = {"state": STATES[number % 4], "progress": PROGRESS[number % 4], "step": [None, 3][number % 2]}
        with database.write() as session:
            session.execute(update(Job).where(Job.id == job_id).values(**values))
        row = job_of(database, job_id)
        columns = ("id", "name", "state", "queue", "labels", "priority", "step", "spec", "progress")
        found.append({column: getattr(row, column) for column in columns})
    return found


def test_a_filter_finds_what_the_reference_finds(database: Database) -> None:
    jobs = jobs_in(database)

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(terms, max_size=4))
    def check(chosen: list[tuple[bool, tuple[str, Any]]]) -> None:
        text = " ".join(map(written, chosen))
        expected = sorted((job["id"] for job in jobs if all(holds(term, job) for term in chosen)), reverse=True)
        with database.read() as session:
            assert ids_that_match(session, text, 100) == expected, text

    check()


@pytest.mark.parametrize(
    "text", ["training.optimizer>1", "name.x.y=1", 'label:"a$[0]"', "a.b.c.d=x", "step=1e300", "id:job_x' OR 1=1--"]
)
def test_a_filter_of_odd_places_finds_nothing(database: Database, text: str) -> None:
    submit(database)
    with database.read() as session:
        assert ids_that_match(session, text, 10) == []
