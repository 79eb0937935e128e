"""`POST /api/jobs/cancel|pause|resume|retry|delete`: many jobs at once, by their ids or by a filter.

Each job is steered in a transaction of its own, as by its own address: what is refused of one says why, and keeps no
other one back.
"""

import asyncio
from collections.abc import Callable
from typing import Annotated, Self

from pydantic import BaseModel, Field, StringConstraints, model_validator
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.db.access import Role
from apt_jobs.db.job_filters import ids_that_match
from apt_jobs.errors import AptJobsError
from apt_jobs.events.kinds import StoredEvent
from apt_jobs.jobs.job_filter import parse_filter
from apt_jobs.jobs.strict_model import Strict
from apt_jobs.operations import steer
from apt_jobs.operations.delete_job import delete_job
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.api.job_queries import FilterText
from apt_jobs.web.problems import ProblemError
from apt_jobs.web.service import Service, service_of

MAX_JOBS = 1_000  # of one request
JobId = Annotated[str, StringConstraints(max_length=40)]
Change = Callable[[Service, str], list[StoredEvent] | None]  # None: nothing changed


class JobsBody(Strict):
    """Which jobs."""

    ids: list[JobId] | None = Field(None, min_length=1, max_length=MAX_JOBS, description="Ids of jobs.")
    filter: FilterText | None = Field(None, min_length=1, description="As of `GET /api/jobs`; what it matches now.")

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        if (self.ids is None) == (self.filter is None):
            raise ValueError("send either ids or a filter")
        if self.filter is not None and not parse_filter(self.filter):
            raise ValueError("the filter is empty, and would match every job; name them by state, label or id")
        return self


class Refusal(BaseModel):
    """A job that stays as it is."""

    id: str
    why: str


class JobsChanged(BaseModel):
    """What became of many jobs."""

    matched: int
    changed: int = Field(description="Those that were not in the wanted state already.")
    refused: list[Refusal]


@endpoint(role=Role.SUBMITTER, tag="jobs", body=JobsBody, answers={200: JobsChanged})
async def cancel_jobs(request: Request) -> Response:
    """Cancel many jobs. Repeating it changes nothing."""
    return await _changed(request, _steered(steer.cancel_job))


@endpoint(role=Role.SUBMITTER, tag="jobs", body=JobsBody, answers={200: JobsChanged})
async def pause_jobs(request: Request) -> Response:
    """Pause many jobs. Repeating it changes nothing."""
    return await _changed(request, _steered(steer.pause_job))


@endpoint(role=Role.SUBMITTER, tag="jobs", body=JobsBody, answers={200: JobsChanged})
async def resume_jobs(request: Request) -> Response:
    """Let many paused jobs go on."""
    return await _changed(request, _steered(steer.resume_job))


@endpoint(role=Role.SUBMITTER, tag="jobs", body=JobsBody, answers={200: JobsChanged})
async def retry_jobs(request: Request) -> Response:
    """Queue many failed, cancelled or dead jobs again."""
    settings = service_of(request).settings
    return await _changed(request, _steered(lambda session, job_id: steer.retry_job(session, settings, job_id)))


@endpoint(role=Role.ADMIN, tag="jobs", body=JobsBody, answers={200: JobsChanged})
async def delete_jobs(request: Request) -> Response:
    """Delete many ended jobs with their logs, checkpoints and files; one whose checkpoint another needs stays."""

    def delete(service: Service, job_id: str) -> list[StoredEvent]:
        delete_job(service.database, service.settings, job_id)
        return []

    return await _changed(request, delete)


def _steered(verb: Callable[[Session, str], steer.Steered]) -> Change:
    def change(service: Service, job_id: str) -> list[StoredEvent] | None:
        with service.database.write() as session:
            wanted_before = steer.is_asked_to_stop(session, job_id)
            job, events = verb(session, job_id)
            is_changed = bool(events) or (job.cancel_requested_at is not None and not wanted_before)
        return events if is_changed else None

    return change


async def _changed(request: Request, change: Change) -> Response:
    service, body = service_of(request), request.state.body
    ids = list(dict.fromkeys(body.ids or await service.read(ids_that_match, body.filter, MAX_JOBS + 1)))
    if len(ids) > MAX_JOBS:
        raise ProblemError(422, f"the filter matches more than {MAX_JOBS:,} jobs; narrow it, or repeat it with a part")
    answer = JobsChanged(matched=len(ids), changed=0, refused=[])
    for job_id in ids:
        try:
            events = await asyncio.to_thread(change, service, job_id)
        except AptJobsError as exc:
            answer.refused.append(Refusal(id=job_id, why=str(exc)))
            continue
        if events is not None:
            answer.changed += 1
            await service.publish(job_id, events)
    service.wake_up_now.set()
    return JSONResponse(answer.model_dump(mode="json"))
