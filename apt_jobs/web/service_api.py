"""The service itself: health, queues, workers, API keys, login and logout."""

from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from apt_jobs.db.access import Role, end_session, list_keys, redeem_login_token
from apt_jobs.db.jobs import count_by_state, queue_depths
from apt_jobs.db.models import WorkerRow
from apt_jobs.db.workers import list_workers
from apt_jobs.errors import Denied
from apt_jobs.events.codec import timestamp
from apt_jobs.web.endpoint import endpoint
from apt_jobs.web.guard import SESSION_COOKIE
from apt_jobs.web.payloads import Listing, at, worker_json
from apt_jobs.web.service import service_of

MISSED_HEARTBEATS = 3  # after so many a worker counts as gone


async def get_health(_request: Request) -> Response:
    """The process answers."""
    return JSONResponse({"status": "ok"})


async def get_readiness(request: Request) -> Response:
    """The process can serve: its database answers. 503 otherwise."""
    await service_of(request).read(count_by_state)
    return JSONResponse({"status": "ready"})


@endpoint(role=Role.VIEWER, tag="service", answers={200: Listing})
async def get_queues(request: Request) -> Response:
    """Every queue with its waiting and running jobs and its living workers."""
    service = service_of(request)

    def read(session: Session) -> list[dict[str, object]]:
        depths = queue_depths(session)
        workers = list_workers(session, alive_within_s=MISSED_HEARTBEATS * service.settings.heartbeat_s)
        names = sorted({*depths, *(queue for worker in workers for queue in worker.queues)})
        return [
            {
                "name": name,
                **depths.get(name, {"queued": 0, "running": 0}),
                "num_workers": sum(name in worker.queues for worker in workers),
            }
            for name in names
        ]

    return JSONResponse(Listing(data=await service.read(read)).model_dump(mode="json"))


@endpoint(role=Role.VIEWER, tag="service", answers={200: Listing})
async def get_workers(request: Request) -> Response:
    """Every worker with its GPUs, its current job and its last heartbeat."""
    service = service_of(request)

    def read(session: Session) -> tuple[list[WorkerRow], set[str]]:
        alive = list_workers(session, alive_within_s=MISSED_HEARTBEATS * service.settings.heartbeat_s)
        return list_workers(session), {worker.name for worker in alive}

    rows, alive = await service.read(read)
    data = [worker_json(row, alive=row.name in alive) for row in rows]
    return JSONResponse(Listing(data=data).model_dump(mode="json"))


@endpoint(role=Role.ADMIN, tag="service", answers={200: Listing})
async def get_keys(request: Request) -> Response:
    """Every API key without its secret. Keys are made on the command line: apt-jobs keys create."""
    rows = await service_of(request).read(list_keys)
    data = [
        {
            "id": row.id,
            "name": row.name,
            "role": row.role,
            "created_at": timestamp(row.created_at),
            "expires_at": at(row.expires_at),
            "revoked_at": at(row.revoked_at),
        }
        for row in rows
    ]
    return JSONResponse(Listing(data=data).model_dump(mode="json"))


async def log_in(request: Request) -> Response:
    """Redeem a one-time link for a browser session, and go to the page."""
    service = service_of(request)
    token = request.query_params.get("token", "")
    if not 1 <= len(token) <= 200:
        raise Denied("this login link is not whole; `apt-jobs login-link` prints a new one")
    hours = service.settings.session_hours
    secret = await service.write(redeem_login_token, token, hours)
    response = RedirectResponse("/", 303)
    response.set_cookie(
        SESSION_COOKIE,
        secret,
        max_age=int(hours * 3600),
        path="/",
        httponly=True,
        samesite="strict",
        secure=service.settings.https,
    )
    return response


@endpoint(role=Role.VIEWER, tag="service", answers={204: None})
async def log_out(request: Request) -> Response:
    """End this browser's session."""
    secret = request.cookies.get(SESSION_COOKIE)
    if secret is not None:
        await service_of(request).write(end_session, secret)
    response = Response(status_code=204)
    response.delete_cookie(SESSION_COOKIE, path="/")
    return response
