"""The live events of the jobs that browsers watch: one Redis connection a process, one ring a view of a job.

What arrives while a fan-out runs becomes one block in the next. A hole in `seq` is filled from the database before
anyone sees it, so every ring is contiguous.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime

from starlette.applications import Starlette
from starlette.requests import HTTPConnection

from apt_jobs.db.engine import Database
from apt_jobs.db.events import head_and_state
from apt_jobs.errors import AptJobsError
from apt_jobs.events.kinds import StateChanged
from apt_jobs.events.live import LiveSubscriber
from apt_jobs.jobs.states import TERMINAL_STATES
from apt_jobs.web.live.backfill import BlockHistory
from apt_jobs.web.live.connections import Connection
from apt_jobs.web.live.frames import Batch, View, batch_of
from apt_jobs.web.live.ring import Cursor, Ring

logger = logging.getLogger(__name__)

HEAD_CHECK_S = 5.0  # how often the database is asked for a lost last event
MAINTENANCE_EVERY_S = 1.0
STATE_EVENT = b'"state"'  # a batch without it has no `state` event: it is not parsed for that


class JobStream:
    """One job: its head, and a ring for each view that someone watches."""

    def __init__(self, job_id: str, history: BlockHistory) -> None:
        self.job_id = job_id
        self.head = 0  # last `seq` that is known
        self.num_watchers = 0
        self.ready = asyncio.Event()  # the head was read after Redis confirmed the subscription
        self.filling = asyncio.Lock()
        self.rings: dict[View, Ring] = {}
        self._history = history
        self._end_state: str | None = None  # as of the head; None: the job goes on
        self._changed = asyncio.Event()
        self._pending: list[Batch] = []  # contiguous, up to the head
        self._handed_out = 0  # the head of the rings

    def start_at(self, head: int, state: str | None) -> None:
        """Begin with nothing in memory: what came before is in the database."""
        self.head = self._handed_out = head
        self._note_state(state)
        self.ready.set()
        self._wake()

    def take(self, batch: Batch) -> None:
        """Add what follows the head; it is handed out with all that comes until the loop gets to it."""
        assert batch.first_seq == self.head + 1
        self.head = batch.last_seq
        if STATE_EVENT in batch.raw:
            for event in batch.events:
                if event["kind"] == StateChanged.kind:
                    self._note_state(event["state"])
        if not self._pending:
            asyncio.get_running_loop().call_soon(self._fan_out)
        self._pending.append(batch)
        self._wake()

    async def changed(self, seq: int, timeout_s: float) -> bool:
        """Wait until there is something after `seq`; False after `timeout_s` seconds without."""
        if self.head > seq:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        return self.head > seq

    @contextmanager
    def cursor(self, view: View, connection: Connection, after: int) -> Iterator[Cursor]:
        """Provide a watcher from `after` on."""
        ring = self.rings.get(view)
        if ring is None:
            ring = self.rings[view] = Ring(self.job_id, view, self._handed_out, self._history)
            if not self._pending:  # else the fan-out says it
                ring.end_state = self._end_state
        cursor = Cursor(ring, connection, after)
        cursor.attach()
        try:
            yield cursor
        finally:
            cursor.detach()
            if not ring.is_watched and self.rings.get(view) is ring:
                del self.rings[view]
                ring.close()

    def run_maintenance(self) -> None:
        for ring in list(self.rings.values()):
            ring.run_maintenance()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _fan_out(self) -> None:
        batches, self._pending = self._pending, []
        self._handed_out = batches[-1].last_seq
        for ring in list(self.rings.values()):
            if ring.end_state is not None and self._end_state is None:
                ring.go_on()
            ring.take(batches)
            if self._end_state is not None:
                ring.end(self._end_state)

    def _note_state(self, state: str | None) -> None:
        self._end_state = state if state in TERMINAL_STATES else None


class LiveStreams:
    """All streams of a process. Run `follow()`, `check_heads()` and `run_maintenance()` in one task each."""

    def __init__(self, database: Database, redis_url: str) -> None:
        self._database = database
        self._history = BlockHistory(database)
        self._subscriber = LiveSubscriber(redis_url)
        self._streams: dict[str, JobStream] = {}
        self.on_live: Callable[[int, datetime], None] = lambda *_: None  # number and oldest of what came live

    @property
    def num_jobs(self) -> int:
        """How many jobs are followed."""
        return len(self._streams)

    @property
    def num_watchers(self) -> int:
        """How many follow them."""
        return sum(stream.num_watchers for stream in list(self._streams.values()))

    @asynccontextmanager
    async def watch(self, job_id: str) -> AsyncIterator[JobStream]:
        """Provide the stream of a job, subscribed and with a head that was read after the subscription."""
        stream = self._streams.get(job_id)
        is_new = stream is None
        if stream is None:
            stream = self._streams[job_id] = JobStream(job_id, self._history)
        stream.num_watchers += 1
        try:
            if is_new:
                await self._subscriber.subscribe(job_id)
                await self._fill(stream)  # also without Redis: the database alone serves, with a delay
            await stream.ready.wait()
            yield stream
        finally:
            stream.num_watchers -= 1
            if stream.num_watchers == 0 and self._streams.get(job_id) is stream:
                del self._streams[job_id]
                await self._subscriber.unsubscribe(job_id)

    async def follow(self) -> None:
        """Feed the streams from the live wire, without end."""
        async for job_id, raw in self._subscriber.messages():
            stream = self._streams.get(job_id)
            if stream is None:
                continue
            if raw is None:
                await self._fill(stream)
            else:
                await self._take(stream, batch_of(raw))

    async def check_heads(self) -> None:
        """Find what the live wire lost without a trace, without end."""
        while True:
            await asyncio.sleep(HEAD_CHECK_S)
            for stream in list(self._streams.values()):
                await self._fill(stream)

    async def run_maintenance(self) -> None:
        """Heartbeats, and the end of clients that do not read, without end."""
        while True:
            await asyncio.sleep(MAINTENANCE_EVERY_S)
            for stream in list(self._streams.values()):
                stream.run_maintenance()

    async def _take(self, stream: JobStream, batch: Batch) -> None:
        if not stream.ready.is_set() or batch.last_seq <= stream.head:
            return  # seen already, or the first look into the database will find it
        self.on_live(batch.last_seq - batch.first_seq + 1, batch.first_at)
        if batch.first_seq == stream.head + 1:
            stream.take(batch)
        else:
            await self._fill(stream)

    async def _fill(self, stream: JobStream) -> None:
        """Bring a stream up to what the database has."""
        async with stream.filling:
            try:
                if not stream.ready.is_set():
                    stream.start_at(*await self._head(stream.job_id))
                    return
                while found := await self._history.batches_after(stream.job_id, stream.head):
                    for batch in found:
                        if batch.first_seq == stream.head + 1:  # the live wire may have been faster meanwhile
                            stream.take(batch)
            except AptJobsError as exc:
                logger.warning("a stream could not be filled", extra={"job_id": stream.job_id, "why": str(exc)})

    async def _head(self, job_id: str) -> tuple[int, str | None]:
        def read() -> tuple[int, str | None]:
            with self._database.read() as session:
                return head_and_state(session, job_id)

        return await asyncio.to_thread(read)


def streams_of(connection: HTTPConnection) -> LiveStreams:
    """Return the live streams of the process that serves a request or a WebSocket."""
    app: Starlette = connection.app
    streams: LiveStreams = app.state.streams
    return streams
