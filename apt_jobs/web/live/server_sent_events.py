"""`GET /api/jobs/{id}/events` with `Accept: text/event-stream`: the sequence of the WebSocket as server-sent events.

`id:` is the `seq`, so that a browser's EventSource comes back with `Last-Event-ID` and misses nothing.
"""

import asyncio
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from apt_jobs.db.jobs import get_job
from apt_jobs.web.live.connections import PlainConnection
from apt_jobs.web.live.frames import Block, Form, View
from apt_jobs.web.live.streams import LiveStreams, streams_of
from apt_jobs.web.problems import ProblemError
from apt_jobs.web.service import service_of

MAX_SEQ_DIGITS = 16
RETRY_MS = 1000  # how long an EventSource waits before it comes back


def wants_event_stream(request: Request) -> bool:
    """Return whether the client asked for a stream, not for a page of the log."""
    return "text/event-stream" in request.headers.get("accept", "").lower()


async def event_stream(request: Request, after: int, kinds: Sequence[str]) -> Response:
    """Return all events after `Last-Event-ID`, or else after `after`; then live ones.

    Raises:
        NotFound: there is no such job.
        ProblemError: `Last-Event-ID` is none of ours.
    """
    service = service_of(request)
    job = await service.read(get_job, request.path_params["job_id"])
    last_id = request.headers.get("last-event-id")
    if last_id is not None:
        if not last_id.isdecimal() or len(last_id) > MAX_SEQ_DIGITS:
            raise ProblemError(400, f"Last-Event-ID is {last_id[:40]!r}; expected the `id` of an event, a whole number")
        after = int(last_id)
    return EventStream(streams_of(request), job.id, View(Form.SSE, frozenset(kinds)), after)


class EventStream(Response):
    """A response that lasts until its client leaves."""

    media_type = "text/event-stream"

    def __init__(self, streams: LiveStreams, job_id: str, view: View, after: int) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._streams, self._job_id, self._view, self._after = streams, job_id, view, after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(body: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        async def send_block(block: Block) -> None:
            await write(block.payload)

        async def close(code: int, reason: str) -> None:
            await write(b"", more=False)

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await write(b"retry: %d\n\n" % RETRY_MS)
        connection = PlainConnection(send_block, close)
        async with self._streams.watch(self._job_id) as stream:
            with stream.cursor(self._view, connection, self._after):
                await _until_gone(receive, connection)


async def _until_gone(receive: Receive, connection: PlainConnection) -> None:
    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = {asyncio.ensure_future(listen()), asyncio.ensure_future(connection.send_loop())}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
