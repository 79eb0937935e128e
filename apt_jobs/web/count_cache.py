"""How many jobs there are in each state, counted again only as often as it is cheap: a page asks every two seconds.

A count is kept for a multiple of the time that it took, so all counting of a process takes a small part of one core
however many jobs there are, and a small service always sees the truth.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

COST_SHARE = 0.05  # of the time of one core, for each question
MAX_KEPT_S = 30.0
MAX_KEPT = 100  # questions
WAIT_S = 5.0  # for somebody else's count of the same

Counts = dict[str, int]


class CountCache:
    """Counts by state of the last questions. Thread-safe; one thread counts what several ask for."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, tuple[float, Counts]] = OrderedDict()
        self._counting: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, question: Hashable, count: Callable[[], Counts]) -> Counts:
        """Return the answer that is kept, or `count()`."""
        if (kept := self._fresh(question)) is not None:
            return kept
        with self._lock:
            counting = self._counting.setdefault(question, threading.Lock())
        has_turn = counting.acquire(timeout=WAIT_S)
        try:
            if (kept := self._fresh(question)) is not None:
                return kept
            began_s = time.monotonic()
            counts = count()
            ended_s = time.monotonic()
            keep_s = min(MAX_KEPT_S, (ended_s - began_s) / COST_SHARE)
            with self._lock:
                self._kept[question] = (ended_s + keep_s, counts)
                self._kept.move_to_end(question)
                while len(self._kept) > MAX_KEPT:
                    self._kept.popitem(last=False)
            return counts
        finally:
            if has_turn:
                counting.release()
            with self._lock:
                self._counting.pop(question, None)

    def _fresh(self, question: Hashable) -> Counts | None:
        with self._lock:
            until_s, counts = self._kept.get(question, (0.0, {}))
        return counts if time.monotonic() < until_s else None
