"""The service itself: health, queues, workers, API keys, login and logout."""

import asyncio

from pydantic import Field
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from apt_jobs.db.access import Role, end_session, list_keys, redeem_login_token
from apt_jobs.db.hand_backs import forgive_worker
from apt_jobs.db.queues import Queue, configure_queue, list_queues
from apt_jobs.db.workers import list_workers, pause_of, paused_workers, set_drained
from apt_jobs.errors import Denied, InvalidInput
from apt_jobs.events.codec import timestamp
from apt_jobs.jobs.spec import NAME_PATTERN
from apt_jobs.jobs.strict_model import Strict
from apt_jobs.operations.liveness import alive_within_s
from apt_jobs.settings import Settings
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.guard import session_cookie
from apt_jobs.web.problems import ProblemError
from apt_jobs.web.schemas import KeyAnswer, KeyList, at
from apt_jobs.web.service import service_of
from apt_jobs.web.worker_answers import QueueAnswer, QueueList, WorkerAnswer, WorkerList, worker_answer

EXPOSITION = {kind: {"type": "string"} for kind in ("text/plain", "application/openmetrics-text")}


class QueueBody(Strict):
    max_running: int | None = Field(None, ge=1, le=100_000, description="null: no limit.")
    paused: bool = False


async def get_health(_request: Request) -> Response:
    """Answer that the process is alive."""
    return JSONResponse({"status": "ok"})


async def get_readiness(request: Request) -> Response:
    """Answer whether jobs can be taken: database and broker answer, the disk has room. 503 says what is missing."""
    reason = await service_of(request).readiness.why_not_ready()
    if reason is not None:
        raise ProblemError(503, f"not ready: {reason}", kind="not-ready")
    return JSONResponse({"status": "ready"})


@endpoint(role=Role.VIEWER, tag="service", answers={200: None}, media=EXPOSITION)
async def get_service_metrics(request: Request) -> Response:
    """Return samples for Prometheus: queues, workers, requests and streams. A scraper sends a viewer's key."""
    metrics, accept = service_of(request).metrics, request.headers.get("accept", "")
    text, content_type = await asyncio.to_thread(metrics.exposition, accept)
    return Response(text, media_type=content_type)


@endpoint(role=Role.VIEWER, tag="service", answers={200: QueueList}, operation="list_queues")
async def get_queues(request: Request) -> Response:
    """List every queue with its waiting and running jobs, its limits and its living workers."""
    service = service_of(request)
    answer = QueueList(data=await service.read(_queue_answers, service.settings))
    return JSONResponse(answer.model_dump(mode="json"))


@endpoint(role=Role.ADMIN, tag="service", body=QueueBody, answers={200: QueueAnswer})
async def set_queue(request: Request) -> Response:
    """Limit how many jobs of a queue run at once, or pause it: what runs goes on, nothing new starts."""
    service = service_of(request)
    name, body = request.path_params["name"], request.state.body
    if not NAME_PATTERN.match(name):
        raise InvalidInput(f"{name[:100]!r} is no name of a queue: letters, digits, '.', '_' and '-', at most 100")

    def write(session: Session) -> QueueAnswer:
        configure_queue(session, name, max_running=body.max_running, paused=body.paused)
        return next(answer for answer in _queue_answers(session, service.settings) if answer.name == name)

    answer = await service.write(write)
    service.wake_up_now.set()
    return JSONResponse(answer.model_dump(mode="json"))


@endpoint(role=Role.VIEWER, tag="service", answers={200: WorkerList}, operation="list_workers")
async def get_workers(request: Request) -> Response:
    """List every worker with its GPUs, its current job and its last heartbeat."""
    service = service_of(request)

    def read(session: Session) -> list[WorkerAnswer]:
        alive = {worker.name for worker in list_workers(session, alive_within_s(service.settings))}
        pauses = paused_workers(session)
        return [
            worker_answer(row, alive=row.name in alive, paused_reason=pauses.get(row.name))
            for row in list_workers(session)
        ]

    data = await service.read(read)
    return JSONResponse(WorkerList(data=data).model_dump(mode="json"))


@endpoint(role=Role.ADMIN, tag="service", answers={200: WorkerAnswer})
async def drain_worker(request: Request) -> Response:
    """Have a worker hand back its jobs, with a checkpoint, and claim no other. Repeating it changes nothing."""
    return await _drained(request, drained=True)


@endpoint(role=Role.ADMIN, tag="service", answers={200: WorkerAnswer})
async def resume_worker(request: Request) -> Response:
    """Let a drained or paused worker claim jobs again, also those that it handed back."""
    return await _drained(request, drained=False)


@endpoint(role=Role.ADMIN, tag="service", answers={200: KeyList}, operation="list_keys")
async def get_keys(request: Request) -> Response:
    """List every API key without its secret. Keys are made on the command line: apt-jobs keys create."""
    rows = await service_of(request).read(list_keys)
    data = [
        KeyAnswer(
            id=row.id,
            name=row.name,
            role=row.role,
            created_at=timestamp(row.created_at),
            expires_at=at(row.expires_at),
            revoked_at=at(row.revoked_at),
            last_used_at=at(row.last_used_at),
        )
        for row in rows
    ]
    return JSONResponse(KeyList(data=data).model_dump(mode="json"))


async def log_in(request: Request) -> Response:
    """Redeem a one-time link for a browser session, and go to the page."""
    if request.method != "GET":  # who previews a link asks with HEAD
        raise ProblemError(405, "open the link in a browser", headers={"allow": "GET"})
    service = service_of(request)
    token = request.query_params.get("token", "")
    if not 1 <= len(token) <= 200:
        raise Denied("this login link is not whole; `apt-jobs login-link` prints a new one")
    hours = service.settings.session_hours
    secret = await service.write(redeem_login_token, token, hours)
    response = RedirectResponse("/", 303)
    response.set_cookie(
        session_cookie(service.settings),
        secret,
        max_age=int(hours * 3600),
        path=service.settings.root_path or "/",
        httponly=True,
        samesite="strict",
        secure=service.settings.https,
    )
    return response


@endpoint(role=Role.VIEWER, tag="service", answers={204: None})
async def log_out(request: Request) -> Response:
    """End this browser's session."""
    name = session_cookie(service_of(request).settings)
    secret = request.cookies.get(name)
    if secret is not None:
        await service_of(request).write(end_session, secret)
    response = Response(status_code=204)
    response.delete_cookie(name, path=service_of(request).settings.root_path or "/")
    return response


async def _drained(request: Request, *, drained: bool) -> Response:
    service = service_of(request)
    name = request.path_params["name"]

    def write(session: Session) -> WorkerAnswer:
        row = set_drained(session, name, drained=drained)
        if not drained:
            forgive_worker(session, name)
        alive = {worker.name for worker in list_workers(session, alive_within_s(service.settings))}
        return worker_answer(row, alive=name in alive, paused_reason=pause_of(session, name))

    return JSONResponse((await service.write(write)).model_dump(mode="json"))


def _queue_answers(session: Session, settings: Settings) -> list[QueueAnswer]:
    queues = {queue.name: queue for queue in list_queues(session)}
    workers = list_workers(session, alive_within_s(settings))
    names = sorted({*queues, *(queue for worker in workers for queue in worker.queues)})
    found = [queues.get(name, Queue(name, 0, 0, None, is_paused=False)) for name in names]
    return [
        QueueAnswer(
            name=queue.name,
            queued=queue.queued,
            running=queue.running,
            num_workers=sum(queue.name in worker.queues for worker in workers),
            max_running=queue.max_running,
            paused=queue.is_paused,
        )
        for queue in found
    ]
