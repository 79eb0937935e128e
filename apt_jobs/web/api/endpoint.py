"""`@endpoint`: one declaration validates a request, says who may make it, and documents it (`openapi.py`).

Validation is pydantic's, with all faults of a request in one problem document, whatever part of it they are in.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from apt_jobs.db.access import Principal, Role
from apt_jobs.settings import Settings
from apt_jobs.web.api.idempotency import idempotency_key_of
from apt_jobs.web.api.json_text import checked_json
from apt_jobs.web.api.openapi import Declaration
from apt_jobs.web.problems import ProblemError, faults_of
from apt_jobs.web.service import service_of

LONG_BODY_BYTES = 1 << 16  # checked in a thread, since others wait meanwhile
Handler = Callable[[Request], Awaitable[Response]]


def endpoint(
    *,
    role: Role,
    tag: str,
    answers: Mapping[int, Any],
    query: type[BaseModel] | None = None,
    body: Any = None,
    creates: bool = False,
    operation: str | None = None,
    problems: Collection[int] = (),
    media: Mapping[str, Any] | None = None,
    body_media: Mapping[str, Any] | None = None,
    is_dialect: bool = False,
) -> Callable[[Handler], Handler]:
    """Declare a handler, which finds what was validated in `request.state.query` and `request.state.body`.

    Args:
        role: Whoever asks has to have it.
        tag: Group of the operation in the document.
        answers: The pydantic model of the body by status, or None.
        query: Model of the query parameters.
        body: Model of the body, or a union of models.
        creates: An `Idempotency-Key` is checked and is in `request.state.idempotency_key`, or None.
        operation: Id of the operation, as generated clients call it; default: the handler's name.
        problems: Statuses of its errors, besides those that `openapi.problems_of` knows.
        media: Schemas of what it answers with 200 instead of JSON, by media type.
        body_media: Schemas of a body that is no JSON, by media type; the handler reads it.
        is_dialect: It is below `/v1`: its errors have OpenAI's form.

    Returns:
        The decorator.
    """
    adapter: TypeAdapter[Any] | None = TypeAdapter(body) if body is not None else None
    hides_input = bool(getattr(body, "model_config", {}).get("hide_input_in_errors"))

    def decorate(handler: Handler) -> Handler:
        @functools.wraps(handler)
        async def checked(request: Request) -> Response:
            require_role(request, role)
            faults = []
            if query is not None:
                try:
                    request.state.query = query.model_validate(_query(request, query))
                except ValidationError as exc:
                    faults += faults_of(exc, in_body=False)
            if adapter is not None:
                try:
                    request.state.body = adapter.validate_json(await read_json(request))
                except ValidationError as exc:
                    faults += faults_of(exc, in_body=True, hides_input=hides_input)
            if faults:
                detail = f"{len(faults)} fault{'s' * (len(faults) > 1)} in the request; see `errors`"
                raise ProblemError(422, detail, kind="invalid-request", errors=faults)
            if creates:
                request.state.idempotency_key = idempotency_key_of(request, _asked(request, query, body))
            return await handler(request)

        checked.declaration = Declaration(  # type: ignore[attr-defined]  # a function holds what is set on it
            operation or handler.__name__,
            tag,
            answers,
            frozenset(problems),
            query,
            body,
            creates,
            media or {},
            body_media or {},
            is_dialect,
        )
        return checked

    return decorate


def _asked(request: Request, query: type[BaseModel] | None, body: Any) -> list[Any]:
    """Return what a validated request asks for, the same for any way to write it."""
    parts = [request.state.query if query else None, request.state.body if body else None]
    return [None if part is None else part.model_dump(mode="json") for part in parts]


def _query(request: Request, model: type[BaseModel]) -> dict[str, Any]:
    """Return parameters by name; those that the model declares as lists may be repeated."""
    values: dict[str, Any] = {}
    for name in request.query_params:
        field = model.model_fields.get(name)
        is_list = field is not None and get_origin(field.annotation) is list
        given = request.query_params.getlist(name)
        values[name] = given if is_list or len(given) > 1 else given[0]
    return values


def require_role(request: Request, role: Role) -> None:
    """Return if whoever asks may do what `role` may.

    Raises:
        ProblemError: 403.
    """
    principal: Principal = request.state.principal
    if not principal.role.includes(role):
        raise ProblemError(403, f"{principal.name!r} is a {principal.role}; this needs the role {role}")


async def read_json(request: Request) -> bytes:
    """Return the body, bounded in size, time and depth.

    Raises:
        ProblemError: 400, 408, 413 or 415.
    """
    kind, parameters = parse_options_header(request.headers.get("content-type", ""))
    if kind.lower() != b"application/json":
        shown = kind.decode("latin-1")[:100] or "of no declared type"
        raise ProblemError(415, f"the body is {shown}; send application/json")
    charset = parameters.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8", "us-ascii"):
        raise ProblemError(415, f"the body is JSON in {charset[:40]!r}; send it in UTF-8")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ProblemError(415, f"the body is encoded as {encoding[:40]!r}; send it as it is")
    settings: Settings = service_of(request).settings
    raw = await read_body(request, settings.max_body_bytes, settings.request_timeout_s)
    check = functools.partial(checked_json, raw)
    return await asyncio.to_thread(check) if len(raw) > LONG_BODY_BYTES else check()


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """Return the whole body.

    Raises:
        ProblemError: it is too large, or did not arrive in time.
    """
    too_large = ProblemError(413, f"the body is larger than {max_bytes:,} bytes")
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > max_bytes:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > max_bytes:
                    raise too_large
                parts.append(part)
    except TimeoutError as exc:
        raise ProblemError(408, f"the body did not arrive within {timeout_s:.0f} s") from exc
    except ClientDisconnect as exc:
        raise ProblemError(400, "the connection ended within the body") from exc
    return b"".join(parts)
