"""What webhooks can be sent, and which of it the terms of a job filter let through where there is no job.

What becomes of a job is compared with a filter by the database (`db/job_filters.py`), as lists of jobs are. A lost
worker, a long queue and a missed schedule have only some of a job's fields; terms about others do not hold them back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from apt_jobs.jobs.job_filter import LabelTerm, Term, WordTerm
from apt_jobs.jobs.states import TERMINAL_STATES, JobState

WebhookEvent = Literal[
    "job.succeeded",
    "job.failed",
    "job.cancelled",
    "job.dead",
    "incident.opened",
    "worker.lost",
    "queue.too_long",
    "schedule.missed",
]
WEBHOOK_EVENTS: tuple[WebhookEvent, ...] = get_args(WebhookEvent)
TEST_EVENT = "webhook.test"  # of the test button; nobody subscribes to it
JOB_ENDED: Mapping[JobState, str] = {state: f"job.{state.value}" for state in TERMINAL_STATES}


@dataclass(frozen=True, slots=True)
class Subject:
    """What an event without a job has of the fields that a filter knows; None: nothing to compare with."""

    queues: tuple[str, ...] | None = None
    kind: str | None = None
    schedule: str | None = None
    labels: Mapping[str, str] | None = field(default=None)


def passes(terms: Sequence[Term], subject: Subject) -> bool:
    """Return whether every term that is about something that the subject has holds."""
    return all(_holds(term, subject) is not term.is_negated for term in terms if _is_about(term, subject))


def _values(term: WordTerm, subject: Subject) -> tuple[str, ...] | None:
    one = {"kind": subject.kind, "schedule": subject.schedule}.get(term.field)
    if one is not None:
        return (one,)
    return subject.queues if term.field == "queue" else None


def _is_about(term: Term, subject: Subject) -> bool:
    if isinstance(term, LabelTerm):
        return subject.labels is not None
    return isinstance(term, WordTerm) and _values(term, subject) is not None


def _holds(term: Term, subject: Subject) -> bool:
    if isinstance(term, LabelTerm):
        value = (subject.labels or {}).get(term.name)
        return value is not None and term.value in (None, value)
    assert isinstance(term, WordTerm)  # `_is_about` asks for it
    return bool(set(term.words) & set(_values(term, subject) or ()))
