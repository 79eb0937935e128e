"""HTTP/1.1 connections that end: uvicorn's own protocol with bounds on silence, on the size of a head, and in number.

Bounds on a head, address included, hold however it is cut into pieces: 431.

uvicorn waits without end for the rest of a request, and for a client that does not read its answer.
"""

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from apt_jobs.web.server.connection_table import ConnectionTable

MAX_HEAD_BYTES = 1 << 16
MAX_HEADERS = 256
LINGER_S, LINGER_BYTES = 1.0, 1 << 20  # for a refusal to be read by who is still sending
SPARE_CONNECTIONS = 64  # beyond the most requests at once, so that those who are too many are told so


class _HeadTooLarge(Exception):
    """Raised within the parser, which then stops."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. `patience_s`: for a head to arrive, and for a client to read a part of the answer."""

    def __init__(self, *, table: ConnectionTable, patience_s: float, **parts: Any) -> None:
        super().__init__(**parts)
        self._table, self._patience_s = table, patience_s
        self._head_due: asyncio.TimerHandle | None = None
        self._read_due: asyncio.TimerHandle | None = None
        self._in_head = False
        self._head_bytes = 0  # as they came, while the head is not whole
        self._field_bytes = 0  # of the address and the fields that the parser found
        self._refusal: HTTPStatus | None = None
        self._num_lingering: int | None = None  # bytes that came after a refusal

    @property
    def address(self) -> str:
        """IP address of the peer; empty for a unix socket."""
        return self.client[0] if self.client else ""

    @property
    def has_shown_key(self) -> bool:
        """Whether the guard found a valid key or session with the newest request."""
        return self.scope is not None and self.scope.get("state", {}).get("principal") is not None

    def drop(self) -> None:
        """End the connection at once."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        if self._table.opened(self, len(self.connections)):
            self._expect_head()
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._head_due)
        _cancel(self._read_due)
        self._table.closed(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._num_lingering is not None:
            self._num_lingering += len(data)
            if self._num_lingering > LINGER_BYTES:
                self.transport.abort()
            return
        super().data_received(data)
        if self._in_head and self._refusal is None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._end(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser stopped at."""
        if self._refusal is not None:
            self._end(self._refusal)
        else:
            super().send_400_response(msg)

    def handle_websocket_upgrade(self) -> None:
        """Hand the connection over; the table counts it no longer, the guard does."""
        self._table.closed(self)
        super().handle_websocket_upgrade()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes, self._field_bytes = True, 0, 0

    def on_url(self, url: bytes) -> None:
        """Bound the address."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Bound the fields, in size and in number."""
        super().on_header(name, value)
        self._count(len(name) + len(value) + len(b": \r\n"))
        if len(self.headers) > MAX_HEADERS:
            self._stop()

    def on_headers_complete(self) -> None:
        self._in_head = False
        _cancel(self._head_due)
        self._table.busy(self)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.pipeline:
            self._table.waiting(self)
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

    def _count(self, num_bytes: int) -> None:
        self._field_bytes += num_bytes
        if self._field_bytes > MAX_HEAD_BYTES:
            self._stop()

    def _stop(self) -> None:
        self._refusal = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        raise _HeadTooLarge

    def _end(self, status: HTTPStatus) -> None:
        self._in_head = False
        if not self.transport.is_closing():
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            self.transport.write(head.encode())
            if status is HTTPStatus.REQUEST_TIMEOUT or not self.transport.can_write_eof():
                self.transport.close()
                return
            self._num_lingering = 0
            self.transport.write_eof()
            self._head_due = self.loop.call_later(LINGER_S, self.transport.abort)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
