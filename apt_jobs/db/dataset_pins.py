"""Which content of a data set a job trains on, and which jobs still need a data set."""

import json
from typing import Any

from sqlalchemy import Text, cast, select, update
from sqlalchemy.orm import Session

from apt_jobs.db.models import Job
from apt_jobs.jobs.spec import TrainSpec, parse_spec
from apt_jobs.jobs.states import TERMINAL_STATES, JobState

_ROWS = 100  # read at a time
_UNFINISHED = tuple(state.value for state in JobState if state not in TERMINAL_STATES)


def pin_dataset(session: Session, job_id: str, sha256: str) -> str:
    """Note the content that the first attempt of a job found; returns what is noted, of this attempt or an earlier."""
    session.execute(
        update(Job).where(Job.id == job_id, Job.dataset_sha256.is_(None)).values(dataset_sha256=sha256),
        execution_options={"synchronize_session": False},
    )
    pinned = session.scalar(select(Job.dataset_sha256).where(Job.id == job_id))
    return pinned or sha256


def unfinished_job_with(session: Session, dataset: str) -> str | None:
    """Return the oldest job that waits, runs or is paused and names this data set."""
    rows = session.execute(
        select(Job.id, Job.spec)
        .where(Job.state.in_(_UNFINISHED), Job.kind == "train")
        .where(cast(Job.spec, Text).contains(json.dumps(dataset), autoescape=True))  # anywhere in it: few are left
        .order_by(Job.created_at, Job.id)
        .execution_options(yield_per=_ROWS)
    )
    return next((row.id for row in rows if dataset in _datasets_of(row.spec)), None)


def _datasets_of(spec: dict[str, Any]) -> set[str]:
    found = parse_spec(spec)
    return set(found.dataset_fields.values()) if isinstance(found, TrainSpec) else set()
