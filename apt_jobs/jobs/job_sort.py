"""The orders of lists of jobs: `-created_at`, `-metrics.loss.last`, `active`. Their SQL is in `db/job_orders.py`."""

import re
from dataclasses import dataclass

from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.states import JobState

COLUMNS = ("created_at", "priority", "step", "name", "queue")
ACTIVE = "active"
ACTIVE_GROUPS: tuple[tuple[JobState, ...], ...] = (  # in this order, the newest of each first
    (JobState.RUNNING, JobState.PAUSING),
    (JobState.QUEUED,),
    (JobState.PAUSED,),
    (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.DEAD),
)
MAX_CHARS = 220
_METRIC = re.compile(r'metrics\.(?P<name>[^"\\\x00-\x1f]+)\.(?P<value>last|best)')


@dataclass(frozen=True, slots=True)
class ColumnSort:
    """By a column of the row."""

    column: str
    is_descending: bool


@dataclass(frozen=True, slots=True)
class MetricSort:
    """By the last or the best value of a metric. Jobs without one come last in both directions."""

    name: str
    is_best: bool
    is_descending: bool


@dataclass(frozen=True, slots=True)
class ActiveSort:
    """What runs first, then what waits, is paused, has ended."""


Sort = ColumnSort | MetricSort | ActiveSort


def parse_sort(text: str) -> Sort:
    """Return the order that a user wrote.

    Raises:
        InvalidInput: there is none of this name.
    """
    if text == ACTIVE:
        return ActiveSort()
    is_descending, key = text.startswith("-"), text.removeprefix("-")
    if key in COLUMNS:
        return ColumnSort(key, is_descending)
    if len(text) <= MAX_CHARS and (found := _METRIC.fullmatch(key)) is not None:
        return MetricSort(found["name"], found["value"] == "best", is_descending)
    raise InvalidInput(
        f"expected {ACTIVE}, or one of {', '.join(COLUMNS)}, metrics.NAME.last, metrics.NAME.best, with a minus for "
        f"the largest first; got {text[:60]!r}"
    )
