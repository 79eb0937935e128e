"""Who is cancelled in the moment in which something arrives is cancelled all the same."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from apt_jobs.db.engine import Database
from apt_jobs.web.live.backfill import BlockHistory
from apt_jobs.web.live.generation_streams import Listener
from apt_jobs.web.live.streams import JobStream

WAIT_S = 60.0


async def cancelled_as_it_arrives(waiting: Coroutine[Any, Any, object], arrive: Callable[[], None]) -> None:
    """Cancel a task in the same turn of the loop in which what it waits for arrives."""
    task = asyncio.ensure_future(waiting)
    for _ in range(3):
        await asyncio.sleep(0)
    arrive()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_listener_to_a_generation_is_cancelled() -> None:
    async def run() -> None:
        listener = Listener("job_a")
        await cancelled_as_it_arrives(listener.messages(WAIT_S), listener._arrived.set)

    asyncio.run(run())


def test_a_watcher_of_a_job_is_cancelled(database: Database) -> None:
    async def run() -> None:
        stream = JobStream("job_a", BlockHistory(database))
        await cancelled_as_it_arrives(stream.changed(0, WAIT_S), lambda: stream.start_at(1, None))

    asyncio.run(run())
