"""Rules by which others find that a training goes wrong, from their published definitions, fed with the same steps.

All see a rank's loss or the norm over all layers; none of them says on which rank or in which layer.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Protocol

ROLLING_STEPS = 128


class Rule(Protocol):
    """Steps come in order."""

    def is_alarm(self, losses: Sequence[float], norms: Sequence[float]) -> bool:
        """Judge one step by the loss of each rank and the reduced norm of each layer."""


class FixedThreshold:
    """A layer's norm outside 1e-7 to 1e3, or not finite: the monitor that the SPEC describes."""

    def is_alarm(self, losses: Sequence[float], norms: Sequence[float]) -> bool:
        return not all(1e-7 <= norm <= 1e3 for norm in norms)


class SpikeDetection:
    """The rule of Lightning (`lightning.fabric.utilities.spike`, defaults).

    A rank's loss is worse than its last one, and further from the mean of its last 10 than 2 times that mean; or it is
    not finite.
    """

    def __init__(self) -> None:
        self._running: dict[int, deque[float]] = {}

    def is_alarm(self, losses: Sequence[float], norms: Sequence[float]) -> bool:
        is_spike = any(self._is_spike(loss, self._running.get(rank)) for rank, loss in enumerate(losses))
        if not is_spike:
            for rank, loss in enumerate(losses):
                self._running.setdefault(rank, deque(maxlen=10)).append(loss)
        return is_spike

    @staticmethod
    def _is_spike(loss: float, running: deque[float] | None) -> bool:
        if running is None:  # a warm-up of one batch
            return False
        if not math.isfinite(loss):
            return True
        mean = statistics.fmean(running)
        return loss > running[-1] and abs(loss - mean) >= 2.0 * abs(mean)


class KillLossSpike:
    """The rule of llm-foundry (`kill_loss_spike_callback`, defaults).

    A rank's loss is twice the mean of its last 100, five times in a row; or, after 200 steps, half of the last 100 are
    above 10.
    """

    def __init__(self) -> None:
        self._windows: dict[int, deque[float]] = {}
        self._num_outliers: dict[int, int] = {}
        self._step = 0

    def is_alarm(self, losses: Sequence[float], norms: Sequence[float]) -> bool:
        self._step += 1
        spikes = [self._is_spike(rank, loss) for rank, loss in enumerate(losses)]  # of all: each has a window
        return any(spikes)

    def _is_spike(self, rank: int, loss: float) -> bool:
        window = self._windows.setdefault(rank, deque(maxlen=100))
        is_spike = False
        if len(window) == 100:
            is_outlier = loss >= 2.0 * statistics.fmean(window)
            self._num_outliers[rank] = self._num_outliers.get(rank, 0) + 1 if is_outlier else 0
            is_high = self._step >= 200 and sum(loss > 10.0 for loss in window) >= 50
            is_spike = self._num_outliers[rank] > 4 or is_high
        window.append(loss)
        return is_spike


class SixSigma:
    """The rule of OLMo-core (`SkipStepOptimizer`, defaults).

    The mean loss or the total norm is more than 6 standard deviations from its mean over the last 128 steps, once there
    are 64.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=ROLLING_STEPS)
        self._norms: deque[float] = deque(maxlen=ROLLING_STEPS)

    def is_alarm(self, losses: Sequence[float], norms: Sequence[float]) -> bool:
        now = ((self._losses, statistics.fmean(losses)), (self._norms, math.hypot(*norms)))
        is_alarm = len(self._losses) + 1 >= ROLLING_STEPS // 2 and not all(
            _deviations(past, value) <= 6.0 for past, value in now
        )
        for past, value in now:
            past.append(value)
        return is_alarm


def _deviations(past: Sequence[float], value: float) -> float:
    """NaN, and so an alarm, as long as the past holds a value that is not finite."""
    if not all(map(math.isfinite, past)) or not math.isfinite(value):
        return math.nan
    return abs(value - statistics.fmean(past)) / statistics.stdev(past)
