"""Ending what is open when its key or session ends: a WebSocket is closed with 4401, an event stream says so and ends.

A request that has not begun to answer is answered with 401; a download breaks off.
"""

import asyncio
from collections.abc import Awaitable, Callable

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apt_jobs.web.server.websocket_protocol import EXTENSION, DirectWebSocketProtocol

DENIED = 4401
MAX_REASON_BYTES = 120  # of a close frame
Refuse = Callable[[Scope, Receive, Send, int, str], Awaitable[None]]


class Revocable:
    """One call of the application that `revoke` ends."""

    def __init__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send, refuse: Refuse) -> None:
        self._app, self._scope, self._receive, self._send, self._refuse = app, scope, receive, send, refuse
        self._reason: str | None = None
        self._task: asyncio.Task[object] | None = None
        self._has_begun = False  # to answer
        self._has_ended = False
        self._is_event_stream = False

    async def run(self) -> None:
        """Serve."""
        self._task = asyncio.current_task()
        try:
            await self._app(self._scope, self._receive, self._noting)
        except asyncio.CancelledError:
            if self._reason is None or self._task is None:
                raise
            self._task.uncancel()
            await self._send_end(self._reason)
        finally:
            self._task = None

    def revoke(self, reason: str) -> None:
        """End it soon."""
        if self._task is None or self._reason is not None:
            return
        self._reason = reason
        direct = self._scope.get("extensions", {}).get(EXTENSION)
        if isinstance(direct, DirectWebSocketProtocol) and self._has_begun:
            direct.give_up(DENIED, close_reason(reason))  # the handler sees that its client has left
        else:
            self._task.cancel()

    async def _noting(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kinds = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
            self._is_event_stream = any(kind.startswith(b"text/event-stream") for kind in kinds)
        self._has_begun = True
        self._has_ended = message["type"] == "websocket.close" or (
            message["type"] == "http.response.body" and not message.get("more_body", False)
        )
        await self._send(message)

    async def _send_end(self, reason: str) -> None:
        if self._has_ended:
            return
        if self._scope["type"] == "websocket":
            if not self._has_begun:
                await self._send({"type": "websocket.accept"})
            await self._send({"type": "websocket.close", "code": DENIED, "reason": close_reason(reason)})
        elif not self._has_begun:
            await self._refuse(self._scope, self._receive, self._send, 401, reason)
        elif self._is_event_stream:
            data = orjson.dumps({"kind": "denied", "status": 401, "detail": reason})
            await self._send({"type": "http.response.body", "body": b"event: denied\ndata: %b\n\n" % data})


def close_reason(text: str) -> str:
    """Return as much of a text as a close frame holds, in whole characters."""
    return text.encode("utf-8", "replace")[:MAX_REASON_BYTES].decode("utf-8", "ignore")
