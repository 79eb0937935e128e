"""`/ws/jobs/{id}?after=seq`: every event of a job once, in order, then live ones.

Subscribe, read the database up to the head, go on live: no gap and no double, whatever restarts meanwhile.
"""

import asyncio
import contextlib
from typing import Any

import orjson
from starlette.websockets import WebSocket, WebSocketDisconnect

from apt_jobs.db.histories import layer_names
from apt_jobs.db.jobs import get_job
from apt_jobs.errors import NotFound
from apt_jobs.web.live_blocks import View
from apt_jobs.web.live_outlets import outlet_of, until_left
from apt_jobs.web.live_ring import STALL_S, TOO_SLOW
from apt_jobs.web.live_streams import JobStream
from apt_jobs.web.payloads import job_json
from apt_jobs.web.service import Service, service_of

MAX_AFTER = 2**53
NO_SUCH_JOB, BAD_REQUEST = 4404, 4400  # close codes


async def watch_job(websocket: WebSocket) -> None:
    """Serve one socket until its client leaves."""
    service = service_of(websocket)
    await websocket.accept()
    after = websocket.query_params.get("after", "0")
    if not after.isdecimal() or int(after) > MAX_AFTER:
        await websocket.close(BAD_REQUEST, f"after={after[:40]!r} must be a whole number from 0 on")
        return
    job_id = websocket.path_params["job_id"]
    try:
        async with service.streams.watch(job_id) as stream:
            await _greet(websocket, service, stream)
            outlet = outlet_of(websocket)
            with stream.cursor(View(), outlet, int(after)):
                await until_left(websocket, outlet, _ignore)
    except NotFound as exc:
        await websocket.close(NO_SUCH_JOB, str(exc)[:120])
    except TimeoutError:
        with contextlib.suppress(Exception):  # the peer does not read; whatever closing raises, it is gone
            await asyncio.wait_for(websocket.close(TOO_SLOW, "too slow: resume with ?after="), 1.0)
    except WebSocketDisconnect:
        return


async def _greet(websocket: WebSocket, service: Service, stream: JobStream) -> None:
    job = await service.read(get_job, stream.job_id)
    layers = await service.read(layer_names, stream.job_id)
    hello = orjson.dumps({"head": stream.head, "job": job_json(job), "layers": layers})
    async with asyncio.timeout(STALL_S):
        await websocket.send_text(hello.decode())


async def _ignore(message: Any) -> None:
    """Clients have nothing to say: it is dropped, at the pace of the protocol's own flow control."""
