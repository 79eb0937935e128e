"""HTTP/1.1 connections that end: uvicorn's own protocol with bounds on silence, on the size of a head, and in number.

uvicorn waits for ever for the rest of a request, and for a client that does not read its answer.
"""

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 1 << 16
SPARE_CONNECTIONS = 64  # beyond the most requests at once, so that those who are too many are told so


class BoundedProtocol(HttpToolsProtocol):
    """One connection. `patience_s`: for a head to arrive, and for a client to read a part of the answer."""

    def __init__(self, *, max_connections: int, patience_s: float, **parts: Any) -> None:
        super().__init__(**parts)
        self._max_connections, self._patience_s = max_connections, patience_s
        self._head_due: asyncio.TimerHandle | None = None
        self._read_due: asyncio.TimerHandle | None = None
        self._in_head = False
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        if len(self.connections) > self._max_connections + SPARE_CONNECTIONS:
            transport.abort()
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._head_due)
        _cancel(self._read_due)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._end(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        _cancel(self._head_due)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_due = self.loop.call_later(self._patience_s, self.transport.abort)

    def resume_writing(self) -> None:
        _cancel(self._read_due)
        super().resume_writing()

    def _expect_head(self) -> None:
        """Also the rest of a body that nobody wants has to be over by then."""
        _cancel(self._head_due)
        self._head_due = self.loop.call_later(self._patience_s, self._give_up)

    def _give_up(self) -> None:
        if self.transport.is_closing():  # it waits for a client that does not read
            self.transport.abort()
        elif self._in_head:
            self._end(HTTPStatus.REQUEST_TIMEOUT)
        else:
            self.transport.close()

    def _end(self, status: HTTPStatus) -> None:
        self._in_head = False
        if not self.transport.is_closing():
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            self.transport.write(head.encode())
            self.transport.close()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
