"""One file that a process writes its output to: read on as it grows, and kept from filling the disk."""

import ctypes
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

READ_BYTES = 1 << 20
MAX_BEHIND_BYTES = 8 << 20  # when more is unread, reading goes on at the end
CAUGHT_UP_BYTES = 2 << 20  # so far before it
KEPT_HEAD_BYTES, KEPT_TAIL_BYTES = 4 << 20, 12 << 20  # of a file; what was read between them is freed
FREE_EVERY_BYTES = 4 << 20
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2  # linux/falloc.h
_LIBC = ctypes.CDLL(None, use_errno=True)


class OutputFile:
    """Follows one file. The process that writes it holds it open, so it can be neither renamed nor cut."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._freed_to = KEPT_HEAD_BYTES
        self._can_free = hasattr(_LIBC, "fallocate")

    def read(self) -> tuple[bytes, int]:
        """Return the next bytes, and how many were left out before them: a writer may be faster than any reader."""
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                num_skipped = 0
                if self._offset > 0 and size - self._offset > MAX_BEHIND_BYTES:
                    num_skipped = size - CAUGHT_UP_BYTES - self._offset
                file.seek(self._offset + num_skipped)
                chunk = file.read(READ_BYTES)
        except OSError:
            return b"", 0
        self._offset += num_skipped + len(chunk)
        self._free()
        return chunk, num_skipped

    def compact(self) -> None:
        """Leave the first and the last bytes of a file that nobody writes any more, with a line between them."""
        try:
            size = self.path.stat().st_size
            num_left_out = size - KEPT_HEAD_BYTES - KEPT_TAIL_BYTES
            if num_left_out <= FREE_EVERY_BYTES:
                return
            temporary = self.path.with_name(f".{self.path.name}")
            with self.path.open("rb") as old, temporary.open("wb") as new:
                new.write(old.read(KEPT_HEAD_BYTES))
                new.write(f"\n[... {num_left_out:,} bytes left out ...]\n".encode())
                old.seek(-KEPT_TAIL_BYTES, os.SEEK_END)
                new.write(old.read())
            temporary.replace(self.path)
        except OSError as exc:
            logger.warning("cannot shorten a log file", extra={"path": str(self.path), "why": str(exc)})

    def _free(self) -> None:
        """Give the disk back what was read, in the middle of the file; its size stays, as the writer goes on there."""
        end = self._offset - KEPT_TAIL_BYTES
        if not self._can_free or end - self._freed_to < FREE_EVERY_BYTES:
            return
        try:
            with self.path.open("r+b") as file:
                mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
                length = ctypes.c_int64(end - self._freed_to)
                if _LIBC.fallocate(file.fileno(), mode, ctypes.c_int64(self._freed_to), length) != 0:
                    raise OSError(ctypes.get_errno(), "the file system frees no part of a file")
        except OSError as exc:
            self._can_free = False
            logger.warning("a log file keeps growing", extra={"path": str(self.path), "why": str(exc)})
            return
        self._freed_to = end
