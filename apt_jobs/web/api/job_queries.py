"""Query parameters of jobs that several addresses share: filter, order, fields of the answer, how long to wait."""

import asyncio
import time
from typing import Annotated, Any

from pydantic import AfterValidator, StringConstraints
from starlette.requests import Request

from apt_jobs.db.events import head_and_state
from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.job_filter import MAX_CHARS, parse_filter
from apt_jobs.jobs.job_sort import MAX_CHARS as MAX_SORT_CHARS
from apt_jobs.jobs.job_sort import parse_sort
from apt_jobs.jobs.states import TERMINAL_STATES
from apt_jobs.web.schemas import JobAnswer
from apt_jobs.web.service import service_of

POLL_S = 0.5
MAX_WAIT_S = 60.0


def _require_filter(text: str) -> str:
    try:
        parse_filter(text)
    except InvalidInput as exc:
        raise ValueError(str(exc)) from exc
    return text


def _require_sort(text: str) -> str:
    try:
        parse_sort(text)
    except InvalidInput as exc:
        raise ValueError(str(exc)) from exc
    return text


def _require_fields(text: str) -> str:
    unknown = [name for name in text.split(",") if name not in JobAnswer.model_fields]
    if unknown:
        raise ValueError(f"a job has no field {unknown[0]!r}; it has {', '.join(JobAnswer.model_fields)}")
    return text


FilterText = Annotated[str, StringConstraints(max_length=MAX_CHARS), AfterValidator(_require_filter)]
Sort = Annotated[str, StringConstraints(max_length=MAX_SORT_CHARS), AfterValidator(_require_sort)]
Fields = Annotated[str, StringConstraints(max_length=500), AfterValidator(_require_fields)]


def chosen(answer: JobAnswer, fields: str | None) -> dict[str, Any]:
    """Return an answer as JSON, of which only some fields were asked for."""
    return answer.model_dump(mode="json", include=None if fields is None else set(fields.split(",")))


async def wait_for_end(request: Request, job_id: str, wait_s: float) -> None:
    """Return when the job has ended or is not there, the time is over, or the client has left."""
    service, deadline = service_of(request), time.monotonic() + wait_s
    while time.monotonic() < deadline and not await request.is_disconnected():
        _, state = await service.read(head_and_state, job_id)
        if state is None or state in TERMINAL_STATES:
            return
        await asyncio.sleep(min(POLL_S, max(deadline - time.monotonic(), 0.0)))
