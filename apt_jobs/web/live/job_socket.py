"""`/ws/jobs/{id}?after=seq`: every event of a job once, in order, then live ones.

Subscribe, read the database up to the head, go on live: no gap and no double, whatever restarts meanwhile.
"""

import asyncio
import contextlib
from typing import Any, Literal

import orjson
from pydantic import BaseModel, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from apt_jobs.db.jobs import get_job
from apt_jobs.db.series.histories import layer_names
from apt_jobs.errors import NotFound
from apt_jobs.events.binary import SUBPROTOCOL
from apt_jobs.events.kinds import EVENT_TYPES
from apt_jobs.jobs.limits import MAX_SEQ
from apt_jobs.web.live.connections import connection_of, until_left
from apt_jobs.web.live.frames import Form, View
from apt_jobs.web.live.ring import STALL_S, TOO_SLOW
from apt_jobs.web.live.streams import JobStream, streams_of
from apt_jobs.web.problems import ProblemError
from apt_jobs.web.schemas import job_json
from apt_jobs.web.service import Service, service_of

MAX_REASON = 120  # bytes of a close frame
MIN_RATE, MAX_RATE = 0.1, 60.0  # frames a second
NO_SUCH_JOB, BAD_REQUEST = 4404, 4400  # close codes
KINDS = tuple(cls.kind for cls in EVENT_TYPES)
EventKind = Literal[KINDS]  # type: ignore[valid-type]  # the kinds are listed once, in events/kinds.py


class WatchQuery(BaseModel):
    """What a watcher may ask for; unknown parameters are dropped, as by any WebSocket before this one."""

    after: int = Field(0, ge=0, le=MAX_SEQ)
    kind: list[EventKind] = Field(default_factory=list, max_length=len(KINDS))
    max_rate: float | None = Field(None, ge=MIN_RATE, le=MAX_RATE)


async def watch_job(websocket: WebSocket) -> None:
    """Serve one socket until its client leaves or the job ends."""
    service = service_of(websocket)
    form = await accept(websocket)
    try:
        query = WatchQuery.model_validate({**websocket.query_params, "kind": websocket.query_params.getlist("kind")})
    except ValidationError as exc:
        await websocket.close(BAD_REQUEST, fault_of(exc)[:MAX_REASON])
        return
    job_id = websocket.path_params["job_id"]
    view = View(form, frozenset(query.kind), query.max_rate)
    try:
        async with streams_of(websocket).watch(job_id) as stream:
            await send(websocket, await greeting(service, stream))
            connection = connection_of(websocket)
            with stream.cursor(view, connection, query.after):
                await until_left(websocket, connection, _ignore)
    except NotFound as exc:
        await websocket.close(NO_SUCH_JOB, str(exc)[:MAX_REASON])
    except TimeoutError:
        with contextlib.suppress(Exception):  # the peer does not read; whatever closing raises, it is gone
            async with asyncio.timeout(1.0):
                await websocket.close(TOO_SLOW, "too slow: resume with ?after=")
    except WebSocketDisconnect:
        return


async def upgrade_required(_request: Request) -> Response:
    """Say what a request without an upgrade, or whose upgrade a proxy dropped, lacks."""
    raise ProblemError(
        426,
        "this is a WebSocket: send `Connection: Upgrade` and `Upgrade: websocket`, and let proxies pass them on; "
        "without WebSockets, GET /api/jobs/{id}/events with `Accept: text/event-stream`",
        headers={"upgrade": "websocket", "connection": "upgrade"},
    )


async def refuse_unknown(websocket: WebSocket) -> None:
    """Close a WebSocket at an address that has none."""
    await websocket.accept()
    await websocket.close(NO_SUCH_JOB, "no WebSocket at this address; see /ws/jobs and /ws/jobs/{id}")


async def accept(websocket: WebSocket) -> Form:
    """Accept, in the binary form if the client offers it."""
    is_binary = SUBPROTOCOL in websocket.scope.get("subprotocols", ())
    await websocket.accept(SUBPROTOCOL if is_binary else None)
    return Form.BINARY if is_binary else Form.JSON


async def greeting(service: Service, stream: JobStream) -> dict[str, Any]:
    """Return what a watcher must know before the first event.

    Raises:
        NotFound: there is no such job.
    """
    head = stream.head  # before the job is read: what it does not tell comes as an event
    job = await service.read(get_job, stream.job_id)
    layers = await service.read(layer_names, stream.job_id)
    return {"head": head, "job": job_json(job), "layers": layers}


async def send(websocket: WebSocket, message: dict[str, Any]) -> None:
    """Send one message through ASGI.

    Raises:
        TimeoutError: the client does not read.
    """
    async with asyncio.timeout(STALL_S):
        await websocket.send_text(orjson.dumps(message).decode())


def fault_of(exc: ValidationError) -> str:
    """Return the first fault in words: where, what was seen, what is expected."""
    error = exc.errors(include_url=False)[0]
    where = ".".join(map(str, error["loc"])) or "message"
    return f"{where}={str(error['input'])[:40]!r}: {error['msg']}"


async def _ignore(message: Any) -> None:
    """Clients have nothing to say: it is dropped, at the pace of the protocol's own flow control."""
