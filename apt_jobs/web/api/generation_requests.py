"""A generation job that a request waits for: from its submission to its end, or to the client that leaves.

Both dialects are built on it, `web/api/generation.py` and `web/openai/`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from apt_jobs.db.idempotency import IdempotencyKey, known_resource
from apt_jobs.db.models import Job
from apt_jobs.errors import AptJobsError, Conflict, InvalidReferences
from apt_jobs.jobs.ids import new_job_id
from apt_jobs.jobs.spec import GenerateSpec
from apt_jobs.operations.steer import cancel_job
from apt_jobs.web.api.idempotency import made_job
from apt_jobs.web.api.jobs import require_references, require_worker, submit
from apt_jobs.web.live.generation_streams import (
    Ended,
    GenerationStreams,
    Listener,
    Silence,
    Update,
    generations_of,
    updates,
)
from apt_jobs.web.problems import REFERENCES_DETAIL, ProblemError, reference_faults
from apt_jobs.web.service import Service, service_of

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499  # status of the answer to a client that left: for the log, nobody reads it

Answer = TypeVar("Answer")


class ClientLeft(Exception):
    """Nobody reads the answer any more."""


@dataclass(slots=True, eq=False)
class Generation:
    """A submitted job, and what it becomes. Close it."""

    service: Service
    streams: GenerationStreams
    listener: Listener
    job: Job
    is_replay: bool
    is_kept: bool  # a client that comes back with its Idempotency-Key finds the job: it goes on without the client

    def close(self) -> None:
        """Listen no more."""
        self.streams.forget(self.listener)

    async def updates(self) -> AsyncIterator[Update]:
        """Yield what happens until the end; nothing but silence ends it after `generate_wait_s`.

        Raises:
            ProblemError: 504.
        """
        wait_s = self.service.settings.generate_wait_s
        until_s = time.monotonic() + wait_s
        async for update in updates(self.service, self.listener, look_first=self.is_kept):
            if not isinstance(update, Silence):
                until_s = time.monotonic() + wait_s
            elif time.monotonic() >= until_s:
                raise ProblemError(
                    504, f"job {self.job.id} is not done after {wait_s:.0f} s; it goes on: GET /api/jobs/{self.job.id}"
                )
            yield update

    async def result(self, request: Request) -> dict[str, Any]:
        """Wait for the result.

        Raises:
            JobFailed: the job ended without one.
            ProblemError: 504, it takes too long.
            ClientLeft: the job was cancelled, as nobody waits for it.
        """
        return await self.unless_left(request, self._result())

    async def unless_left(self, request: Request, work: Awaitable[Answer]) -> Answer:
        """Return what `work` returns; a client that leaves ends both, and the job.

        Raises:
            ClientLeft: it has left.
        """
        working = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(_left(request.receive))
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            await self.abandon()
            raise ClientLeft
        finally:
            await _ended(working, leaving)

    async def abandon(self) -> None:
        """Cancel the job: its client has left."""
        if self.is_kept:
            return
        try:
            _, events = await self.service.write(cancel_job, self.job.id, "the client left")
            await self.service.publish(self.job.id, events)
        except Conflict:
            pass  # it has ended meanwhile
        except AptJobsError as exc:
            logger.warning("a job whose client left goes on", extra={"job_id": self.job.id, "why": str(exc)})

    async def _result(self) -> dict[str, Any]:
        async for update in self.updates():
            if isinstance(update, Ended):
                return succeeded(self.job.id, update)
        raise AssertionError("updates end with an end")


class JobFailed(ProblemError):
    """The job ended without a result; `error` is as its row has it."""

    def __init__(self, job_id: str, end: Ended) -> None:
        detail = f"job {job_id} {end.state}: {end.reason or 'no reason was given'}"
        super().__init__(422, detail, kind="job-failed")
        self.end = end


def succeeded(job_id: str, end: Ended) -> dict[str, Any]:
    """Return the result of a job that has one.

    Raises:
        JobFailed: it has none.
    """
    if end.result is None:
        raise JobFailed(job_id, end)
    return end.result


async def begin(request: Request, spec: GenerateSpec, *, is_waited_for: bool = True) -> Generation:
    """Submit a job for this request; with a known `Idempotency-Key` the one that the key made.

    Raises:
        ProblemError: 422 with the field that names what does not exist, 503 without a worker.
        AptJobsError: it cannot be stored.
    """
    service, streams = service_of(request), generations_of(request)
    key: IdempotencyKey | None = getattr(request.state, "idempotency_key", None)
    if key is not None:
        job, is_replay = await _submitted_once(service, spec, key, is_waited_for=is_waited_for)
        return Generation(service, streams, streams.listen(job.id), job, is_replay, is_kept=True)
    listener = streams.listen(new_job_id())  # before the job is stored: it misses nothing
    try:
        job = await service.submissions.submit(listener.job_id, spec, needs_worker=is_waited_for)
    except InvalidReferences as exc:
        streams.forget(listener)
        raise ProblemError(422, REFERENCES_DETAIL, kind="invalid-request", errors=reference_faults(exc)) from exc
    except BaseException:
        streams.forget(listener)
        raise
    return Generation(service, streams, listener, job, is_replay=False, is_kept=False)


async def _submitted_once(
    service: Service, spec: GenerateSpec, key: IdempotencyKey, *, is_waited_for: bool
) -> tuple[Job, bool]:
    if (known := await service.read(known_resource, key)) is not None:
        return await made_job(service, key, known), True
    await require_references(service, spec)
    if is_waited_for:
        await require_worker(service, spec)
    return await submit(service, spec, key)


class EventStreamOfGeneration(Response):
    """Server-sent events of a generation, until its end or the client leaves, which ends the job.

    `events` turns the updates into bytes.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation,
        first: AsyncIterator[Update],
        events: Callable[[AsyncIterator[Update]], AsyncIterator[bytes]],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._generation, self._updates, self._events = generation, first, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            has_ended = writing.done()
            await _ended(writing, leaving)
            self._generation.close()
            if not has_ended:
                await asyncio.shield(self._generation.abandon())

    async def _write(self, send: Send) -> None:
        async for part in self._events(self._updates):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def streamed(
    request: Request,
    generation: Generation,
    events: Callable[[AsyncIterator[Update]], AsyncIterator[bytes]],
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Answer with a stream. A job that fails at once is an answer with its status, as without a stream.

    Raises:
        JobFailed: it did.
        ClientLeft: the client was quicker.
    """
    source = generation.updates()
    first = await generation.unless_left(request, anext(source))
    if isinstance(first, Ended):
        succeeded(generation.job.id, first)
    return EventStreamOfGeneration(generation, _chained(first, source), events, headers)


async def _chained(first: Update, rest: AsyncIterator[Update]) -> AsyncIterator[Update]:
    yield first
    if not isinstance(first, Ended):
        async for update in rest:
            yield update


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
