"""The live events of the jobs that browsers watch: one Redis connection a process, one bounded ring a job.

A watcher is a cursor (`seq`), not a queue: it reads the ring from its own place, and what has left the ring from the
database. So a slow watcher costs nothing but its own delay. A hole in `seq` is filled before anyone sees it.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson

from apt_jobs.db.engine import Database
from apt_jobs.db.events import events_after, head_seqs
from apt_jobs.errors import AptJobsError
from apt_jobs.events.codec import encode_frame, splice_stored
from apt_jobs.events.live import LiveSubscriber

logger = logging.getLogger(__name__)

RING_BYTES = 1 << 20  # kept in memory for each watched job
FRAME_EVENTS = 500  # most events of one frame from the database
FRAME_BYTES = 64 << 10  # live frames are merged up to this
HEAD_CHECK_S = 5.0  # how often the database is asked for a lost last event


class JobStream:
    """The newest events of one job as encoded frames."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.head = 0  # last `seq` that watchers can get
        self.num_watchers = 0
        self.ready = asyncio.Event()  # the head was read after Redis confirmed the subscription
        self.filling = asyncio.Lock()
        self._frames: deque[tuple[int, int, bytes]] = deque()  # first seq, last seq, frame
        self._num_bytes = 0
        self._changed = asyncio.Event()

    def append(self, first_seq: int, last_seq: int, frame: bytes) -> None:
        """Add the frame that follows the head."""
        assert first_seq == self.head + 1
        self.head = last_seq
        self._frames.append((first_seq, last_seq, frame))
        self._num_bytes += len(frame)
        while self._num_bytes > RING_BYTES and len(self._frames) > 1:
            self._num_bytes -= len(self._frames.popleft()[2])
        self.wake()

    def start_at(self, head: int) -> None:
        """Begin with an empty ring: what came before is in the database."""
        self._frames.clear()
        self._num_bytes = 0
        self.head = head
        self.wake()

    def wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self, cursor: int, timeout_s: float) -> bool:
        """Wait until there is something after `cursor`; False after `timeout_s` seconds without."""
        if self.head > cursor:
            return True
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except TimeoutError:
            return False
        return self.head > cursor

    def after(self, cursor: int) -> tuple[int, bytes] | None:
        """The last `seq` and the frame of what follows `cursor`; None: it left the ring, or is not there yet."""
        parts: list[bytes] = []
        first, last, size = cursor + 1, cursor, 0
        for first_seq, last_seq, frame in self._frames:
            if last_seq <= cursor:
                continue
            if first_seq != last + 1 or (parts and size + len(frame) > FRAME_BYTES):
                break
            parts.append(frame)
            last = last_seq
            size += len(frame)
        if not parts:
            return None
        return last, parts[0] if len(parts) == 1 else _merged(first, parts)


class LiveStreams:
    """All streams of a process. Run `follow()` and `check_heads()` in one task each."""

    def __init__(self, database: Database, redis_url: str) -> None:
        self._database = database
        self._subscriber = LiveSubscriber(redis_url)
        self._streams: dict[str, JobStream] = {}

    @asynccontextmanager
    async def watch(self, job_id: str) -> AsyncIterator[JobStream]:
        """The stream of a job, subscribed and with a head that was read after the subscription."""
        stream = self._streams.get(job_id)
        if stream is None:
            stream = self._streams[job_id] = JobStream(job_id)
            stream.num_watchers += 1
            await self._subscriber.subscribe(job_id)
            await self._fill(stream)  # also without Redis: the database alone serves, with a delay
        else:
            stream.num_watchers += 1
        try:
            await stream.ready.wait()
            yield stream
        finally:
            stream.num_watchers -= 1
            if stream.num_watchers == 0 and self._streams.get(job_id) is stream:
                del self._streams[job_id]
                await self._subscriber.unsubscribe(job_id)

    async def read_after(self, job_id: str, cursor: int) -> tuple[int, bytes] | None:
        """At most `FRAME_EVENTS` stored events after `cursor` as one frame; None: there are none."""

        def read() -> tuple[int, bytes] | None:
            with self._database.read() as session:
                rows = events_after(session, job_id, cursor, FRAME_EVENTS)
            if not rows:
                return None
            encoded = [splice_stored(row.seq, row.kind, row.attempt, row.at, row.payload) for row in rows]
            return rows[-1].seq, encode_frame(rows[0].seq, encoded)

        return await asyncio.to_thread(read)

    async def follow(self) -> None:
        """Feed the streams from the live wire, for ever."""
        async for job_id, frame in self._subscriber.messages():
            stream = self._streams.get(job_id)
            if stream is None:
                continue
            if frame is None:
                await self._fill(stream)
            else:
                await self._take(stream, frame)

    async def check_heads(self) -> None:
        """Find what the live wire lost without a trace, for ever."""
        while True:
            await asyncio.sleep(HEAD_CHECK_S)
            for stream in list(self._streams.values()):
                await self._fill(stream)

    async def _take(self, stream: JobStream, frame: bytes) -> None:
        first_seq, count = _extent(frame)
        last_seq = first_seq + count - 1
        if not stream.ready.is_set() or last_seq <= stream.head:
            return  # seen already, or the first look into the database will find it
        if first_seq == stream.head + 1:
            stream.append(first_seq, last_seq, frame)
        else:
            await self._fill(stream)

    async def _fill(self, stream: JobStream) -> None:
        """Bring a stream up to what the database has."""
        async with stream.filling:
            try:
                if not stream.ready.is_set():
                    stream.start_at(await self._head(stream.job_id))
                    stream.ready.set()
                    return
                while (found := await self.read_after(stream.job_id, stream.head)) is not None:
                    stream.append(stream.head + 1, *found)
            except AptJobsError as exc:
                logger.warning("a stream could not be filled", extra={"job_id": stream.job_id, "why": str(exc)})

    async def _head(self, job_id: str) -> int:
        def read() -> int:
            with self._database.read() as session:
                return head_seqs(session, [job_id]).get(job_id, 0)

        return await asyncio.to_thread(read)


def _extent(frame: bytes) -> tuple[int, int]:
    """`first_seq` and `count`, which `encode_frame` writes first, so that the events need not be parsed."""
    head = frame[: frame.index(b',"events"')] + b"}"
    envelope = orjson.loads(head)
    return int(envelope["first_seq"]), int(envelope["count"])


def _merged(first_seq: int, frames: list[bytes]) -> bytes:
    """Contiguous frames as one."""
    marker = b'"events":['
    bodies = [frame[frame.index(marker) + len(marker) : -2] for frame in frames]
    count = sum(_extent(frame)[1] for frame in frames)
    return b'{"first_seq":%d,"count":%d,"events":[%b]}' % (first_seq, count, b",".join(bodies))
