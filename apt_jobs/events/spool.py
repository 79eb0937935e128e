"""The spool: an append-only file of events, one per rank, between training and its supervisor.

Appending is all that training ever pays: no network, no lock, no fsync, no wait for a reader. The file outlives the
rank, so its last events can be read after a kill -9. A line counts once its newline is there.
"""

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from apt_jobs.errors import InvalidInput
from apt_jobs.events.codec import MAX_EVENT_BYTES, decode_spooled, encode_spooled
from apt_jobs.events.kinds import Event

READ_CHUNK_BYTES = 1 << 20


class SpoolWriter:
    """Appends events to one file, up to `max_bytes` of them. One writer per file."""

    def __init__(self, path: Path, max_bytes: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._bytes_left = max_bytes
        self.num_dropped = 0  # events that the disk refused, or that are beyond `max_bytes`

    def append(self, event: Event) -> None:
        """Write one event in one system call. A full disk drops the event and counts it; it never raises."""
        line = encode_spooled(datetime.now(UTC), event)
        if self._bytes_left is not None:
            self._bytes_left = max(self._bytes_left - len(line), -1)
            if self._bytes_left < 0:
                self.num_dropped += 1
                return
        try:
            written = os.write(self._fd, line)
            if written < len(line):  # a full disk can cut a line short: end it, so that the next one is whole
                self.num_dropped += 1
                os.write(self._fd, b"\n")
        except OSError:
            self.num_dropped += 1

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class SpoolReader:
    """Follows one spool file from a byte offset. The file may not exist yet."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path = path
        self.offset = offset  # everything before it was returned

    def read(self) -> Iterator[tuple[datetime, Event]]:
        """Yield the events that were completed since the last call, at most `READ_CHUNK_BYTES` of them.

        `offset` moves past each event as it is yielded.

        Raises:
            InvalidInput: a line is not a spool record; `offset` is already past it.
        """
        try:
            with self._path.open("rb") as file:
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
