"""Lines of a batch: what each asks for, what its answer is, and the check of a whole file before any of it runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from apt_jobs.db.models import Job
from apt_jobs.jobs.spec import GenerateSpec
from apt_jobs.jobs.states import JobState
from apt_jobs.web.api.generation_requests import JobFailed
from apt_jobs.web.live.generation_streams import Ended
from apt_jobs.web.openai.completions import answer_of
from apt_jobs.web.openai.embeddings import EmbeddingRequest, embeddings_of
from apt_jobs.web.openai.generation_jobs import job_of, no_such_model, refusal
from apt_jobs.web.openai.json_lines import Line, json_lines
from apt_jobs.web.openai.requests import ChatRequest, CompletionRequest
from apt_jobs.web.openai_errors import error_body, openai_status
from apt_jobs.web.problems import ProblemError

MAX_ERRORS = 100  # of a file that are named
MAX_SHOWN_CHARS = 100

Endpoint = Literal["/v1/completions", "/v1/chat/completions", "/v1/embeddings"]
Answer = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """What one endpoint takes and gives."""

    request: type[CompletionRequest] | type[ChatRequest] | type[EmbeddingRequest]
    answer: Callable[[str, str, dict[str, Any]], dict[str, Any]]  # of job id, model and the job's result


KINDS: Mapping[str, Kind] = {
    "/v1/completions": Kind(CompletionRequest, partial(answer_of, is_chat=False)),
    "/v1/chat/completions": Kind(ChatRequest, partial(answer_of, is_chat=True)),
    "/v1/embeddings": Kind(EmbeddingRequest, embeddings_of),
}


class BatchLine(BaseModel):
    """One line of the input file."""

    model_config = ConfigDict(extra="forbid")

    custom_id: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A line as a job, or as the answer of one that cannot be a job."""

    line: Line
    custom_id: str
    model: str
    spec: GenerateSpec | None
    answer: Answer | None


def check_lines(file: Path, endpoint: str) -> tuple[int, list[dict[str, Any]]]:
    """Return how many requests a file has, and what is wrong with its lines, as the dialect shows it."""
    num_lines = 0
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    for line in json_lines(file):
        num_lines += 1
        fault = _fault_of(line, endpoint, seen)
        if fault is not None:
            code, param, words = fault
            message = f"line {line.number:,}: {words}"
            errors.append({"code": code, "line": line.number, "message": message, "param": param})
        if len(errors) == MAX_ERRORS:
            break
    if num_lines == 0:
        errors.append({"code": "empty_file", "line": None, "message": "the file has no request", "param": None})
    return num_lines, errors


def ask(line: Line, endpoint: str, batch_id: str) -> Asked:
    """Turn a checked line into the job that it asks for."""
    assert line.value is not None  # the file was checked
    body = line.value["body"]
    custom_id, model = line.value["custom_id"], str(body.get("model", ""))[:MAX_SHOWN_CHARS]
    try:
        request = KINDS[endpoint].request.model_validate(body)
        spec = job_of(request)
        if spec.stream:
            raise ProblemError(400, "stream: a batch has no streams; leave it out", kind="invalid-request")
        if isinstance(request, EmbeddingRequest) and request.encoding_format == "base64":
            raise ProblemError(400, "encoding_format: a batch answers with numbers; leave it out")
    except ValidationError as exc:
        words = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in exc.errors()[:MAX_ERRORS])
        return Asked(line, custom_id, model, None, refused(ProblemError(400, words), f"{batch_id}-{line.number}"))
    except ProblemError as exc:
        return Asked(line, custom_id, model, None, refused(exc, f"{batch_id}-{line.number}"))
    job = spec.model_copy(update={"priority": 0, "labels": {"batch": batch_id}})
    return Asked(line, custom_id, model, job, None)


def refused_model(model: str, batch_id: str, number: int) -> Answer:
    """Return the answer of a line that names a model which does not exist."""
    return refused(no_such_model(model), f"{batch_id}-{number}")


def refused(exc: ProblemError, request_id: str) -> Answer:
    """Return the answer of a line that was refused."""
    status = openai_status(exc.status)
    code = exc.kind if exc.kind is not None and "-" not in exc.kind else None
    param = exc.errors[0].pointer.removeprefix("#/") if exc.errors else None
    return _responded(status, request_id, error_body(status, exc.detail, param=param, code=code))


def not_made(code: str) -> Answer:
    """Return the answer of a line that never ran, or was stopped: `batch_expired` or `batch_cancelled`."""
    words = {
        "batch_expired": "This request could not be executed before the completion window expired.",
        "batch_cancelled": "This request was not executed, as the batch was cancelled.",
    }
    return {"response": None, "error": {"code": code, "message": words[code]}}


def answer_of_job(job: Job | None, model: str, endpoint: str, stopped: str | None) -> tuple[bool, Answer]:
    """Return whether a request failed, and its answer.

    Args:
        job: which has ended; None: it was deleted.
        model: as the line named it.
        endpoint: of the batch.
        stopped: code of why the batch stops; None: it does not.
    """
    if job is None:
        words = "its job was deleted before its end was seen"
        return True, _responded(500, "", error_body(500, words, code="job_deleted"))
    if job.state == JobState.SUCCEEDED and job.result is not None:
        return False, _responded(200, job.id, KINDS[endpoint].answer(job.id, model, job.result))
    if job.state == JobState.CANCELLED and stopped is not None:
        return True, not_made(stopped)
    failed = JobFailed(job.id, Ended(job.state, None, job.reason, job.error))
    return True, refused(refusal(failed), job.id)


def _responded(status: int, request_id: str, body: dict[str, Any]) -> Answer:
    return {"response": {"status_code": status, "request_id": request_id, "body": body}, "error": None}


def _fault_of(line: Line, endpoint: str, seen: set[str]) -> tuple[str, str | None, str] | None:
    """Return code, parameter and words of what is wrong with a line."""
    if line.value is None:
        return "invalid_json_line", None, line.fault
    try:
        asked = BatchLine.model_validate(line.value)
    except ValidationError as exc:
        first = exc.errors()[0]
        param = ".".join(map(str, first["loc"]))
        return "invalid_request", param, f"{param}: {first['msg']}"
    if asked.url != endpoint:
        return "mismatched_endpoint", "url", f"url is {asked.url[:MAX_SHOWN_CHARS]!r}; the batch is for {endpoint!r}"
    if asked.custom_id in seen:
        return "duplicate_custom_id", "custom_id", f"custom_id {asked.custom_id[:MAX_SHOWN_CHARS]!r} is there already"
    seen.add(asked.custom_id)
    return None
