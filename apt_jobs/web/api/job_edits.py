"""`PATCH /api/jobs/{id}`: name, labels, notes; priority and queue while it waits. Two editors see each other."""

from typing import Annotated

from pydantic import Field, StringConstraints, model_validator
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.db.access import Role
from apt_jobs.db.job_edits import EDITABLE, MAX_LABELS, edit_job, version_of
from apt_jobs.db.models import Job
from apt_jobs.jobs.spec import LabelValue, Name, Title
from apt_jobs.jobs.strict_model import Strict
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.problems import ProblemError
from apt_jobs.web.schemas import JobAnswer, job_answer
from apt_jobs.web.service import service_of

MAX_NOTES_CHARS = 10_000


class JobPatch(Strict):
    """What to change of a job; what is left out stays."""

    name: Title | None = None
    labels: dict[Name, LabelValue | None] = Field(
        default_factory=dict, max_length=2 * MAX_LABELS, description="Merged with those it has; null removes one."
    )
    notes: Annotated[str, StringConstraints(max_length=MAX_NOTES_CHARS)] | None = None
    priority: int = Field(0, ge=-100, le=100, description="Only while it waits.")
    queue: Name = Field("train", description="Only while it waits.")

    @model_validator(mode="after")
    def _changes_something(self) -> "JobPatch":
        if not self.model_fields_set:
            raise ValueError(f"there is nothing to change; set one of {', '.join(EDITABLE)}")
        return self


def etag_of(job: Job) -> str:
    """Return the `ETag` of a job: of what a PATCH changes, as all else changes while it runs."""
    return f'"{version_of(job)}"'


@endpoint(role=Role.SUBMITTER, tag="jobs", body=JobPatch, answers={200: JobAnswer}, problems={409, 412})
async def update_job(request: Request) -> Response:
    """Change a job's name, labels or notes, or its priority or queue while it waits.

    With `If-Match: <ETag of GET /api/jobs/{id}>` it is refused (412) if somebody else changed one of these meanwhile.
    """
    body: JobPatch = request.state.body
    service, wanted = service_of(request), request.headers.get("if-match")

    def check(job: Job) -> None:
        if wanted is None or wanted.strip() == "*":
            return
        if etag_of(job) not in [tag.strip() for tag in wanted.split(",")]:
            raise ProblemError(
                412, f"job {job.id} was changed meanwhile: its ETag is {etag_of(job)}; get it, then change it again"
            )

    def write(session: Session) -> tuple[JobAnswer, str]:
        job = edit_job(session, request.path_params["job_id"], body.model_dump(exclude_unset=True), check)
        return job_answer(job), etag_of(job)

    answer, etag = await service.write(write)
    service.wake_up_now.set()
    return JSONResponse(answer.model_dump(mode="json"), headers={"etag": etag})
