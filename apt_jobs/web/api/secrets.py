"""`/api/secrets`: values that jobs are given by name. They are written here and never read."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.db.access import Role
from apt_jobs.db.models import Secret
from apt_jobs.db.secrets import delete_secret, list_secrets
from apt_jobs.errors import InvalidInput
from apt_jobs.events.codec import timestamp
from apt_jobs.jobs.environment import VariableName
from apt_jobs.operations.secrets import put_secret
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.service import service_of

_NAME: TypeAdapter[str] = TypeAdapter(VariableName)


class SecretAnswer(BaseModel):
    name: str
    created_at: str
    updated_at: str


class SecretList(BaseModel):
    object: Literal["list"] = "list"
    data: list[SecretAnswer]
    has_more: bool = False


class SecretBody(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    value: SecretStr = Field(description="8 to 16,384 characters. No answer ever has it.")


@endpoint(role=Role.VIEWER, tag="secrets", answers={200: SecretList}, operation="list_secrets")
async def get_secrets(request: Request) -> Response:
    """List the names of the secrets that jobs may ask for."""
    rows = await service_of(request).read(list_secrets)
    return JSONResponse(SecretList(data=[_answer(row) for row in rows]).model_dump(mode="json"))


@endpoint(
    role=Role.ADMIN, tag="secrets", body=SecretBody, answers={200: SecretAnswer}, problems={409}, operation="set_secret"
)
async def set_secret(request: Request) -> Response:
    """Store a value under the name of the environment variable that jobs get it in, in place of an earlier one."""
    service, body = service_of(request), request.state.body
    row = await service.write(put_secret, service.settings, _name(request), body.value.get_secret_value())
    return JSONResponse(_answer(row).model_dump(mode="json"))


@endpoint(role=Role.ADMIN, tag="secrets", answers={204: None}, operation="delete_secret")
async def remove_secret(request: Request) -> Response:
    """Remove a secret. Jobs that run keep it; those that wait for it fail as they start."""
    await service_of(request).write(delete_secret, request.path_params["name"])
    return Response(status_code=204)


def _name(request: Request) -> str:
    name: str = request.path_params["name"]
    try:
        return _NAME.validate_python(name)
    except ValidationError as exc:
        why = exc.errors()[0]["msg"].removeprefix("Value error, ")
        raise InvalidInput(f"{name[:100]!r} is no name of a secret: {why}; it is an environment variable") from exc


def _answer(row: Secret) -> SecretAnswer:
    return SecretAnswer(name=row.name, created_at=timestamp(row.created_at), updated_at=timestamp(row.updated_at))
