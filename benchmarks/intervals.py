"""Ratios of noisy times: the median, and how sure it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A median and its 95 % interval."""

    median: float
    low: float
    high: float


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """Return the median of `values`, with the percentile interval of its bootstrap (Efron 1979). Needs one value."""
    known = np.asarray(values, dtype=np.float64)
    picked = np.random.default_rng(seed).integers(0, len(known), size=(NUM_RESAMPLES, len(known)))
    low, high = np.percentile(np.median(known[picked], axis=1), [2.5, 97.5])
    return Interval(float(np.median(known)), float(low), float(high))
