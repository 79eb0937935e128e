"""Edit what a job is called and where it waits: nothing of what it does."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import orjson
from sqlalchemy import update
from sqlalchemy.orm import Session

from apt_jobs.db.jobs import get_job
from apt_jobs.db.models import Job
from apt_jobs.db.transitions import locked_job
from apt_jobs.errors import Conflict, InvalidInput
from apt_jobs.jobs.states import JobState

EDITABLE = ("name", "labels", "notes", "priority", "queue")
WHILE_WAITING = ("priority", "queue")
MAX_LABELS = 32


def version_of(job: Job) -> str:
    """Return a text that is another one whenever something editable of the job was edited."""
    values = [getattr(job, field) for field in EDITABLE]
    return hashlib.sha256(orjson.dumps(values, option=orjson.OPT_SORT_KEYS)).hexdigest()[:20]


def edit_job(session: Session, job_id: str, changes: Mapping[str, Any], check: Callable[[Job], None]) -> Job:
    """Set some of `EDITABLE`; labels are merged, and those set to None removed.

    Args:
        session: of the transaction.
        job_id: Its id.
        changes: Values by field.
        check: Is called with the locked row before anything changes, and raises what keeps it from that.

    Raises:
        NotFound: there is no such job.
        Conflict: the job does not wait, and something is set that only a waiting job has use for.
        InvalidInput: it would have too many labels.
    """
    job = locked_job(session, job_id)
    check(job)
    late = [field for field in WHILE_WAITING if field in changes and changes[field] != getattr(job, field)]
    if late and job.state not in (JobState.QUEUED, JobState.PAUSED):
        raise Conflict(f"job {job_id} is {job.state}: {' and '.join(late)} can be set while a job waits only")
    values = dict(changes)
    if "labels" in values:
        merged = {**job.labels, **values["labels"]}
        values["labels"] = {name: value for name, value in merged.items() if value is not None}
        if len(values["labels"]) > MAX_LABELS:
            raise InvalidInput(f"labels: the job would have {len(values['labels'])}; at most {MAX_LABELS}")
    if "queue" in values:
        values |= {"reserved_by": None, "reserved_until": None}
    spec = {**job.spec, **{field: value for field, value in values.items() if field in job.spec}}
    session.execute(
        update(Job).where(Job.id == job_id).values(**values, spec=spec).execution_options(synchronize_session=False)
    )
    return get_job(session, job_id)
