"""`@dialect`: an endpoint below `/v1`, whose errors name OpenAI's parameters; and what its lists have in common."""

from functools import partial
from typing import Annotated

from pydantic import Field, StringConstraints

from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.api.jobs import Query

dialect = partial(endpoint, tag="openai", is_dialect=True)


class PageQuery(Query):
    """A page of a list, as OpenAI's clients ask for it."""

    after: Annotated[str, StringConstraints(max_length=100)] | None = Field(None, description="Last id seen.")
    limit: int = Field(20, ge=1, le=100)
