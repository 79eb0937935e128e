"""Errors of REST as RFC 9457 problem documents: one shape, made here."""

import logging
import secrets
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from apt_jobs.errors import (
    AptJobsError,
    Conflict,
    Denied,
    IdempotencyMismatch,
    InvalidInput,
    InvalidReferences,
    NotFound,
    OutOfSpace,
    Unavailable,
)
from apt_jobs.jobs.messages import without_server_paths
from apt_jobs.jobs.printable import escaped
from apt_jobs.operations.submit import ReferenceFault
from apt_jobs.web.error_pages import error_page, wants_page
from apt_jobs.web.openai_errors import error_response, is_dialect

logger = logging.getLogger(__name__)

JobKind = Literal["train", "generate"]
MEDIA_TYPE = "application/problem+json"
MAX_SEEN_CHARS = 200  # of a wrong value that is shown back
MAX_FAULTS = 100  # of a request that are named
RETRY_AFTER_S = 5
REFERENCES_DETAIL = "the job names what does not exist, or does nothing; see `errors`"
_STATUS_OF: tuple[tuple[type[AptJobsError], int], ...] = (
    (IdempotencyMismatch, 422),
    (NotFound, 404),
    (Conflict, 409),
    (Denied, 401),
    (InvalidInput, 422),
    (OutOfSpace, 507),
    (Unavailable, 503),
)


class Fault(BaseModel):
    """One thing that is wrong with a request."""

    pointer: str = Field(description="Where: JSON pointer into the body, or the name of a query parameter.")
    seen: str | None = Field(description="The value that came, shortened.")
    detail: str = Field(description="What would have been right.")


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str = Field(description="Stable name of the kind of error.")
    title: str
    status: int
    detail: str = Field(description="A sentence that says what happened and what to do.")
    errors: list[Fault] = Field(default_factory=list, description="All faults of the request.")
    incident: str | None = Field(None, description="Id under which the server's log has more.")


class ProblemError(Exception):
    """Raised by handlers to answer with a problem."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        kind: str | None = None,
        errors: Sequence[Fault] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.kind = status, detail, kind
        self.errors, self.headers = list(errors), dict(headers or {})


def problem_response(
    status: int,
    detail: str,
    *,
    kind: str | None = None,
    errors: Sequence[Fault] = (),
    headers: Mapping[str, str] | None = None,
    incident: str | None = None,
    scope: Scope | None = None,
) -> Response:
    """Return an error as the service answers it: with a `scope`, a page for browsers that asked for one."""
    detail = escaped(without_server_paths(detail))
    title = HTTPStatus(status).phrase
    problem = Problem(
        type=f"urn:apt-jobs:{kind or title.lower().replace(' ', '-')}",
        title=title,
        status=status,
        detail=detail,
        errors=list(errors),
        incident=incident,
    )
    extra = dict(headers or {})
    if status in (429, 503):
        extra.setdefault("retry-after", str(RETRY_AFTER_S))
    if scope is not None and is_dialect(scope):
        param = errors[0].pointer.removeprefix("#/") if errors and errors[0].pointer not in ("#", "") else None
        code = kind if kind is not None and "-" not in kind else None
        words = "; ".join(f"{fault.pointer.removeprefix('#/')}: {fault.detail}" for fault in errors)
        message = words if kind == "invalid-request" and words else detail
        return error_response(status, message, param=param, code=code, headers=extra)
    if scope is not None and wants_page(Headers(scope=scope)):
        shown = f"{detail} ({incident})" if incident else detail
        return error_page(status, title, shown, scope.get("root_path", ""), extra)
    return JSONResponse(problem.model_dump(mode="json"), status, headers=extra, media_type=MEDIA_TYPE)


def faults_of(error: ValidationError, *, in_body: bool, hides_input: bool = False) -> list[Fault]:
    """Return pydantic's faults in words: the first `MAX_FAULTS`, and how many more there are."""
    faults = [
        Fault(pointer=_pointer(fault["loc"], in_body), seen=None if hides_input else _shown(fault), detail=fault["msg"])
        for fault in error.errors(include_url=False)[:MAX_FAULTS]
    ]
    if (num_more := error.error_count() - MAX_FAULTS) > 0:
        faults.append(Fault(pointer=_pointer((), in_body), seen=None, detail=f"and {num_more:,} more"))
    return faults


def reference_faults(error: InvalidReferences, under: str = "#") -> list[Fault]:
    """Return the fields of a job that name what does not exist. `under` is where the job is in the body."""
    return [
        Fault(pointer=f"{under}/{fault.field.replace('.', '/')}", seen=fault.seen, detail=fault.expected)
        for fault in error.faults
        if isinstance(fault, ReferenceFault)
    ]


async def on_problem(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, ProblemError)
    return problem_response(
        exc.status, exc.detail, kind=exc.kind, errors=exc.errors, headers=exc.headers, scope=request.scope
    )


async def on_apt_jobs_error(request: Request, exc: Exception) -> Response:
    status = next((status for error, status in _STATUS_OF if isinstance(exc, error)), 500)
    if status == 500:
        return await on_unexpected(request, exc)
    if isinstance(exc, InvalidReferences):
        faults = reference_faults(exc)
        return problem_response(status, REFERENCES_DETAIL, kind="invalid-request", errors=faults, scope=request.scope)
    return problem_response(status, str(exc), scope=request.scope)


async def on_http_exception(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    if exc.status_code == 404:
        detail = "there is nothing at this address; /docs lists what programs can ask for"
        return problem_response(404, detail, headers=exc.headers, scope=request.scope)
    if exc.status_code != 405:
        return problem_response(exc.status_code, exc.detail, headers=exc.headers, scope=request.scope)
    allowed = ", ".join(sorted(_allowed_methods(request)))
    detail = f"{request.method} is not possible here; {allowed} is"
    return problem_response(405, detail, headers={"allow": allowed}, scope=request.scope)


async def on_unexpected(request: Request, exc: Exception) -> Response:
    """Answer a fault of our own: the caller gets an error id, the log gets the rest."""
    incident = secrets.token_hex(8)
    logger.error("a request broke", exc_info=exc, extra={"incident": incident, "path": request.url.path})
    detail = "The server failed; its log tells more under this incident."
    return problem_response(500, detail, incident=incident, scope=request.scope)


def _shown(fault: Mapping[str, Any]) -> str | None:
    if fault["type"] == "missing":
        return None
    text = repr(fault["input"])
    return text if len(text) <= MAX_SEEN_CHARS else text[:MAX_SEEN_CHARS] + "..."


def _allowed_methods(request: Request) -> set[str]:
    """Return the methods of all routes with the path of the first that matches: Starlette tells only that one's."""
    routes: list[BaseRoute] = request.app.routes
    matching = [route for route in routes if isinstance(route, Route) and route.matches(request.scope)[0] != Match.NONE]
    return {method for route in matching if route.path == matching[0].path for method in route.methods or ()}


def _pointer(location: Sequence[int | str], in_body: bool) -> str:
    if not in_body:
        return escaped(".".join(map(str, location)))
    kinds = get_args(JobKind)  # pydantic puts the chosen member of a union of job specs where the job is
    where = next((index for index in (0, 1) if location[index : index + 1] and location[index] in kinds), None)
    parts = location if where is None else (*location[:where], *location[where + 1 :])
    return "#" + "".join(f"/{escaped(str(part))}" for part in parts)
