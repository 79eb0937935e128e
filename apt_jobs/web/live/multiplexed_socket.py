"""`/ws/jobs`: many jobs over one socket. The client subscribes and unsubscribes; each frame says whose events it has.

The sequence of each job is as whole as on a socket of its own; all of them share one connection, in turns.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from apt_jobs.db.listing import list_jobs
from apt_jobs.db.models import Job
from apt_jobs.errors import AptJobsError, Conflict, NotFound
from apt_jobs.jobs.limits import MAX_SEQ
from apt_jobs.jobs.states import TERMINAL_STATES, JobState
from apt_jobs.web.live.connections import Connection, connection_of, until_left
from apt_jobs.web.live.frames import Form, View
from apt_jobs.web.live.job_socket import (
    KINDS,
    MAX_RATE,
    MIN_RATE,
    EventKind,
    accept,
    fault_of,
    greeting,
    send,
)
from apt_jobs.web.live.streams import streams_of
from apt_jobs.web.service import Service, service_of

MAX_SUBSCRIPTIONS = 200  # of one socket
ALL_JOBS = "*"  # every job that has not ended, and every one that comes
LOOK_FOR_JOBS_S = 2.0
LOOKS_AFTER_END = 4  # longer than the database needs to be asked for a lost last event
UNFINISHED = tuple(state for state in JobState if state not in TERMINAL_STATES)


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Subscribe(Message):
    subscribe: str = Field(max_length=40)
    after: int | None = Field(None, ge=0, le=MAX_SEQ)  # None: only what is new
    kinds: list[EventKind] = Field(default_factory=list, max_length=len(KINDS))
    max_rate: float | None = Field(None, ge=MIN_RATE, le=MAX_RATE)


class Unsubscribe(Message):
    unsubscribe: str = Field(max_length=40)


_MESSAGES: TypeAdapter[Subscribe | Unsubscribe] = TypeAdapter(Subscribe | Unsubscribe)


async def watch_jobs(websocket: WebSocket) -> None:
    """Serve one socket until its client leaves."""
    form = await accept(websocket)
    async with AsyncExitStack() as stack:
        connection = connection_of(websocket)
        subscriptions = Subscriptions(websocket, form, connection)
        stack.push_async_callback(subscriptions.close)
        try:
            await until_left(websocket, connection, subscriptions.receive)
        except (WebSocketDisconnect, TimeoutError):
            return


class Subscriptions:
    """What one socket listens to."""

    def __init__(self, websocket: WebSocket, form: Form, connection: Connection) -> None:
        self._websocket, self._form, self._connection = websocket, form, connection
        self._service: Service = service_of(websocket)
        self._streams = streams_of(websocket)
        self._open: dict[str, AsyncExitStack] = {}  # by job id
        self._num_absent: dict[str, int] = {}  # looks in a row that found a followed job ended
        self._looking: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()

    async def receive(self, message: Any) -> None:
        """Do what the client asks, and answer: what is wrong with one message ends no subscription."""
        raw = message.get("text") or message.get("bytes") or b""
        try:
            asked = _MESSAGES.validate_python(orjson.loads(raw))
            async with self._turn:
                if isinstance(asked, Subscribe):
                    await self._subscribe(asked)
                else:
                    await self._unsubscribe(asked.unsubscribe)
        except ValidationError as exc:
            await self._refuse(fault_of(exc))
        except orjson.JSONDecodeError as exc:
            await self._refuse(f"the message is not JSON: {exc}")
        except AptJobsError as exc:
            await self._refuse(str(exc))

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        for job_id in list(self._open):
            await self._open.pop(job_id).aclose()

    async def _subscribe(self, asked: Subscribe) -> None:
        view = View(self._form, frozenset(asked.kinds), asked.max_rate, names_job=True)
        if asked.subscribe != ALL_JOBS:
            await self._follow(asked.subscribe, view, asked.after)
            return
        if self._looking is not None:
            raise Conflict(f"this socket listens to {ALL_JOBS!r} already; unsubscribe first")
        newest = await self._newest(())
        for job in await self._newest(UNFINISHED):
            if job.id not in self._open:
                await self._follow(job.id, view, asked.after)
        await send(self._websocket, {"subscribed": ALL_JOBS, "jobs": sorted(self._open)})
        self._looking = asyncio.create_task(self._look_for_jobs(view, newest[0].id if newest else ""))

    async def _follow(self, job_id: str, view: View, after: int | None) -> None:
        if job_id in self._open:
            raise Conflict(f"this socket listens to {job_id!r} already; unsubscribe first")
        if len(self._open) >= MAX_SUBSCRIPTIONS:
            raise Conflict(f"a socket listens to at most {MAX_SUBSCRIPTIONS} jobs; unsubscribe from others first")
        async with AsyncExitStack() as stack:
            stream = await stack.enter_async_context(self._streams.watch(job_id))
            hello = await greeting(self._service, stream)
            await send(self._websocket, {"job_id": job_id, "subscribed": job_id, **hello})
            place = hello["head"] if after is None else after
            stack.enter_context(stream.cursor(view, self._connection, place))
            self._open[job_id] = stack.pop_all()

    async def _unsubscribe(self, job_id: str) -> None:
        if job_id == ALL_JOBS and self._looking is not None:
            self._looking.cancel()
            self._looking = None
            for followed in list(self._open):
                await self._open.pop(followed).aclose()
        elif (stack := self._open.pop(job_id, None)) is not None:
            await stack.aclose()
        else:
            raise NotFound(f"this socket does not listen to {job_id!r}")
        await send(self._websocket, {"job_id": job_id, "unsubscribed": job_id})

    async def _look_for_jobs(self, view: View, newest_id: str) -> None:
        """Follow each new job from its first event, and leave those that ended."""
        while True:
            await asyncio.sleep(LOOK_FOR_JOBS_S)
            with contextlib.suppress(AptJobsError):  # the database is away: the next look finds as much
                async with self._turn:
                    newest = [job for job in await self._newest(()) if job.id > newest_id]
                    await self._leave_ended()
                    for job in reversed(newest):
                        newest_id = job.id
                        if job.id not in self._open and len(self._open) < MAX_SUBSCRIPTIONS:
                            await self._follow(job.id, view, 0)

    async def _leave_ended(self) -> None:
        unfinished = {job.id for job in await self._newest(UNFINISHED)}
        for job_id in set(self._open) - unfinished:
            self._num_absent[job_id] = self._num_absent.get(job_id, 0) + 1
            if self._num_absent[job_id] > LOOKS_AFTER_END:
                del self._num_absent[job_id]
                await self._open.pop(job_id).aclose()

    async def _newest(self, states: Sequence[str]) -> list[Job]:
        rows, _ = await self._service.read(list_jobs, states=states, limit=MAX_SUBSCRIPTIONS)
        return rows

    async def _refuse(self, detail: str) -> None:
        await send(self._websocket, {"error": detail[:500]})
