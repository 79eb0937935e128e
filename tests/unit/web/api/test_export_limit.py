"""Exports keep a thread busy each: a few are sent at once, also when many are asked for at the same moment."""

import asyncio
from collections.abc import AsyncIterator

from starlette.types import Message, Scope

from apt_jobs.web.api.histories import MAX_EXPORTS, _ExportResponse

SCOPE: Scope = {"type": "http", "asgi": {"spec_version": "2.4"}}


def test_no_more_exports_are_sent_at_once_than_allowed() -> None:
    running, most, done = 0, 0, 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal running, most, done
        running += 1
        most = max(most, running)
        for _ in range(3):
            await asyncio.sleep(0)
            yield b"x"
        running -= 1
        done += 1

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(_: Message) -> None:
        await asyncio.sleep(0)

    async def all_at_once() -> None:
        await asyncio.gather(*(_ExportResponse(body())(SCOPE, receive, send) for _ in range(3 * MAX_EXPORTS)))

    asyncio.run(all_at_once())
    assert (most, done, running) == (MAX_EXPORTS, 3 * MAX_EXPORTS, 0)
