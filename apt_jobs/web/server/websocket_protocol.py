"""uvicorn's WebSocket protocol with a way past ASGI: whole frames go from shared memory straight to the transport.

`apt-jobs web` passes the class as `ws=`. An application finds the connection in `scope["extensions"][EXTENSION]`; under
another server it is not there. A send through ASGI costs a task switch and an encoding per socket, a direct one a
system call.
"""

from typing import Any

from starlette.types import Scope
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState
from websockets.http11 import Request

EXTENSION = "apt_jobs.direct"
CLOSE_GRACE_S = 1.0  # for the close frame to reach a client that does not read


class DirectWebSocketProtocol(WebSocketsSansIOProtocol):
    """One connection. Of ours and uvicorn's frames, each is written whole: they can be mixed."""

    taker: Any = (
        None  # the connection: told when bytes stay unsent (`paused`), are gone (`drained`), or no more go (`lost`)
    )

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if "scope" in vars(self):  # else the handshake was refused
            extensions: dict[Any, Any] = self.scope["extensions"]
            extensions[EXTENSION] = self

    def take(self, taker: Any) -> bool:
        """Tell `taker` whenever bytes are left unsent. Returns whether nothing is unsent now."""
        self.taker = taker
        self.transport.set_write_buffer_limits(high=0)
        return self.transport.get_write_buffer_size() == 0

    def descriptor(self) -> int | None:
        """Return the number of the socket; None if the connection is encrypted.

        It is for `os.write` while nothing is unsent and the connection is not `lost`. What the kernel does not accept
        is for `write_frames`.
        """
        if self.transport.get_extra_info("sslcontext") is not None:
            return None
        number: int = self.transport.get_extra_info("socket").fileno()
        return number

    def write_frames(self, frames: bytes) -> None:
        """Send frames, without waiting."""
        if self.close_sent or self.disconnected or self.transport.is_closing():
            return  # the handler is about to see it
        self.transport.write(frames)

    def give_up(self, code: int, reason: str, grace_s: float = CLOSE_GRACE_S) -> None:
        """Close, and wait at most `grace_s` seconds for the peer: what it has not read by then is dropped."""
        if self.close_sent or self.disconnected or self.transport.is_closing():
            return
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        try:
            self.conn.send_close(code, reason)
        except InvalidState:
            return
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        if self.taker is not None:
            self.taker.lost()
        self.close_timer = self.loop.call_later(grace_s, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.taker is not None:
            self.taker.lost()  # first: the number of the socket may be another's soon
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.taker is not None:
            self.taker.paused()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.taker is not None:
            self.taker.drained()


def has_left(scope: Scope) -> bool:
    """Return whether the client of a WebSocket is known to have gone. Only this protocol can tell."""
    direct = scope.get("extensions", {}).get(EXTENSION)
    return isinstance(direct, DirectWebSocketProtocol) and direct.transport.is_closing()
