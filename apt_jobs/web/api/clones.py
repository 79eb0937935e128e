"""`POST /api/jobs/{id}/clone`: a job again, with changes."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.db.access import Role
from apt_jobs.db.idempotency import IdempotencyKey, known_resource
from apt_jobs.db.jobs import get_job
from apt_jobs.db.models import Job
from apt_jobs.jobs.spec import GenerateSpec, TrainSpec
from apt_jobs.operations.clone import cloned_spec, hold_to_data
from apt_jobs.web.api.code import require_consent
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.api.idempotency import made_job, replay_headers
from apt_jobs.web.api.jobs import submit
from apt_jobs.web.problems import ProblemError, faults_of
from apt_jobs.web.schemas import JobAnswer, job_answer
from apt_jobs.web.service import service_of


class CloneBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    patch: dict[str, Any] = Field(
        default_factory=dict, description="JSON merge patch (RFC 7396) of the job's `spec`; null takes a field out."
    )
    exact: bool = Field(
        False,
        description="With the packages that its last attempt ran with and the same content of its data set; refused "
        "where that cannot be had.",
    )
    checkpoint: Literal["best", "latest"] | None = Field(None, description="Start from this checkpoint of the job.")


@endpoint(
    role=Role.SUBMITTER,
    tag="jobs",
    body=CloneBody,
    answers={202: JobAnswer},
    creates=True,
    operation="clone_job",
    problems={409},
)
async def clone_job(request: Request) -> Response:
    """Submit a job again: its own spec, changed by a merge patch. The code is the very same."""
    service, body = service_of(request), request.state.body
    key: IdempotencyKey | None = request.state.idempotency_key
    if key is not None and (known := await service.read(known_resource, key)) is not None:
        return _answer(await made_job(service, key, known), is_replay=True)

    def read(session: Session) -> tuple[Job, TrainSpec | GenerateSpec]:
        job = get_job(session, request.path_params["job_id"])
        return job, cloned_spec(session, job, body.patch, exact=body.exact, checkpoint=body.checkpoint)

    try:
        job, spec = await service.read(read)
    except ValidationError as exc:
        faults = faults_of(exc, in_body=True)
        detail = "with this patch it is no job; see `errors`, whose pointers are into its spec"
        raise ProblemError(422, detail, kind="invalid-request", errors=faults) from exc
    require_consent(request, spec)

    def keep(session: Session, clone: Job) -> None:
        if body.exact:
            hold_to_data(session, job, clone)

    clone, is_replay = await submit(service, spec, key, keep)
    return _answer(clone, is_replay=is_replay)


def _answer(job: Job, *, is_replay: bool) -> Response:
    headers = {"location": f"/api/jobs/{job.id}", **replay_headers(is_replay)}
    return JSONResponse(job_answer(job).model_dump(mode="json"), 202, headers=headers)
