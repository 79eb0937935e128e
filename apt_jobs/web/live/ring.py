"""The newest blocks of one view of a job, and the cursors of those who watch it.

A watcher is a cursor (`seq`), not a queue. One who keeps up is written to as soon as a block exists; one who does not
reads on from its own position when its socket is empty again, from the ring or the database. So a slow watcher costs
one write of memory, and delays nobody else.
"""

import asyncio
import math
import os
import time
from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

from apt_jobs.events.codec import FRAME_BYTES
from apt_jobs.events.conflation import FOLDED, Conflation
from apt_jobs.web.live.connections import Connection
from apt_jobs.web.live.frames import Batch, Block, View, block_of, blocks_of, chosen, end_block, note

RING_BYTES = 1 << 20  # kept in memory for each view of a watched job
RING_BLOCKS = 4096
GOLDEN_RATIO = (math.sqrt(5.0) - 1.0) / 2.0
HEARTBEAT_S = 5.0  # of silence, then the head is told again
STALL_S = 10.0  # a client that takes nothing for so long is closed
TOO_SLOW = 4408  # close code: come back with ?after=
NORMAL = 1000  # close code


class History(Protocol):
    """Where a ring gets what it no longer has."""

    async def blocks_after(self, view: View, job_id: str, seq: int, head: int) -> Sequence[Block]:
        """Return what follows `seq`, at least in part; empty: nothing is stored, or it cannot be read now."""
        ...


