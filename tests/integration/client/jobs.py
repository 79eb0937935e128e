"""Jobs of a service that a test is the worker of: how they end; and both clients as one."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import update

from apt_jobs.client import AsyncClient, Client
from apt_jobs.db.jobs import finish
from apt_jobs.db.models import Job
from apt_jobs.jobs.states import JobState
from tests.integration.web.served import Served

Follow = Callable[..., list[dict[str, Any]]]


def end_job(served: Served, job_id: str, state: JobState = JobState.SUCCEEDED, reason: str | None = None) -> None:
    """End a running job as its worker does, with the event."""
    with served.database.write() as session:
        stored = finish(session, job_id, 1, state, reason=reason)
    served.publisher.publish(job_id, stored)


def alter_job(served: Served, job_id: str, **columns: Any) -> None:
    """Change a row as no request can: as an import or an older service may have left it."""
    with served.database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(**columns))


def url_of(served: Served, scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{served.settings.port}"


def follow_sync(url: str, key: str, job_id: str, after: int = 0, kinds: Sequence[str] = ()) -> list[dict[str, Any]]:
    """All events of a job, to its end."""
    with Client(url, key) as client:
        return list(client.events(job_id, after, kinds))


def follow_async(url: str, key: str, job_id: str, after: int = 0, kinds: Sequence[str] = ()) -> list[dict[str, Any]]:
    """All events of a job, to its end."""

    async def follow() -> list[dict[str, Any]]:
        async with AsyncClient(url, key) as client:
            return [event async for event in client.events(job_id, after, kinds)]

    return asyncio.run(follow())
