"""Generation jobs of the dialect: from a body to the job that it asks for, and from a failed one to OpenAI's words."""

from typing import Protocol

from pydantic import ValidationError
from starlette.requests import Request

from apt_jobs.jobs.spec import GenerateSpec
from apt_jobs.web.api.generation_requests import Generation, JobFailed, begin
from apt_jobs.web.problems import Fault, ProblemError

CONTEXT_CODE = "context_length_exceeded"
_WRONG_INPUT = ("InvalidInput",)  # errors of a job that are the request's fault


class AsksForJob(Protocol):
    """A body of a request that becomes a job."""

    def job(self) -> GenerateSpec:
        """Return the job."""


def job_of(body: AsksForJob) -> GenerateSpec:
    """Return the job that a request asks for.

    Raises:
        ProblemError: 400, with the parameters that no job can have.
    """
    try:
        return body.job()
    except ValidationError as exc:
        words = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in exc.errors())
        raise ProblemError(400, words, kind="invalid-request") from exc


async def begin_job(request: Request, spec: GenerateSpec, model: str) -> Generation:
    """Submit a job that this request waits for. `model`: as the request named it.

    Raises:
        ProblemError: it was not submitted, in OpenAI's words where the model is why.
    """
    try:
        return await begin(request, spec)
    except ProblemError as exc:
        if any(fault.pointer == "#/model" for fault in exc.errors):
            raise no_such_model(model) from exc
        raise


def no_such_model(model: str) -> ProblemError:
    """Return the refusal of a model that does not exist."""
    fault = Fault(pointer="#/model", seen=None, detail="an id that GET /v1/models lists")
    detail = f"the model {model!r} does not exist; GET /v1/models lists those that do"
    return ProblemError(404, detail, kind="model_not_found", errors=[fault])


def refusal(exc: JobFailed) -> ProblemError:
    """Return what a failed job is in OpenAI's statuses."""
    end = exc.end
    if (end.error or {}).get("error") in _WRONG_INPUT:
        detail = end.reason or exc.detail
        return ProblemError(400, detail, kind=CONTEXT_CODE if "context" in detail else "invalid-request")
    return ProblemError(409 if end.state == "cancelled" else 500, exc.detail, kind="job-failed")
