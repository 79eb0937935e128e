"""What is usual for one number, from its own recent past: median and spread of its logarithm over a sliding window.

Robust by construction: an outlier enters the window only as far as the limit that it broke (winsorised), so that one
does not hide the next, while a lasting change becomes usual after half a window.
"""

import math
from bisect import bisect_left, insort
from collections import deque

FAR_RATIO = 1.6  # beyond the limit by so much it is an outlier at once; by less, when it is so again soon
SOON_STEPS = 3
ZERO_STEPS = 3  # exact zeros in a row of a layer that never had one: it is frozen or cut off


class Window:
    """The newest `size` numbers, and their median."""

    def __init__(self, size: int) -> None:
        self._newest: deque[float] = deque(maxlen=size)
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, value: float) -> None:
        if len(self._newest) == self._newest.maxlen:
            del self._sorted[bisect_left(self._sorted, self._newest[0])]
        self._newest.append(value)
        insort(self._sorted, value)

    @property
    def median(self) -> float:
        return self._sorted[len(self._sorted) // 2]

    def spread(self) -> float:
        """Median absolute deviation from the median."""
        median = self.median
        return sorted(abs(value - median) for value in self._sorted)[len(self._sorted) // 2]

    def last(self, count: int) -> list[float]:
        return list(self._newest)[-count:]


class Baseline:
    """The usual range of one positive number."""

    def __init__(self, window_steps: int, arm_after_steps: int, least_ratio: float, mads: float) -> None:
        self._window = Window(window_steps)
        self._arm_after = arm_after_steps
        self._least, self._mads = math.log(least_ratio), mads
        self.num_low = 0  # steps in a row below the limit of `vanished`
        self._num_zero = 0
        self._had_zeros = False
        self._since_outside = SOON_STEPS  # records since the last one beyond the limit

    def judge(self, value: float) -> float:
        """How far `value` is beyond its usual range, in logs (0: within; negative: below); then remember it.

        A single one that is barely beyond counts as within: among many layers and steps there always is one.
        Zeros are left to `has_vanished`: of a layer that is used now and then they say nothing about its size.
        """
        if not 0.0 < value < math.inf:
            return 0.0
        log = math.log(value)
        beyond = 0.0
        self._since_outside += 1
        if len(self._window) >= self._arm_after:
            deviation = log - self._window.median
            if abs(deviation) > self._least:  # the spread is costly: only when it matters
                limit = self._limit()
                if abs(deviation) > limit:
                    beyond = self._outlier(abs(deviation) - limit) * math.copysign(1.0, deviation)
                    log = self._window.median + math.copysign(limit, deviation)
        self._window.add(log)
        return beyond

    def has_vanished(self, value: float, ratio: float, steps: int) -> bool:
        """Whether the number has been less than its median / `ratio` for `steps` in a row. Call it before `judge`."""
        if len(self._window) < self._arm_after:
            self._had_zeros |= value == 0.0
            return False
        is_low = value * ratio < math.exp(self._window.median)
        if value == 0.0:
            self._num_zero += 1
        else:
            self._had_zeros |= self._num_zero > 0
            self._num_zero = 0
        self.num_low = self.num_low + 1 if is_low else 0
        return self.num_low >= steps or (self._num_zero >= ZERO_STEPS and not self._had_zeros)

    def expected(self) -> tuple[float, float] | None:
        """The usual range; None: not known yet."""
        if len(self._window) < self._arm_after:
            return None
        limit = self._limit()
        return math.exp(self._window.median - limit), math.exp(self._window.median + limit)

    def _outlier(self, excess: float) -> float:
        """`excess` over the limit in logs, or 0 if it is too small to count alone."""
        is_again, self._since_outside = self._since_outside < SOON_STEPS, 0
        return excess if is_again or excess > math.log(FAR_RATIO) else 0.0

    def _limit(self) -> float:
        return max(self._mads * self._window.spread(), self._least)
