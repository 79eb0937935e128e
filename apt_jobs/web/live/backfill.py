"""Stored events as blocks, for cursors that are behind the ring. A crowd that comes back at once shares each block."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence

from apt_jobs.db.engine import Database
from apt_jobs.db.events import events_after
from apt_jobs.errors import AptJobsError
from apt_jobs.events.codec import splice_stored
from apt_jobs.web.live.frames import Batch, Block, View, batches_of, blocks_of

logger = logging.getLogger(__name__)

READ_EVENTS = 256  # of one look into the database
CACHE_BYTES = 16 << 20
MAX_READS = 4  # at once: the other threads of the process are for requests

Key = tuple[str, View, int]  # job, view, the `seq` before the block


class BlockHistory:
    """Reads blocks from the database; the last ones read stay in memory. Events never change, so neither do blocks."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._blocks: OrderedDict[Key, Block] = OrderedDict()
        self._num_bytes = 0
        self._reading: dict[Key, asyncio.Task[list[Block]]] = {}
        self._turns = asyncio.Semaphore(MAX_READS)

    async def blocks_after(self, view: View, job_id: str, seq: int, head: int) -> Sequence[Block]:
        """Return the block after `seq`, or several; empty: there is none, or the database cannot be read."""
        key = job_id, view, seq
        if (block := self._blocks.get(key)) is not None:
            self._blocks.move_to_end(key)
            return (block,)
        task = self._reading.get(key)
        if task is None:
            task = self._reading[key] = asyncio.create_task(self._read(view, job_id, seq, head))
            task.add_done_callback(lambda _: self._reading.pop(key, None))
        try:
            return await asyncio.shield(task)  # one who leaves must not end it for the others
        except AptJobsError as exc:
            logger.warning("a stream could not be filled", extra={"job_id": job_id, "why": str(exc)})
            return ()

    async def batches_after(self, job_id: str, seq: int) -> list[Batch]:
        """Read what is stored after `seq`, at most `READ_EVENTS`, up to a multiple of it, so that readers meet."""
        limit = READ_EVENTS - seq % READ_EVENTS

        def read() -> list[Batch]:
            with self._database.read() as session:
                rows = events_after(session, job_id, seq, limit)
            if not rows:
                return []
            encoded = [splice_stored(row.seq, row.kind, row.attempt, row.at, row.payload) for row in rows]
            return list(batches_of(rows[0].seq, encoded))

        async with self._turns:
            return await asyncio.to_thread(read)

    async def _read(self, view: View, job_id: str, seq: int, head: int) -> list[Block]:
        blocks = blocks_of(view, job_id, await self.batches_after(job_id, seq))
        for block in blocks:
            self._remember((job_id, view, block.first_seq - 1), block)
        return blocks

    def _remember(self, key: Key, block: Block) -> None:
        if key in self._blocks:
            return
        self._blocks[key] = block
        self._num_bytes += len(block.frame)
        while self._num_bytes > CACHE_BYTES:
            _, dropped = self._blocks.popitem(last=False)
            self._num_bytes -= len(dropped.frame)
