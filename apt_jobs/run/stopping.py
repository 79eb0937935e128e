"""When the ranks stop: all at the same call of `should_stop`, without a collective and without waiting.

The supervisor makes the file `stop`. Each rank writes the number of its call into a slot before it looks for that file.
Whoever sees the file first reads all slots and publishes "stop at call N", beyond the largest of the others. A rank
that did not see the file wrote its slot before, so none has answered False at call N or later, and all answer True
there. On several nodes this needs a shared file system that shows a new file at once.
"""

import contextlib
import os
import struct
from pathlib import Path

_SLOT = struct.Struct("<q")
MAX_RANKS = 65_536
STOPPED = "stopped-by-script"  # in the run folder: a rank was told to stop


class StopAgreement:
    """Of one rank. Children of the rank's process are told as soon as the file is there."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._run_dir, self._rank = run_dir, rank
        self._stop, self._agreed = run_dir / "stop", run_dir / "stop-at"
        self._pid = os.getpid()
        self._num_calls = 0
        self._fd: int | None = None
        self.reason: str | None = None

    def should_stop(self) -> bool:
        """Return whether the rank has to stop at this call."""
        if self.reason is not None:
            return True
        if os.getpid() != self._pid:
            return self._stop.exists()
        self._num_calls += 1
        self._write_slot()
        if not self._stop.exists():
            return False
        if self._num_calls < self._agreed_call():
            return False
        self.reason = self._read(self._stop) or "asked to stop"
        with contextlib.suppress(OSError):
            (self._run_dir / STOPPED).touch()
        return True

    def _write_slot(self) -> None:
        if self._rank >= MAX_RANKS:
            return
        try:
            if self._fd is None:
                self._fd = os.open(self._run_dir / "stop-calls", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.pwrite(self._fd, _SLOT.pack(self._num_calls), self._rank * _SLOT.size)
        except OSError:
            pass  # a full disk: this rank stops at the call at which it sees that others do

    def _agreed_call(self) -> int:
        if not (text := self._read(self._agreed)):
            self._propose(max(self._num_calls, self._calls_of_others() + 1))
            text = self._read(self._agreed)
        return int(text) if text and text.isdecimal() else self._num_calls

    def _calls_of_others(self) -> int:
        """Return the largest number of calls that another rank has begun."""
        if self._fd is None:
            return 0
        slots = os.pread(self._fd, MAX_RANKS * _SLOT.size, 0)
        calls = [number for (number,) in _SLOT.iter_unpack(slots[: len(slots) // _SLOT.size * _SLOT.size])]
        return max((number for rank, number in enumerate(calls) if rank != self._rank), default=0)

    def _propose(self, call: int) -> None:
        """Publish by a link: the first one counts, and it appears whole."""
        mine = self._run_dir / f".stop-at-{self._rank}"
        with contextlib.suppress(OSError):
            mine.write_text(str(call))
            os.link(mine, self._agreed)
        with contextlib.suppress(OSError):
            mine.unlink()

    @staticmethod
    def _read(path: Path) -> str | None:
        try:
            return path.read_text().strip()
        except (OSError, ValueError):
            return None
