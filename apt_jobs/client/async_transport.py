"""How AsyncClient sends requests, writes files and follows jobs on an event loop: the I/O, and nothing else.

What is sent is in calls.py, when it is sent again in retry.py, when a job is over in following.py.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK, InvalidHandshake, WebSocketException
from websockets.typing import Subprotocol

from apt_jobs.client import calls
from apt_jobs.client.access import Access
from apt_jobs.client.answers import error_of, json_of, require_event_stream, require_file, unreachable
from apt_jobs.client.calls import Call
from apt_jobs.client.following import (
    MAX_FRAME_BYTES,
    Event,
    Follower,
    ReadEvent,
    SseDecoder,
    closed_error,
    generated_event,
)
from apt_jobs.client.output_file import open_output
from apt_jobs.client.retry import BACKOFF, wait_before_retry_s
from apt_jobs.client.trust import httpx_options, trust_for, websocket_options, why_not_trusted
from apt_jobs.errors import InvalidInput, Unavailable
from apt_jobs.events.binary import SUBPROTOCOL

Answer = TypeVar("Answer")


class AsyncTransport:
    """Connections to one service. Close it, or use it in `async with`."""

    def __init__(self, access: Access, max_retries: int) -> None:
        self._access, self._trust, self._max_retries = access, trust_for(access), max_retries
        self.url, self.browser_url = access.url, access.browser_url
        self._headers = access.headers
        self._http = httpx.AsyncClient(timeout=calls.TIMEOUT_S, **httpx_options(access, self._trust))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _send(self, call: Call[Answer]) -> Answer:
        """Send a request, again where that is safe; its answer."""
        num_failures = 0
        while True:
            outcome = await self._try(call)
            if isinstance(outcome, httpx.Response) and not outcome.is_error:
                return call.read(json_of(outcome))
            num_failures += 1
            wait_s = wait_before_retry_s(
                outcome, num_failures, is_repeatable=call.is_repeatable, max_retries=self._max_retries
            )
            if wait_s is None:
                raise error_of(outcome) if isinstance(outcome, httpx.Response) else unreachable(self.url, outcome)
            await asyncio.sleep(wait_s)

    async def _try(self, call: Call[Any]) -> httpx.Response | httpx.HTTPError:
        try:
            return await self._http.request(
                call.method,
                call.path,
                params=dict(call.params),
                content=call.body,
                headers=dict(call.headers),
                timeout=call.timeout_s,
            )
        except httpx.HTTPError as exc:
            return exc
        except (httpx.InvalidURL, UnicodeError) as exc:  # half a surrogate pair, or megabytes, in a parameter
            raise InvalidInput(f"a parameter of {call.method} {call.path} cannot be sent: {exc}") from exc

    async def _json(self, method: str, path: str, **options: Any) -> Any:
        """Send one request as httpx takes it, once; its answer."""
        try:
            response = await self._http.request(method, path, **options)
        except httpx.HTTPError as exc:
            raise unreachable(self.url, exc) from exc
        return json_of(response)

    async def _download(self, call: Call[None], target: str | os.PathLike[str]) -> int:
        num_bytes = 0
        try:
            async with self._http.stream(
                call.method, call.path, params=dict(call.params), timeout=call.timeout_s
            ) as response:
                if response.is_error:
                    await response.aread()
                require_file(response)
                with open_output(target) as output:
                    async for part in response.aiter_bytes():
                        await asyncio.to_thread(output.write, part)  # disks and readers of FIFOs may be slow
                        num_bytes += len(part)
        except httpx.HTTPError as exc:
            raise unreachable(self.url, exc) from exc
        return num_bytes

    async def _stream(self, call: Call[Any], read: ReadEvent = generated_event) -> AsyncGenerator[dict[str, Any]]:
        """Send a request once; the events of its stream, until the last."""
        headers = {**call.headers, "accept": "text/event-stream"}
        decoder = SseDecoder()
        try:
            async with self._http.stream(
                call.method, call.path, content=call.body, headers=headers, timeout=call.timeout_s
            ) as response:
                if response.is_error:
                    await response.aread()
                require_event_stream(response)
                async for part in response.aiter_bytes():
                    for kind, data in decoder.feed(part):
                        if (event := read(kind, data)) is None:
                            continue
                        yield event
                        if event["kind"] == "end":
                            return
        except httpx.HTTPError as exc:
            raise unreachable(self.url, exc) from exc
        raise Unavailable("the stream broke off before its end; the job goes on or was cancelled")

    async def _follow(self, follower: Follower) -> AsyncIterator[Event]:
        """Connect, read, look at the job when it is due, come back when the connection breaks."""
        while not (follower.is_over or follower.is_expired):
            try:
                if follower.uses_sse:
                    async for event in self._look(follower):
                        yield event
                    if follower.is_over:
                        return
                stream = self._sse_events(follower) if follower.uses_sse else self._socket_events(follower)
                async with aclosing(stream):
                    async for events in stream:
                        for event in events:
                            yield event
                        if follower.is_due_for_a_look and not follower.is_over:
                            async for event in self._look(follower):
                                yield event
                        if follower.is_over or follower.is_expired:
                            return
                async for event in self._look(follower):
                    yield event
                num_failures = follower.note_failure(self.url, ConnectionError("the stream ends early"))
            except httpx.ReadTimeout:
                continue  # a silence of the event stream
            except InvalidHandshake as exc:
                if not follower.uses_sse:  # a proxy or the service refused the upgrade: the stream says why, or works
                    follower.uses_sse = True
                    continue
                num_failures = follower.note_failure(self.url, exc)
            except (OSError, WebSocketException, httpx.HTTPError, Unavailable) as exc:
                if why_not_trusted(exc) is not None:
                    raise unreachable(self.url, exc) from exc
                num_failures = follower.note_failure(self.url, exc)
                follower.uses_sse = False
            if not follower.is_over:
                await asyncio.sleep(min(BACKOFF.wait_s(num_failures), follower.wait_s))

    async def _look(self, follower: Follower) -> AsyncIterator[Event]:
        """Look whether the job has ended; the rest of its log where the stream does not bring it."""
        if not follower.receive_job(await self._send(calls.get_job(follower.job_id))):
            return
        while not follower.is_over:
            call = calls.stored_events(follower.job_id, follower.cursor, follower.kinds)
            for event in follower.receive_page(*await self._send(call)):
                yield event

    async def _socket_events(self, follower: Follower) -> AsyncGenerator[list[Event]]:
        """Yield events of one WebSocket, until it is closed; an empty list after a silence."""
        async with connect(
            f"{self._access.websocket_url}{follower.socket_path}",
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            max_size=MAX_FRAME_BYTES,
            **websocket_options(self._access, self._trust),
        ) as socket:
            while True:
                try:
                    async with asyncio.timeout(follower.wait_s):
                        message = await socket.recv()
                except TimeoutError:
                    yield []
                    continue
                except ConnectionClosedOK:
                    return
                except ConnectionClosed as exc:
                    if (error := closed_error(exc, follower.job_id)) is not None:
                        raise error from exc
                    raise
                yield follower.receive_message(message)

    async def _sse_events(self, follower: Follower) -> AsyncGenerator[list[Event]]:
        """Yield events of one stream of server-sent events, until it ends."""
        headers = {"accept": "text/event-stream"}
        timeout = httpx.Timeout(calls.TIMEOUT_S, read=follower.wait_s)
        decoder = SseDecoder()
        async with self._http.stream("GET", follower.stream_path, headers=headers, timeout=timeout) as response:
            if response.is_error:
                await response.aread()
            require_event_stream(response)
            async for part in response.aiter_bytes():
                for kind, data in decoder.feed(part):
                    yield follower.receive_sse(kind, data)
