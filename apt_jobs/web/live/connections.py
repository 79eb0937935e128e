"""Connections to watchers, fed by cursors; each holds no more than one write.

`DirectConnection` writes to the transport of `server/websocket_protocol.py`; `PlainConnection` awaits an ASGI send in
a task.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from starlette.websockets import WebSocket, WebSocketDisconnect

from apt_jobs.web.live.frames import Block
from apt_jobs.web.server.websocket_protocol import EXTENSION, DirectWebSocketProtocol

FINISH_GRACE_S = 10.0  # for a slow client to read the last that was written


class Flushable(Protocol):
    """What an connection asks for more: a cursor."""

    def flush(self) -> None: ...

    def mark_lagging(self) -> None:
        """Return whether the connection receives nothing for now."""
        ...


class Connection:
    """A connection. While `ready` is False something is unsent and nothing may be written."""

    def __init__(self) -> None:
        self.ready = True
        self.descriptor: int | None = None  # of a socket that takes frames by `os.write`, while `ready`
        self.watchers: list[Flushable] = []
        self._paused_at = 0.0  # CLOCK_MONOTONIC seconds

    def write(self, blocks: Sequence[Block]) -> None:
        """Send blocks. Only when `ready`; never waits."""
        raise NotImplementedError

    def write_rest(self, rest: bytes) -> None:
        """Send what the socket did not take of a frame."""
        raise NotImplementedError

    def close(self, code: int, reason: str) -> None:
        """End the connection soon, whether or not its client reads."""
        raise NotImplementedError

    def finish(self, code: int, reason: str) -> None:
        """End the connection after what was written, as long as its client reads."""
        raise NotImplementedError

    def stalled_s(self) -> float:
        """For how long nothing could be written."""
        return 0.0 if self.ready else time.monotonic() - self._paused_at

    def paused(self) -> None:
        if self.ready:
            self._paused_at = time.monotonic()
            self.ready = False
            for watcher in self.watchers:
                watcher.mark_lagging()

    def drained(self) -> None:
        """All is sent: each cursor in turn may write, another one first each time."""
        self.ready = True
        if len(self.watchers) > 1:
            self.watchers.append(self.watchers.pop(0))
        for watcher in list(self.watchers):
            if not self.ready:
                return
            watcher.flush()


class DirectConnection(Connection):
    """Writes to the transport; what the kernel does not take at once is the only copy per client."""

    def __init__(self, protocol: DirectWebSocketProtocol) -> None:
        super().__init__()
        self._protocol = protocol
        self.descriptor = protocol.descriptor()
        if not protocol.take(self):
            self.paused()

    def write(self, blocks: Sequence[Block]) -> None:
        frames = blocks[0].frame if len(blocks) == 1 else b"".join([block.frame for block in blocks])
        self._protocol.write_frames(frames)

    def write_rest(self, rest: bytes) -> None:
        self._protocol.write_frames(rest)

    def lost(self) -> None:
        """Note that the connection has ended: nothing may be written any more."""
        self.paused()
        self.descriptor = None

    def close(self, code: int, reason: str) -> None:
        self._protocol.give_up(code, reason)

    def finish(self, code: int, reason: str) -> None:
        self._protocol.give_up(code, reason, FINISH_GRACE_S)


class PlainConnection(Connection):
    """Sends through ASGI, whatever the server. Someone must run `send_loop()`."""

    def __init__(self, send: Callable[[Block], Awaitable[None]], close: Callable[[int, str], Awaitable[None]]) -> None:
        super().__init__()
        self._send, self._close = send, close
        self._blocks: Sequence[Block] = ()
        self._woken = asyncio.Event()
        self._end: tuple[int, str] | None = None

    def write(self, blocks: Sequence[Block]) -> None:
        self.paused()
        self._blocks = blocks
        self._woken.set()

    def close(self, code: int, reason: str) -> None:
        self._end = code, reason
        self._woken.set()

    def finish(self, code: int, reason: str) -> None:
        self.close(code, reason)  # within the turn of the loop in which something was written, that goes first

    async def send_loop(self) -> None:
        """Send what is written, until `close`."""
        while True:
            await self._woken.wait()
            self._woken.clear()
            sending = asyncio.ensure_future(self._send_all(self._blocks))
            self._blocks = ()
            waking = asyncio.ensure_future(self._woken.wait())  # a send that hangs must not outlive `close`
            try:
                await asyncio.wait({sending, waking}, return_when=asyncio.FIRST_COMPLETED)
                if self._end is not None:
                    async with asyncio.timeout(1.0):
                        await self._close(*self._end)
                    return
                await sending
            finally:
                sending.cancel()
                waking.cancel()
                await asyncio.gather(sending, waking, return_exceptions=True)
            self.drained()

    async def _send_all(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            await self._send(block)


def connection_of(websocket: WebSocket) -> DirectConnection | PlainConnection:
    """Return the fastest connection that the server offers for an accepted WebSocket."""
    direct: Any = websocket.scope.get("extensions", {}).get(EXTENSION)
    if isinstance(direct, DirectWebSocketProtocol):
        return DirectConnection(direct)

    async def send(block: Block) -> None:
        if block.is_text:
            await websocket.send_text(block.payload.decode())
        else:
            await websocket.send_bytes(block.payload)

    return PlainConnection(send, websocket.close)


async def until_left(
    websocket: WebSocket, connection: Connection, on_message: Callable[[Any], Awaitable[None]]
) -> None:
    """Serve a socket until its client leaves or is closed; `on_message` gets each of its messages, one at a time."""

    async def listen() -> None:
        while (message := await websocket.receive())["type"] != "websocket.disconnect":
            await on_message(message)

    tasks = {asyncio.ensure_future(listen())}
    if isinstance(connection, PlainConnection):
        tasks.add(asyncio.ensure_future(connection.send_loop()))
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    except (WebSocketDisconnect, TimeoutError):
        return
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
