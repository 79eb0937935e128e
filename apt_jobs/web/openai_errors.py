"""Errors of `/v1` in OpenAI's form. `web/problems.py` asks here for every path of the dialect, whatever refused it."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field
from starlette._utils import get_route_path
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

PREFIX = "/v1/"
_CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = Field(description="Field of the request.")
    code: str | None


class ErrorAnswer(BaseModel):
    """An error of `/v1`."""

    error: ErrorDetail


def is_dialect(scope: Scope) -> bool:
    """Return whether a request speaks OpenAI's dialect."""
    return scope["type"] == "http" and (get_route_path(scope) + "/").startswith(PREFIX)


def openai_status(status: int) -> int:
    """Return the status that OpenAI has for one of ours: it has no 422 for what a client sent."""
    return 400 if status == 422 else status


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    if status >= 500:
        kind = "server_error"
    elif status == 429:
        kind = "rate_limit_error"
    elif status == 401:
        kind = "authentication_error"
    elif status == 403:
        kind = "permission_error"
    else:
        kind = "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status)}}


def error_response(
    status: int, message: str, *, param: str | None, code: str | None, headers: Mapping[str, str]
) -> Response:
    """Return an error as an answer."""
    status = openai_status(status)
    return JSONResponse(error_body(status, message, param=param, code=code), status, headers=dict(headers))
