"""How far a preparation is, in the job's log: often enough to see it live, seldom enough to keep the log short."""

import time
from collections.abc import Callable

FIRST_AFTER_S = 2.0
INTERVAL_S = 5.0
_MB = 1e6


class PreparationProgress:
    """Logs bytes done, rate and the time that is left."""

    def __init__(
        self, words: str, num_bytes: int, log: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`words`: the data set; `num_bytes`: of its file; `clock`: seconds."""
        self._words, self._num_bytes, self._log, self._clock = words, num_bytes, log, clock
        self._began_s = clock()
        self._next_s = self._began_s + FIRST_AFTER_S

    def update(self, num_read: int) -> None:
        """Log if it is time."""
        now_s = self._clock()
        if now_s < self._next_s:
            return
        self._next_s = now_s + INTERVAL_S
        rate = num_read / (now_s - self._began_s)
        done = f"{num_read / _MB:,.1f} of {self._num_bytes / _MB:,.1f} MB"
        share = f"{num_read / self._num_bytes:.0%}" if self._num_bytes else "0%"
        left = f", about {(self._num_bytes - num_read) / rate:,.0f} s left" if rate > 0 else ""
        self._log(f"preparing {self._words}: {done} ({share}), {rate / _MB:,.1f} MB/s{left}")

    def finish(self, num_tokens: int, num_documents: int, num_empty: int) -> None:
        """Log what was made."""
        empty = f"; {num_empty:,} empty documents are skipped" if num_empty else ""
        took_s = self._clock() - self._began_s
        documents = "document" if num_documents == 1 else "documents"
        self._log(
            f"prepared {self._words}: {num_documents:,} {documents}, {num_tokens:,} tokens in {took_s:.1f} s{empty}"
        )
