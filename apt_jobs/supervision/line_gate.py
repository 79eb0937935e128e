"""How many of a process's lines enter the log: the first and the last ones always, and never none for good.

A burst passes; then so many a second; after `FREE_LINES` of an attempt a slower stream, of the newest lines. Where some
were left out a line says how many. The limits are those of an attempt: its ranks share them.
"""

from collections import deque
from dataclasses import dataclass
from datetime import datetime

FIRST_LINES = 2_000  # pass at once
LAST_LINES = 2_000  # are kept, and pass when the process ends
LINES_PER_S = 200.0
FREE_LINES = 20_000  # then:
SLOW_LINES_PER_S = 1.0
MIN_SHARE = 50  # of one of many ranks: first lines, and last ones
BATCH_LINES = 20  # released at once, so that a note of what was left out is not every second line
MAX_LAG_S = 10.0  # lines that would be shown later than that are left out: newer ones are worth more


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a process, or a note on those that are missing before the next one."""

    at: datetime
    text: str
    is_note: bool = False


class LineGate:
    """The lines of one source, which has `1 / num_sources` of the limits."""

    def __init__(self, num_sources: int) -> None:
        self._num_sources = num_sources
        self._tokens = float(max(FIRST_LINES // num_sources, MIN_SHARE))
        self._num_free = max(FREE_LINES // num_sources, MIN_SHARE)
        self._max_held = max(LAST_LINES // num_sources, MIN_SHARE)
        self._ready: list[Line] = []
        self._held: deque[Line] = deque()
        self._num_passed, self._num_dropped, self._num_skipped_bytes = 0, 0, 0
        self._refilled_s: float | None = None

    def add(self, line: Line) -> None:
        """Take a new line; `release` gives it when it may pass."""
        self._held.append(line)
        if len(self._held) == 1 and self._tokens >= 1.0:
            self._pass(1)
        elif len(self._held) > self._max_held:
            self._drop(1)

    def skip(self, num_bytes: int) -> None:
        """Count what was not even read, between the lines added before and those added after."""
        self._drop(len(self._held))
        self._num_skipped_bytes += num_bytes

    def release(self, now_s: float) -> list[Line]:
        """Return the lines that may pass now, oldest first, with notes of what is missing between them."""
        elapsed_s = now_s - self._refilled_s if self._refilled_s is not None else 0.0
        self._refilled_s = now_s
        most = max(self._rate, float(BATCH_LINES))
        self._tokens = max(self._tokens, min(most, self._tokens + elapsed_s * self._rate))
        num_free = int(self._tokens)
        if self._held and num_free >= min(BATCH_LINES, len(self._held)):
            if len(self._held) - num_free > self._rate * MAX_LAG_S:
                self._drop(len(self._held) - num_free)
            self._pass(min(num_free, len(self._held)))
        return self._take_ready()

    def end(self) -> list[Line]:
        """Return all that is held: the last lines."""
        self._pass(len(self._held))
        return self._take_ready()

    @property
    def _rate(self) -> float:
        return (LINES_PER_S if self._num_passed < self._num_free else SLOW_LINES_PER_S) / self._num_sources

    def _drop(self, number: int) -> None:
        for _ in range(number):
            self._held.popleft()
        self._num_dropped += number

    def _pass(self, number: int) -> None:
        if number and (self._num_dropped or self._num_skipped_bytes):
            parts = [f"{self._num_dropped:,} lines"] if self._num_dropped else []
            parts += [f"{self._num_skipped_bytes:,} bytes"] if self._num_skipped_bytes else []
            note = f"{' and '.join(parts)} are left out here: too many came at once"
            self._ready.append(Line(self._held[0].at, note, is_note=True))
            self._num_dropped = self._num_skipped_bytes = 0
        self._ready += [self._held.popleft() for _ in range(number)]
        self._num_passed += number
        self._tokens = max(self._tokens - number, 0.0)

    def _take_ready(self) -> list[Line]:
        ready, self._ready = self._ready, []
        return ready
