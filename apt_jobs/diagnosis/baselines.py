"""Learn the usual range of one number, from the errors of a robust forecast of its logarithm.

With x_t = log of the value at step t:
- forecast f_t = median(x_{t-15} .. x_{t-1}): it follows slow drift, as norms have while a model begins to learn;
- error e_t = x_t - f_t, judged by the median size of the errors in a window (a robust scale, as the MAD);
- limit = w * max(`block_spike_mads` * median|e|, log(`spike_ratio`)), where w falls from
  1.5 to 1 while the window fills, since few errors, all from a calm beginning, say little;
- a second, narrower limit is for e_t less the median error of the other layers of the block: when all layers of a
  block jump together, little of it is this layer's own.

Robust by construction: an outlier enters the window clipped at the limit that it broke (winsorised), and the forecast
not at all, so that one does not hide the next, while a lasting change becomes usual after half a window. Window,
winsorising and the floor in logs were chosen on recorded trainings; docs/explanation/monitor_benchmarks.md compares
other rules.
"""

import math
from bisect import bisect_left, insort
from collections import deque

from apt_jobs.jobs.monitor_options import MonitorOptions

FAR_RATIO = 1.6  # beyond the limit by so much it is an outlier at once; by less, when it is so again soon
SOON_STEPS = 3
FORECAST_STEPS = 15  # newest records whose median is the forecast
MIN_FORECAST_STEPS = 4
YOUNG_MARGIN = 0.5  # limits are wider by so much of themselves at first, and by nothing when the window is full
ZERO_STEPS = 3  # exact zeros in a row of a layer that never had one: it is frozen or cut off


class Window:
    """The newest `size` numbers, kept sorted for their median."""

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

    def mad(self) -> float:
        """Return the median absolute deviation from the median."""
        median = self.median
        return sorted(abs(value - median) for value in self._sorted)[len(self._sorted) // 2]


class Baseline:
    """The usual range of one positive number."""

    def __init__(self, options: MonitorOptions) -> None:
        window_steps = options.window_steps
        self._past = Window(window_steps)  # logs
        self._newest = Window(FORECAST_STEPS)  # logs
        self._errors = Window(window_steps)  # sizes of the errors of forecasts
        self._own_errors = Window(window_steps)  # and of what companions do not share
        self._window_steps = window_steps
        self._arm_after = max(options.arm_after_steps, MIN_FORECAST_STEPS + 1)  # one error at least
        self._min_limit = math.log(options.spike_ratio)
        self._mads, self._own_mads = options.block_spike_mads, options.spike_mads
        self._usual: tuple[float, float] | None = None  # the range of logs that the last record was judged by
        self.num_low = 0  # steps in a row below the limit of `vanished`
        self._num_zero = 0
        self._had_zeros = False
        self._since_outside = SOON_STEPS  # records since the last one beyond the limit

    def error(self, value: float) -> float | None:
        """Return the log of `value` less its forecast; None if it is not positive, or there is no forecast yet."""
        if not 0.0 < value < math.inf or len(self._newest) < MIN_FORECAST_STEPS:
            return None
        return math.log(value) - self._newest.median

    def judge(self, value: float, error: float | None, shared: float) -> float:
        """Return how far `value` is beyond its usual range, in logs (0: within; negative: below), and remember it.

        `error` is that of its forecast, and `shared` the part of it that its companions have too. A single one that is
        barely beyond counts as within: among many layers and steps there always is one. Zeros are left to
        `has_vanished`: of a layer that is used now and then they say nothing about its size.
        """
        if not 0.0 < value < math.inf:
            return 0.0
        log = math.log(value)
        if error is None:
            self._remember(log)
            return 0.0
        limit = own_limit = math.inf
        beyond, kept = 0.0, log
        self._since_outside += 1
        if len(self._past) >= self._arm_after:
            widened = 1.0 + YOUNG_MARGIN * (1.0 - len(self._past) / self._window_steps)
            limit = max(widened * self._mads * self._errors.median, self._min_limit)
            own_limit = max(widened * self._own_mads * self._own_errors.median, self._min_limit)
            below = min(limit, max(own_limit - shared, self._min_limit))
            above = min(limit, max(own_limit + shared, self._min_limit))
            self._usual = log - error - below, log - error + above
            excess = max(-error - below, error - above)
            if excess > 0.0:
                beyond = math.copysign(self._outlier(excess), error)
                kept = log - (error if beyond else math.copysign(excess, error))
        self._errors.add(min(abs(error), limit))
        self._own_errors.add(min(abs(error - shared), own_limit))
        self._remember(kept)
        return beyond

    def has_vanished(self, value: float, ratio: float, steps: int) -> bool:
        """Return whether the number was below its median / `ratio` for `steps` in a row. Call it before `judge`."""
        if len(self._past) < self._arm_after:
            self._had_zeros |= value == 0.0
            return False
        is_low = value * ratio < math.exp(self._past.median)
        if value == 0.0:
            self._num_zero += 1
        else:
            self._had_zeros |= self._num_zero > 0
            self._num_zero = 0
        self.num_low = self.num_low + 1 if is_low else 0
        return self.num_low >= steps or (self._num_zero >= ZERO_STEPS and not self._had_zeros)

    def expected(self) -> tuple[float, float] | None:
        """Return the usual range of the last record; None if it is not known yet."""
        return self._usual and (math.exp(self._usual[0]), math.exp(self._usual[1]))

    def _remember(self, log: float) -> None:
        self._past.add(log)
        self._newest.add(log)

    def _outlier(self, excess: float) -> float:
        """Return `excess` over the limit in logs, or 0 if it is too small to count alone."""
        is_again, self._since_outside = self._since_outside < SOON_STEPS, 0
        return excess if is_again or excess > math.log(FAR_RATIO) else 0.0
