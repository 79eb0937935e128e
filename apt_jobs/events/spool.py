"""The spool: an append-only file of events, one per rank, between training and its supervisor.

Appending is all that training ever pays: no network, no lock between processes, no fsync, no wait for a reader. A
thread writes, so that a disk that hangs holds up nobody: `append` waits for it for a moment, and not at all while it
hangs. The file outlives the rank, so its last events can be read after a kill -9. A line counts once its newline is
there.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from apt_jobs.errors import InvalidInput
from apt_jobs.events.codec import MAX_EVENT_BYTES, decode_spooled, encode_spooled
from apt_jobs.events.kinds import Event

READ_CHUNK_BYTES = 1 << 20
PATIENCE_S = 0.001  # for one line to reach the kernel; it takes some microseconds
MAX_UNWRITTEN_BYTES = 16 << 20  # kept while the disk hangs
CLOSE_TIMEOUT_S = 30.0


class SpoolWriter:
    """Append events to one file, up to `max_bytes` of them. One writer per file; threads may share it."""

    def __init__(self, path: Path, max_bytes: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._bytes_left = max_bytes
        self.num_dropped = 0  # events that the disk refused, beyond `max_bytes`, or too many for a hanging disk
        self._changed = threading.Condition()  # guards what follows
        self._unwritten: deque[bytes] = deque()
        self._num_unwritten_bytes = 0
        self._is_slow = False  # the disk hangs: nobody waits for it
        self._is_closed = False
        self._writer = threading.Thread(target=self._write_all, name="spool", daemon=True)
        self._writer.start()

    def append(self, *events: Event) -> None:
        """Write events: when this returns they survive the process, unless writing them took longer than `PATIENCE_S`.

        It never raises, and never waits longer than that. What the disk refuses is dropped and counted. The thread has
        to be woken for each call: events of one moment are better told together.
        """
        now = datetime.now(UTC)
        lines = [encode_spooled(now, event) for event in events]
        with self._changed:
            for line in filter(self._fits, lines):
                if self._num_unwritten_bytes + len(line) > MAX_UNWRITTEN_BYTES:
                    self.num_dropped += 1
                    continue
                self._unwritten.append(line)
                self._num_unwritten_bytes += len(line)
            self._changed.notify_all()
            if not self._is_slow:
                self._is_slow = not self._changed.wait_for(lambda: not self._unwritten, PATIENCE_S)

    def _fits(self, line: bytes) -> bool:
        """Return whether the line is within `max_bytes`. After the first one that is not, none is."""
        if self._bytes_left is None:
            return True
        self._bytes_left = max(self._bytes_left - len(line), -1)
        self.num_dropped += self._bytes_left < 0
        return self._bytes_left >= 0

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unwritten or self._is_closed)
                if not self._unwritten:
                    return
                lines = list(self._unwritten)
            for line in lines:
                is_written = self._write(line)
                with self._changed:
                    self._unwritten.popleft()
                    self._num_unwritten_bytes -= len(line)
                    self.num_dropped += not is_written
                    self._is_slow = self._is_slow and bool(self._unwritten)
                    if not self._unwritten:
                        self._changed.notify_all()

    def _write(self, line: bytes) -> bool:
        """Write with one system call; return whether the disk took the whole line."""
        try:
            written = os.write(self._fd, line)
            if written < len(line):  # a full disk can cut a line short: end it, so that the next one is whole
                os.write(self._fd, b"\n")
        except OSError:
            return False
        return written == len(line)

    def close(self) -> None:
        """Return when all is written, or when the disk hung for `CLOSE_TIMEOUT_S`."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._writer.join(CLOSE_TIMEOUT_S)
        if not self._writer.is_alive():
            os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class SpoolReader:
    """Follow one spool file from a byte offset. The file may not exist yet."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset  # everything before it was returned

    def has_more(self) -> bool:
        """Return whether the file goes on after `offset`, be it with half a line."""
        try:
            return self.path.stat().st_size > self.offset
        except FileNotFoundError:
            return False

    def read(self) -> Iterator[tuple[datetime, Event]]:
        """Yield the events that were completed since the last call, at most `READ_CHUNK_BYTES` of them.

        `offset` moves past each event as it is yielded.

        Raises:
            InvalidInput: a line is not a spool record; `offset` is already past it.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                chunk = file.read(READ_CHUNK_BYTES + MAX_EVENT_BYTES)
        except FileNotFoundError:
            return
        start = 0
        if len(chunk) == READ_CHUNK_BYTES + MAX_EVENT_BYTES and b"\n" not in chunk:
            self.offset += len(chunk)  # its rest is refused as well, and then the next line is read
            raise InvalidInput(f"a spool line has more than {len(chunk):,} bytes; at most {MAX_EVENT_BYTES:,}")
        while (end := chunk.find(b"\n", start)) >= 0:
            line = chunk[start:end]
            start = end + 1
            self.offset += len(line) + 1
            if line:
                yield decode_spooled(line)
