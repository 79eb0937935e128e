"""What every handler of the dialect does first: role, body, and errors that name OpenAI's parameters."""

import functools
from collections.abc import Awaitable, Callable

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from apt_jobs.db.access import Role
from apt_jobs.web.api.endpoint import read_json, require_role
from apt_jobs.web.problems import ProblemError, faults_of

Handler = Callable[[Request], Awaitable[Response]]


def dialect(*, role: Role, body: type[BaseModel] | None = None) -> Callable[[Handler], Handler]:
    """Declare a handler, which finds its validated body in `request.state.body`."""

    def decorate(handler: Handler) -> Handler:
        @functools.wraps(handler)
        async def checked(request: Request) -> Response:
            require_role(request, role)
            if body is not None:
                raw = await read_json(request)
                try:
                    request.state.body = body.model_validate_json(raw)
                except ValidationError as exc:
                    faults = faults_of(exc, in_body=True)
                    words = "; ".join(f"{fault.pointer.removeprefix('#/')}: {fault.detail}" for fault in faults)
                    raise ProblemError(400, words, kind="invalid-request", errors=faults) from exc
            return await handler(request)

        return checked

    return decorate
