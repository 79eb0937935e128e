"""`/api/webhooks`: who is sent word of what, the log of deliveries, a test and a replay. For administrators only."""

import asyncio
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, field_validator
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.db.access import Role
from apt_jobs.db.idempotency import create_once
from apt_jobs.db.webhook_models import Delivery, Webhook
from apt_jobs.db.webhook_outbox import enqueue_test
from apt_jobs.db.webhooks import (
    delete_webhook,
    get_webhook,
    list_deliveries,
    list_webhooks,
    num_waiting,
    replay_delivery,
)
from apt_jobs.errors import InvalidInput
from apt_jobs.events.codec import timestamp
from apt_jobs.jobs.job_filter import MAX_CHARS
from apt_jobs.jobs.webhook_events import WEBHOOK_EVENTS, WebhookEvent
from apt_jobs.operations.webhooks import WebhookValues, change_webhook, check_values, create_webhook
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.api.idempotency import replay_headers
from apt_jobs.web.service import service_of

MAX_QUEUE_ABOVE = 1_000_000
DeliveryState = Literal["waiting", "delivered", "failed"]
TargetKind = Literal["webhook", "apprise"]
WebhookName = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
TargetUrl = Annotated[str, StringConstraints(min_length=1, max_length=2_000)]
FilterText = Annotated[str, StringConstraints(max_length=MAX_CHARS)]
Events = Annotated[list[WebhookEvent], Field(min_length=1, max_length=len(get_args(WebhookEvent)))]
_FILTER = (
    "Only of jobs that it matches, as `filter` of `GET /api/jobs`. Events without a job are compared by the "
    "terms about queue, kind, label and schedule, as far as they have them."
)
_QUEUE_ABOVE = "`queue.too_long` is sent when more jobs than this wait in a queue; given with that event only."
_KEY = "Key of the signatures: `whsec_` and 24 to 64 bytes in base64. Default: a random one."


class WebhookBody(BaseModel):
    """A target, and what it is sent."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    name: WebhookName
    kind: TargetKind = Field(
        "webhook", description="`webhook`: JSON by POST, signed as Standard Webhooks; `apprise`: a chat or mailbox."
    )
    url: TargetUrl = Field(description="`https://...`, or a URL of apprise, which no answer shows.")
    secret: SecretStr | None = Field(None, description=_KEY)
    events: Events
    filter: FilterText | None = Field(None, description=_FILTER)
    queue_above: int | None = Field(None, ge=0, le=MAX_QUEUE_ABOVE, description=_QUEUE_ABOVE)

    _once = field_validator("events")(lambda events: sorted(set(events), key=WEBHOOK_EVENTS.index))


class WebhookPatch(BaseModel):
    """What to change of a webhook; what is left out stays, null removes."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    name: WebhookName = ""
    url: TargetUrl = ""
    events: Events = Field(default_factory=list)
    filter: FilterText | None = Field(None, description=_FILTER)
    queue_above: int | None = Field(None, ge=0, le=MAX_QUEUE_ABOVE, description=_QUEUE_ABOVE)
    enabled: bool = Field(True, description="Of a disabled one, nothing is sent and nothing is kept to be sent.")

    _once = field_validator("events")(lambda events: sorted(set(events), key=WEBHOOK_EVENTS.index))


class WebhookAnswer(BaseModel):
    object: Literal["webhook"] = "webhook"
    id: str
    name: str
    kind: TargetKind
    url: str | None = Field(description="null for apprise: it is a secret.")
    events: list[WebhookEvent]
    filter: str | None
    queue_above: int | None
    enabled: bool
    disabled_reason: str | None = Field(description="Why it is not enabled: an administrator, or a target that fails.")
    created_at: str
    failing_since_at: str | None = Field(description="First failure after the last success.")
    num_waiting: int = Field(description="Deliveries that are not over.")


class NewWebhookAnswer(WebhookAnswer):
    secret: str | None = Field(description="Key of the signatures. Nothing shows it again; null for apprise.")


class WebhookList(BaseModel):
    object: Literal["list"] = "list"
    data: list[WebhookAnswer]
    has_more: bool = False


