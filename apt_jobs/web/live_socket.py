"""`/ws/jobs/{id}?after=seq`: every event of a job once, in order, then live ones.

Subscribe, read the database up to the head, go on live: no gap and no double, whatever restarts meanwhile.
"""

import asyncio
import contextlib

import orjson
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from apt_jobs.db.histories import layer_names
from apt_jobs.db.jobs import get_job
from apt_jobs.errors import NotFound
from apt_jobs.web.live_streams import JobStream
from apt_jobs.web.payloads import job_json
from apt_jobs.web.service import Service, service_of

HEARTBEAT_S = 5.0  # of silence, then the head is told again
SEND_TIMEOUT_S = 10.0  # a client that does not read for so long is closed
MAX_AFTER = 2**53
NO_SUCH_JOB, BAD_REQUEST, TOO_SLOW = 4404, 4400, 4408  # close codes


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
            await _serve(websocket, service, stream, int(after))
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
    await _send(websocket, orjson.dumps({"head": stream.head, "job": job_json(job), "layers": layers}))


async def _serve(websocket: WebSocket, service: Service, stream: JobStream, cursor: int) -> None:
    leaving = asyncio.create_task(_wait_for_leaving(websocket))
    try:
        while not leaving.done():
            found = stream.after(cursor)
            if found is None and cursor < stream.head:
                found = await service.streams.read_after(stream.job_id, cursor)
            if found is not None:
                cursor, frame = found
                await _send(websocket, frame)
            elif not await _changed_or_left(stream, cursor, leaving):
                await _send(websocket, orjson.dumps({"head": stream.head}))
    finally:
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)


async def _changed_or_left(stream: JobStream, cursor: int, leaving: "asyncio.Task[None]") -> bool:
    """Wait for news or for the client to leave; False: silence for `HEARTBEAT_S`."""
    changed = asyncio.create_task(stream.changed(cursor, HEARTBEAT_S))
    await asyncio.wait({changed, leaving}, return_when=asyncio.FIRST_COMPLETED)
    if changed.done():
        return changed.result()
    changed.cancel()
    await asyncio.gather(changed, return_exceptions=True)
    return True


async def _wait_for_leaving(websocket: WebSocket) -> None:
    """Clients have nothing to say: whatever they send is dropped, at the pace of the protocol's own flow control."""
    while websocket.client_state is WebSocketState.CONNECTED:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return


async def _send(websocket: WebSocket, frame: bytes) -> None:
    async with asyncio.timeout(SEND_TIMEOUT_S):
        await websocket.send_text(frame.decode())
