"""`@endpoint`: one declaration validates a request, says who may make it, and documents it.

spectree collects the declarations into the OpenAPI document; validation is pydantic's, with all faults of a request in
one problem document, whatever part of it they are in.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any, get_args, get_origin

from pydantic import BaseModel, RootModel, TypeAdapter, ValidationError
from python_multipart.multipart import parse_options_header
from spectree import Response as SpecResponse
from spectree import SecurityScheme, SpecTree
from spectree.models import InType, SecureType, SecuritySchemeData
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from apt_jobs import __version__
from apt_jobs.db.access import Principal, Role
from apt_jobs.settings import Settings
from apt_jobs.web.api import exports, overviews
from apt_jobs.web.api.idempotency import idempotency_key_of
from apt_jobs.web.api.json_text import checked_json
from apt_jobs.web.problems import MEDIA_TYPE, Problem, ProblemError, faults_of
from apt_jobs.web.service import service_of

LONG_BODY_BYTES = 1 << 16  # checked in a thread, since others wait meanwhile
_IDEMPOTENCY = (
    "With an `Idempotency-Key` (1 to 255 printable characters), a repeated request within 24 hours creates nothing "
    "and is marked `Idempotent-Replayed: true`; the same key with another body is refused with 422."
)
Handler = Callable[[Request], Awaitable[Response]]

spec = SpecTree(
    "starlette",
    title="apt_jobs",
    version=__version__,
    description="Submit, watch and steer training and generation jobs.",
    mode="strict",  # only declared endpoints, not the pages
    annotations=False,
    validation_error_model=Problem,
    security_schemes=[
        SecurityScheme(name="key", data=SecuritySchemeData(type=SecureType.HTTP, scheme="bearer")),
        SecurityScheme(
            name="browser", data=SecuritySchemeData(type=SecureType.API_KEY, name="apt_session", field_in=InType.COOKIE)
        ),
    ],
)


def endpoint(
    *,
    role: Role,
    tag: str,
    answers: dict[int, Any],
    query: type[BaseModel] | None = None,
    body: Any = None,
    creates: bool = False,
) -> Callable[[Handler], Handler]:
    """Declare a handler, which finds what was validated in `request.state.query` and `request.state.body`.

    `answers` maps a status to the pydantic model of its body, or None. `body` is a model or a union of models.
    `creates`: an `Idempotency-Key` is checked and is in `request.state.idempotency_key`, or None.
    """
    adapter: TypeAdapter[Any] | None = TypeAdapter(body) if body is not None else None

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
                    faults += faults_of(exc, in_body=True)
            if faults:
                detail = f"{len(faults)} fault{'s' * (len(faults) > 1)} in the request; see `errors`"
                raise ProblemError(422, detail, kind="invalid-request", errors=faults)
            if creates:
                request.state.idempotency_key = idempotency_key_of(request, _asked(request, query, body))
            return await handler(request)

        if creates:
            checked.__doc__ = f"{handler.__doc__} {_IDEMPOTENCY}"
        responses = {f"HTTP_{status}": model for status, model in answers.items()}
        problems = {
            f"HTTP_{status}": Problem for status in (400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 429, 503)
        }
        decorated: Handler = spec.validate(
            query=query,
            json=_documented(body),
            resp=SpecResponse(**{**problems, **responses}),
            tags=[tag],
            security=[{"key": []}, {"browser": []}],
            skip_validation=True,
        )(checked)
        return decorated

    return decorate


def _asked(request: Request, query: type[BaseModel] | None, body: Any) -> list[Any]:
    """Return what a validated request asks for, the same for any way to write it."""
    parts = [request.state.query if query else None, request.state.body if body else None]
    return [None if part is None else part.model_dump(mode="json") for part in parts]


def _query(request: Request, model: type[BaseModel]) -> dict[str, Any]:
    """Parameters by name; those that the model declares as lists may be repeated."""
    values: dict[str, Any] = {}
    for name in request.query_params:
        field = model.model_fields.get(name)
        is_list = field is not None and get_origin(field.annotation) is list
        given = request.query_params.getlist(name)
        values[name] = given if is_list or len(given) > 1 else given[0]
    return values


@functools.cache
def openapi_document() -> dict[str, Any]:
    """Return the OpenAPI document of all declared endpoints: spectree's, with what it cannot know."""
    document: dict[str, Any] = spec.spec
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                content = response.get("content", {})
                if int(status) >= 400 and "application/json" in content:
                    response["content"] = {MEDIA_TYPE: content.pop("application/json")}
        if path.endswith("/download"):
            operations["get"]["responses"]["200"]["content"] = {"application/x-tar": {}}
        if path.endswith("/overview"):
            operations["get"]["responses"]["200"]["content"][overviews.MEDIA_TYPE] = {}
        if path.endswith("/export"):
            operations["get"]["responses"]["200"]["content"] = {kind: {} for kind in exports.MEDIA_TYPES.values()}
        if path == "/api/datasets":
            text = {"schema": {"type": "string", "minLength": 1}}
            operations["post"]["requestBody"] = {"required": True, "content": {"text/plain": text}}
            operations["post"]["responses"]["201"]["content"] = {"application/json": {}}
    return document


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


def _documented(body: Any) -> Any:
    """Wrap a union of models into a root model under its own name, as spectree wants a class."""
    if body is None or isinstance(body, type):
        return body
    names = "Or".join(member.__name__ for member in get_args(get_args(body)[0]))
    return type(names, (RootModel[body],), {"__doc__": "One of the kinds of job."})