class DeliveryAnswer(BaseModel):
    object: Literal["webhook_delivery"] = "webhook_delivery"
    id: str = Field(description="The `webhook-id` of the message, the same at every try.")
    webhook_id: str
    event: str
    state: DeliveryState
    created_at: str
    next_try_at: str | None = Field(description="null: it is over.")
    num_tries: int
    ended_at: str | None
    status: int | None = Field(description="HTTP status of the last try.")
    duration_ms: int | None
    error: str | None = Field(description="Why the last try failed.")
    answer: str | None = Field(description="Beginning of the body of the last answer.")
    body: str = Field(description="What is sent.")


class DeliveryList(BaseModel):
    object: Literal["list"] = "list"
    data: list[DeliveryAnswer]
    has_more: bool


class DeliveriesQuery(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    state: DeliveryState | None = Field(None, description="Only those in this state.")
    after: Annotated[str, StringConstraints(max_length=40)] | None = Field(None, description="Last id seen.")
    limit: int = Field(50, ge=1, le=200)


@endpoint(role=Role.ADMIN, tag="webhooks", answers={200: WebhookList}, operation="list_webhooks")
async def get_webhooks(request: Request) -> Response:
    """List webhooks, oldest first."""

    def read(session: Session) -> WebhookList:
        rows = list_webhooks(session)
        waiting = num_waiting(session, [row.id for row in rows])
        return WebhookList(data=[_answer(row, waiting.get(row.id, 0)) for row in rows])

    answer = await service_of(request).read(read)
    return JSONResponse(answer.model_dump(mode="json"))


@endpoint(
    role=Role.ADMIN,
    tag="webhooks",
    body=WebhookBody,
    answers={201: NewWebhookAnswer},
    problems={409},
    creates=True,
    operation="create_webhook",
)
async def add_webhook(request: Request) -> Response:
    """Add a webhook. This answer, and no later one, has the key of its signatures."""
    service, body = service_of(request), request.state.body
    values = WebhookValues(body.name, body.kind, body.url, body.events, body.filter, body.queue_above)
    await asyncio.to_thread(check_values, service.settings, values)
    own = None if body.secret is None else body.secret.get_secret_value()

    def write(session: Session) -> tuple[NewWebhookAnswer, bool]:
        secret: str | None = None

        def create() -> str:
            nonlocal secret
            row, secret = create_webhook(session, service.settings, values, own)
            return row.id

        webhook_id, is_replay = create_once(session, request.state.idempotency_key, create)
        answer = _whole(session, webhook_id)
        return NewWebhookAnswer(**answer.model_dump(), secret=secret), is_replay

    answer, is_replay = await service.write(write)
    headers = {"location": f"/api/webhooks/{answer.id}", **replay_headers(is_replay)}
    return JSONResponse(answer.model_dump(mode="json"), 201, headers=headers)


@endpoint(role=Role.ADMIN, tag="webhooks", answers={200: WebhookAnswer}, operation="get_webhook")
async def get_one_webhook(request: Request) -> Response:
    """Return one webhook."""
    answer = await service_of(request).read(_whole, request.path_params["webhook_id"])
    return JSONResponse(answer.model_dump(mode="json"))


@endpoint(role=Role.ADMIN, tag="webhooks", body=WebhookPatch, answers={200: WebhookAnswer})
async def update_webhook(request: Request) -> Response:
    """Change a webhook, or disable or enable it."""
    service, webhook_id = service_of(request), request.path_params["webhook_id"]
    changes = request.state.body.model_dump(exclude_unset=True)
    if not changes:
        raise InvalidInput(f"there is nothing to change; set one of {', '.join(WebhookPatch.model_fields)}")

    def merged_values(session: Session) -> tuple[WebhookValues, bool]:
        row = get_webhook(session, webhook_id)
        old = {"name": row.name, "url": row.url, "events": row.events, "filter": row.filter}
        merged = {**old, "queue_above": row.queue_above, "enabled": row.disabled_at is None, **changes}
        is_enabled = merged.pop("enabled")
        return WebhookValues(kind="apprise" if row.kind == "apprise" else "webhook", **merged), is_enabled

    def write(session: Session) -> WebhookAnswer:
        values, is_enabled = merged_values(session)
        change_webhook(session, service.settings, webhook_id, values, is_enabled=is_enabled)
        return _whole(session, webhook_id)

    values, _ = await service.read(merged_values)
    await asyncio.to_thread(check_values, service.settings, values)
    answer = await service.write(write)
    return JSONResponse(answer.model_dump(mode="json"))


@endpoint(role=Role.ADMIN, tag="webhooks", answers={204: None}, operation="delete_webhook")
async def remove_webhook(request: Request) -> Response:
    """Delete a webhook, with its log and what waits to be sent."""
    await service_of(request).write(delete_webhook, request.path_params["webhook_id"])
    return Response(status_code=204)


@endpoint(role=Role.ADMIN, tag="webhooks", answers={202: DeliveryAnswer})
async def test_webhook(request: Request) -> Response:
    """Send a `webhook.test` event, also to a disabled target. The log shows within seconds what came of it."""
    webhook_id = request.path_params["webhook_id"]

    def write(session: Session) -> DeliveryAnswer:
        return _delivery(enqueue_test(session, get_webhook(session, webhook_id)))

    answer = await service_of(request).write(write)
    return JSONResponse(answer.model_dump(mode="json"), 202)


@endpoint(
    role=Role.ADMIN,
    tag="webhooks",
    query=DeliveriesQuery,
    answers={200: DeliveryList},
    operation="list_webhook_deliveries",
)
async def get_deliveries(request: Request) -> Response:
    """List the deliveries of a webhook, newest first. `APT_JOBS_WEBHOOK_DAYS` says for how long they are kept."""
    query: DeliveriesQuery = request.state.query
    webhook_id = request.path_params["webhook_id"]

    def read(session: Session) -> DeliveryList:
        rows, has_more = list_deliveries(session, webhook_id, state=query.state, after=query.after, limit=query.limit)
        return DeliveryList(data=[_delivery(row) for row in rows], has_more=has_more)

    answer = await service_of(request).read(read)
    return JSONResponse(answer.model_dump(mode="json"))


@endpoint(
    role=Role.ADMIN,
    tag="webhooks",
    answers={202: DeliveryAnswer},
    problems={409},
    operation="replay_webhook_delivery",
)
async def replay(request: Request) -> Response:
    """Send a message of the log again, with its id: a receiver that has it may leave the copy out."""
    webhook_id, delivery_id = request.path_params["webhook_id"], request.path_params["delivery_id"]
    row = await service_of(request).write(replay_delivery, webhook_id, delivery_id)
    return JSONResponse(_delivery(row).model_dump(mode="json"), 202)


def _whole(session: Session, webhook_id: str) -> WebhookAnswer:
    row = get_webhook(session, webhook_id)
    return _answer(row, num_waiting(session, [row.id]).get(row.id, 0))


def _answer(row: Webhook, waiting: int) -> WebhookAnswer:
    return WebhookAnswer(
        id=row.id,
        name=row.name,
        kind="apprise" if row.kind == "apprise" else "webhook",
        url=row.url,
        events=[event for event in WEBHOOK_EVENTS if event in row.events],
        filter=row.filter,
        queue_above=row.queue_above,
        enabled=row.disabled_at is None,
        disabled_reason=row.disabled_reason,
        created_at=timestamp(row.created_at),
        failing_since_at=None if row.failing_since_at is None else timestamp(row.failing_since_at),
        num_waiting=waiting,
    )


def _delivery(row: Delivery) -> DeliveryAnswer:
    is_over = row.state != "waiting"
    return DeliveryAnswer(
        id=row.id,
        webhook_id=row.webhook_id,
        event=row.event,
        state="waiting" if not is_over else "delivered" if row.state == "delivered" else "failed",
        created_at=timestamp(row.created_at),
        next_try_at=None if is_over else timestamp(row.next_try_at),
        num_tries=row.num_tries,
        ended_at=None if row.ended_at is None else timestamp(row.ended_at),
        status=row.status,
        duration_ms=row.duration_ms,
        error=row.error,
        answer=row.answer,
        body=row.body,
    )
