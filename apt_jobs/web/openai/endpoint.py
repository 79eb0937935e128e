"""`@dialect`: an endpoint below `/v1`, whose errors name OpenAI's parameters; and what its lists have in common."""

from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Annotated, overload

from pydantic import AfterValidator, BaseModel, Field, StringConstraints
from starlette.requests import Request

from apt_jobs.db.access import Principal, Role
from apt_jobs.jobs.printable import require_printable
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.api.jobs import Query

dialect = partial(endpoint, tag="openai", is_dialect=True)


class PageQuery(Query):
    """A page of a list, as OpenAI's clients ask for it."""

    after: Annotated[str, StringConstraints(max_length=100)] | None = Field(None, description="Last id seen.")
    limit: int = Field(20, ge=1, le=100)


Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(min_length=1, max_length=64), AfterValidator(require_printable)],
        Annotated[str, StringConstraints(max_length=512), AfterValidator(require_printable)],
    ],
    Field(max_length=16, description="Free key/value pairs."),
]


def owner_of(request: Request) -> str:
    """Return who owns what this request makes."""
    principal: Principal = request.state.principal
    return principal.owner


def seen_by(request: Request) -> str | None:
    """Return whose rows the request may see; None: everybody's, for an admin."""
    principal: Principal = request.state.principal
    return None if principal.role.includes(Role.ADMIN) else principal.owner


@overload
def seconds(moment: datetime) -> int: ...


@overload
def seconds(moment: datetime | None) -> int | None: ...


def seconds(moment: datetime | None) -> int | None:
    """Return an instant as the dialect writes it: whole seconds since 1970."""
    return None if moment is None else int(moment.timestamp())


class Identified(BaseModel):
    """A row of a list."""

    id: str


def ends_of(rows: Sequence[Identified]) -> dict[str, str | None]:
    """Return the ids that a list begins and ends with."""
    return {"first_id": rows[0].id if rows else None, "last_id": rows[-1].id if rows else None}
