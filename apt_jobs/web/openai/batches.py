"""`/v1/batches`: the requests of a file, as jobs that nobody waits for; see `batch_loop.py` for how they move on."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.db.access import Role
from apt_jobs.db.batches import get_batch, list_batches, num_active, request_batch_cancel
from apt_jobs.db.dialect_models import Batch
from apt_jobs.db.files import get_file
from apt_jobs.db.idempotency import create_once
from apt_jobs.errors import NotFound
from apt_jobs.jobs.ids import new_batch_id
from apt_jobs.web.api.idempotency import replay_headers
from apt_jobs.web.openai.batch_lines import Endpoint
from apt_jobs.web.openai.endpoint import (
    Identified,
    Metadata,
    PageQuery,
    dialect,
    ends_of,
    owner_of,
    seconds,
    seen_by,
)
from apt_jobs.web.openai.files import BATCH, Lifetime, field_error
from apt_jobs.web.problems import ProblemError
from apt_jobs.web.service import service_of

MAX_ACTIVE = 100  # batches of one key that have not ended
MAX_WINDOW_H = 336


class ExpiresAfter(BaseModel):
    """How long a file is kept."""

    model_config = ConfigDict(extra="forbid")
    anchor: Literal["created_at"]
    seconds: Lifetime


class BatchCreateRequest(BaseModel):
    """`POST /v1/batches`."""

    model_config = ConfigDict(extra="forbid")

    input_file_id: Annotated[str, StringConstraints(min_length=1, max_length=100)]
    endpoint: Endpoint
    completion_window: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,2}h$")] = Field(
        description=f"`24h`, or other hours up to {MAX_WINDOW_H}: what has not run then is given up."
    )
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchError(BaseModel):
    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchError]


class BatchCounts(BaseModel):
    total: int
    completed: int
    failed: int


class TokenDetails(BaseModel):
    cached_tokens: int = 0


class OutputTokenDetails(BaseModel):
    reasoning_tokens: int = 0


class BatchUsage(BaseModel):
    input_tokens: int
    input_tokens_details: TokenDetails = Field(default_factory=TokenDetails)
    output_tokens: int
    output_tokens_details: OutputTokenDetails = Field(default_factory=OutputTokenDetails)
    total_tokens: int


class BatchObject(Identified):
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchObjectList(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


@dialect(
    role=Role.SUBMITTER,
    body=BatchCreateRequest,
    answers={200: BatchObject},
    creates=True,
    operation="create_batch",
    problems={404},
)
async def create_batch(request: Request) -> Response:
    """Run the requests of an uploaded file. Durable: each becomes a job of the queue, whatever is killed meanwhile."""
    body: BatchCreateRequest = request.state.body
    window_h = int(body.completion_window.removesuffix("h"))
    if window_h > MAX_WINDOW_H:
        raise field_error("completion_window", f"expected at most {MAX_WINDOW_H}h", body.completion_window)
    owner, seen, key = owner_of(request), seen_by(request), request.state.idempotency_key

    def create(session: Session) -> str:
        try:
            file = get_file(session, body.input_file_id, seen)
        except NotFound as exc:
            raise field_error("input_file_id", str(exc), body.input_file_id) from exc
        if file.purpose != BATCH:
            raise field_error("input_file_id", f"the file's purpose is {file.purpose!r}; upload it for {BATCH!r}")
        if num_active(session, owner) >= MAX_ACTIVE:
            raise ProblemError(429, f"{MAX_ACTIVE} batches of yours have not ended; wait for one, or cancel it")
        row = Batch(
            id=new_batch_id(),
            owner=owner,
            endpoint=body.endpoint,
            input_file_id=file.id,
            completion_window=body.completion_window,
            output_lifetime_s=None if body.output_expires_after is None else body.output_expires_after.seconds,
            notes=body.metadata,
            expires_at=datetime.now(UTC) + timedelta(hours=window_h),
        )
        session.add(row)
        session.flush()
        return row.id

    def create_or_find(session: Session) -> tuple[Batch, bool]:
        batch_id, is_replay = create_once(session, key, lambda: create(session))
        return get_batch(session, batch_id, None), is_replay

    row, is_replay = await service_of(request).write(create_or_find)
    return JSONResponse(_answer(row).model_dump(), headers=replay_headers(is_replay))


@dialect(role=Role.VIEWER, query=PageQuery, answers={200: BatchObjectList}, operation="list_batches")
async def get_batches(request: Request) -> Response:
    """List batches, the newest first."""
    query: PageQuery = request.state.query
    rows, has_more = await service_of(request).read(
        list_batches, seen_by(request), after=query.after, limit=query.limit
    )
    answers = [_answer(row) for row in rows]
    return JSONResponse(BatchObjectList(data=answers, has_more=has_more, **ends_of(answers)).model_dump())


@dialect(role=Role.VIEWER, answers={200: BatchObject}, operation="get_batch")
async def get_one_batch(request: Request) -> Response:
    """Return one batch, with its counts."""
    row = await service_of(request).read(get_batch, request.path_params["batch_id"], seen_by(request))
    return JSONResponse(_answer(row).model_dump())


@dialect(role=Role.SUBMITTER, answers={200: BatchObject}, operation="cancel_batch", problems={409})
async def cancel_batch(request: Request) -> Response:
    """Cancel a batch: what has an answer is in its files, the rest in the file of errors. Repeating changes nothing."""
    row = await service_of(request).write(request_batch_cancel, request.path_params["batch_id"], seen_by(request))
    return JSONResponse(_answer(row).model_dump())


def _answer(row: Batch) -> BatchObject:
    moments = ("created", "in_progress", "expires", "finalizing", "completed", "failed", "expired")
    values: dict[str, Any] = {f"{name}_at": seconds(getattr(row, f"{name}_at")) for name in moments}
    is_stopping = row.state == "finalizing" and row.cancelling_at is not None
    return BatchObject.model_validate(
        {
            **values,
            "id": row.id,
            "endpoint": row.endpoint,
            "errors": None if not row.errors else {"data": row.errors},
            "input_file_id": row.input_file_id,
            "completion_window": row.completion_window,
            "status": "cancelling" if is_stopping else row.state,
            "output_file_id": row.output_file_id,
            "error_file_id": row.error_file_id,
            "cancelling_at": seconds(row.cancelling_at),
            "cancelled_at": seconds(row.cancelled_at),
            "request_counts": {
                "total": row.num_requests,
                "completed": row.num_completed,
                "failed": row.num_failed,
            },
            "usage": {
                "input_tokens": row.num_prompt_tokens,
                "output_tokens": row.num_completion_tokens,
                "total_tokens": row.num_prompt_tokens + row.num_completion_tokens,
            },
            "metadata": row.notes,
        }
    )