class Ring:
    """Blocks of one view. `head` is the last `seq` that was handed out."""

    def __init__(self, job_id: str, view: View, head: int, history: History) -> None:
        self.job_id, self.view, self.history = job_id, view, history
        self.head = head
        self.caught_up: dict[int, Cursor] = {}  # those at the head whose sockets take frames, by number of the socket
        self.out_of_step: dict[Cursor, None] = {}  # all others
        self._blocks: list[Block] = []
        self._last_seqs: list[int] = []  # of the blocks, for bisection
        self._num_bytes = 0
        self._spoke_at = time.monotonic()
        self._num_fan_outs = 0
        self._held = Conflation()  # for a view with a rate: what waits for its turn
        self._held_to = head  # the last `seq` of it
        self._turn: asyncio.TimerHandle | None = None
        self.end_state: str | None = None  # in which the job has ended; None: it goes on

    def take(self, batches: Sequence[Batch]) -> None:
        """Hand out contiguous batches that follow the head: now, or when it is the view's turn."""
        if self.view.max_rate is None:
            for block in blocks_of(self.view, self.job_id, batches):
                self.append(block)
            return
        is_urgent = False
        for event in chosen(self.view, batches):
            self._held.add(event)
            is_urgent = is_urgent or event["kind"] not in FOLDED
        self._held_to = batches[-1].last_seq
        wait_s = self._spoke_at + 1.0 / self.view.max_rate - time.monotonic()
        if is_urgent or wait_s <= 0:
            self._flush_cursors()
        elif self._turn is None:
            self._turn = asyncio.get_running_loop().call_later(wait_s, self._flush_cursors)

    @property
    def is_watched(self) -> bool:
        return bool(self.caught_up or self.out_of_step)

    def close(self) -> None:
        """Nobody watches any more."""
        if self._turn is not None:
            self._turn.cancel()

    def end(self, state: str) -> None:
        """Send the end of the job to everyone who has all of its events."""
        if self._turn is not None:  # what waits is of no kind that is urgent, and nothing follows it
            self._flush_cursors()
        self.end_state = state
        for cursor in [*self.caught_up.values(), *self.out_of_step]:
            cursor.end_if_over()

    def go_on(self) -> None:
        """Note that the job was queued again."""
        self.end_state = None
        for cursor in [*self.caught_up.values(), *self.out_of_step]:
            cursor.has_ended = False

    def append(self, block: Block) -> None:
        """Keep a block, and write it to everyone who is up to date and has nothing unsent."""
        before = self.head
        self.head = block.last_seq
        self._keep(block)
        if not block.frame:
            for cursor in self.out_of_step:
                if cursor.seq == before:
                    cursor.seq = block.last_seq
            return
        self._spoke_at = time.monotonic()
        others, only = list(self.out_of_step), (block,)
        self._fan_out(block.frame)
        for cursor in others:
            if cursor.connection.ready and cursor.seq == before:
                cursor.seq = block.last_seq
                cursor.connection.write(only)
            cursor.flush()

    def after(self, seq: int) -> list[Block]:
        """Return what follows `seq`, at most `FRAME_BYTES` or one block; empty: it is not in the ring."""
        index = bisect_right(self._last_seqs, seq)
        if index == len(self._blocks) or self._blocks[index].first_seq != seq + 1:
            return []
        found: list[Block] = []
        num_bytes = 0
        for block in self._blocks[index : index + 256]:
            if found and num_bytes + len(block.frame) > FRAME_BYTES:
                break
            found.append(block)
            num_bytes += len(block.frame)
        return found

    def run_maintenance(self) -> None:
        """Once a second: close who takes nothing, tell the head in a silence, try again what failed."""
        is_silent = time.monotonic() - self._spoke_at >= HEARTBEAT_S
        heartbeat = self._heartbeat() if is_silent else None
        for cursor in [*self.caught_up.values(), *self.out_of_step]:
            connection = cursor.connection
            if not connection.ready:
                if connection.stalled_s() > STALL_S:
                    connection.close(TOO_SLOW, "too slow: resume with ?after=")
                continue
            if cursor.seq < self.head:
                cursor.flush()
            if heartbeat is not None and connection.ready and cursor.seq >= self.head:
                connection.write((heartbeat,))
        if is_silent:
            self._spoke_at = time.monotonic()

    def _fan_out(self, frame: bytes) -> None:
        """Write a frame to those who are caught up.

        This runs for each watcher of each event, so it is one system call, and touches nothing of the watcher as long
        as the socket accepts the frame. Each time another one is first, so that nobody is always the last: turns of
        the golden ratio are evenly distributed.
        """
        descriptors, size = list(self.caught_up), len(frame)
        self._num_fan_outs += 1
        first = int(self._num_fan_outs * GOLDEN_RATIO % 1.0 * len(descriptors))
        for descriptor in descriptors[first:] + descriptors[:first]:
            try:
                num_taken = os.write(descriptor, frame)
            except OSError:  # it is full, or broken
                num_taken = 0
            if num_taken < size:
                self.caught_up[descriptor].connection.write_rest(frame[num_taken:])

    def _flush_cursors(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        self.append(block_of(self.view, self.job_id, self.head + 1, self._held_to, self._held.pop()))

    def _heartbeat(self) -> Block:
        owner = {"job_id": self.job_id} if self.view.names_job else {}
        return note(self.view, {**owner, "head": self.head})

    def _keep(self, block: Block) -> None:
        self._blocks.append(block)
        self._last_seqs.append(block.last_seq)
        self._num_bytes += len(block.frame)
        if self._num_bytes <= 2 * RING_BYTES and len(self._blocks) <= 2 * RING_BLOCKS:
            return
        drop = 0  # half of it at once, so that appending stays cheap
        while self._num_bytes > RING_BYTES or len(self._blocks) - drop > RING_BLOCKS:
            if drop == len(self._blocks) - 1:
                break
            self._num_bytes -= len(self._blocks[drop].frame)
            drop += 1
        del self._blocks[:drop], self._last_seqs[:drop]


class Cursor:
    """The place of one watcher in the sequence of one job."""

    def __init__(self, ring: Ring, connection: Connection, seq: int) -> None:
        self.ring, self.connection = ring, connection
        self.has_ended = False  # it was told that the job has
        self.is_in_step = False  # with the ring's head: the ring writes to its socket and does not ask for its place
        self._seq = seq
        self._filling: asyncio.Task[None] | None = None

    @property
    def seq(self) -> int:
        """The last event that it was given."""
        return self.ring.head if self.is_in_step else self._seq

    @seq.setter
    def seq(self, seq: int) -> None:
        assert not self.is_in_step
        self._seq = seq

    def attach(self) -> None:
        """Begin: send what is there already, then follow."""
        self.ring.out_of_step[self] = None
        self.connection.watchers.append(self)
        self.flush()

    def detach(self) -> None:
        """End. Nothing is written afterwards."""
        self.mark_lagging()
        self.ring.out_of_step.pop(self, None)
        if self in self.connection.watchers:
            self.connection.watchers.remove(self)
        if self._filling is not None:
            self._filling.cancel()

    def flush(self) -> None:
        """Write what follows, as long as the connection takes it at once."""
        while self.connection.ready and self.seq < self.ring.head and self._filling is None:
            blocks = self.ring.after(self.seq)
            if not blocks:
                self._filling = asyncio.create_task(self._fill())
                return
            self._write(blocks)
        self._mark_caught_up()
        self.end_if_over()

    def end_if_over(self) -> None:
        """Tell a watcher who has all of an ended job that it is over; close a connection that is for this job alone."""
        state = self.ring.end_state
        if state is None or self.has_ended or not self.connection.ready or self.seq < self.ring.head:
            return
        self.has_ended = True
        view = self.ring.view
        self.connection.write((end_block(view, self.ring.job_id, state),))
        if not view.names_job:
            self.connection.finish(NORMAL, f"the job has ended: {state}")

    def _mark_caught_up(self) -> None:
        """Go in step with the head, once it is reached."""
        descriptor = self.connection.descriptor
        if self.is_in_step or descriptor is None or not self.connection.ready or self._seq != self.ring.head:
            return
        if self in self.ring.out_of_step and descriptor not in self.ring.caught_up:
            self.is_in_step = True
            del self.ring.out_of_step[self]
            self.ring.caught_up[descriptor] = self

    def mark_lagging(self) -> None:
        """From here on the cursor keeps its own position."""
        if self.is_in_step:
            self._seq, self.is_in_step = self.ring.head, False
            assert self.connection.descriptor is not None
            del self.ring.caught_up[self.connection.descriptor]
            self.ring.out_of_step[self] = None

    def _write(self, blocks: Sequence[Block]) -> None:
        self.seq = blocks[-1].last_seq
        if speaking := [block for block in blocks if block.frame]:
            self.connection.write(speaking)

    async def _fill(self) -> None:
        """Read on from the database, once; `run_maintenance` tries again where nothing was found."""
        found: Sequence[Block] = ()
        try:
            found = await self.ring.history.blocks_after(self.ring.view, self.ring.job_id, self.seq, self.ring.head)
        finally:
            self._filling = None
        for block in found:
            if not self.connection.ready or block.first_seq != self.seq + 1:
                break
            self._write([block])
        if found:
            self.flush()
