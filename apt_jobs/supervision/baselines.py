"""What is usual for one number: how far its logarithm mostly is from what its newest values let expect.

The forecast is the median of the newest few, so that it follows a number that drifts, as norms do while a model begins
to learn. What is judged is the error of the forecast, by the usual size of such errors: that holds the noise, the drift
and what is not known yet. Of few errors it is less sure, and they may all be from the calm before a model begins to
learn: limits are wider while the window fills. A second error is without what the number's companions share: when all
layers of a block jump together, little is left of it.

Robust by construction: an outlier enters the past only as far as the limit that it broke (winsorised) and the forecast
not at all, so that one does not hide the next, while a lasting change becomes usual after half a window.
"""

import math
from bisect import bisect_left, insort
from collections import deque

from apt_jobs.jobs.spec import MonitorOptions

FAR_RATIO = 1.6  # beyond the limit by so much it is an outlier at once; by less, when it is so again soon
SOON_STEPS = 3
FORECAST_STEPS = 15  # newest records whose median is the forecast
LEAST_FORECAST_STEPS = 4
YOUNG_MARGIN = 0.5  # limits are wider by so much of themselves at first, and by nothing when the window is full
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


class Baseline:
    """The usual range of one positive number."""

    def __init__(self, options: MonitorOptions) -> None:
        window_steps = options.window_steps
        self._past = Window(window_steps)  # logs
        self._newest = Window(FORECAST_STEPS)  # logs
        self._errors = Window(window_steps)  # sizes of the errors of forecasts
        self._own_errors = Window(window_steps)  # and of what companions do not share
        self._window_steps = window_steps
        self._arm_after = max(options.arm_after_steps, LEAST_FORECAST_STEPS + 1)  # one error at least
        self._least = math.log(options.spike_ratio)
        self._mads, self._own_mads = options.block_spike_mads, options.spike_mads
        self._usual: tuple[float, float] | None = None  # the range of logs that the last record was judged by
        self.num_low = 0  # steps in a row below the limit of `vanished`
        self._num_zero = 0
        self._had_zeros = False
        self._since_outside = SOON_STEPS  # records since the last one beyond the limit

    def error(self, value: float) -> float | None:
        """The log of `value` less its forecast; None: it is not positive, or there is no forecast yet."""
        if not 0.0 < value < math.inf or len(self._newest) < LEAST_FORECAST_STEPS:
            return None
        return math.log(value) - self._newest.median

    def judge(self, value: float, error: float | None, shared: float) -> float:
        """How far `value` is beyond its usual range, in logs (0: within; negative: below); then remember it.

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
            limit = max(widened * self._mads * self._errors.median, self._least)
            own_limit = max(widened * self._own_mads * self._own_errors.median, self._least)
            below = min(limit, max(own_limit - shared, self._least))
            above = min(limit, max(own_limit + shared, self._least))
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
        """Whether the number has been less than its median / `ratio` for `steps` in a row. Call it before `judge`."""
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
        """The usual range of the last record; None: not known yet."""
        return self._usual and (math.exp(self._usual[0]), math.exp(self._usual[1]))

    def _remember(self, log: float) -> None:
        self._past.add(log)
        self._newest.add(log)

    def _outlier(self, excess: float) -> float:
        """`excess` over the limit in logs, or 0 if it is too small to count alone."""
        is_again, self._since_outside = self._since_outside < SOON_STEPS, 0
        return excess if is_again or excess > math.log(FAR_RATIO) else 0.0
