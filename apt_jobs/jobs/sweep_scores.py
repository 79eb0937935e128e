"""Compare the jobs of a sweep: the value of a setting over its repeats, the order of settings, what halving stops.

A value that is not finite counts as none: a training that diverged is never the best one.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from apt_jobs.jobs.sweeps import MAX_REPEATS

# Student's t of the two-sided 95 % interval, by degrees of freedom from 1.
_T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093),
)
assert len(_T_95) == MAX_REPEATS - 1


@dataclass(frozen=True, slots=True)
class Score:
    """What a setting reached."""

    mean: float
    interval: tuple[float, float] | None  # 95 %, of the mean; None: of one value there is none


def score_of(values: Sequence[float | None]) -> Score | None:
    """Return the mean of a setting's repeats; None: none has a value, or one is not finite."""
    known = [value for value in values if value is not None]
    if not known or not all(map(math.isfinite, known)):
        return None
    mean = statistics.fmean(known)
    if len(known) == 1:
        return Score(mean, None)
    half = _T_95[len(known) - 2] * statistics.stdev(known) / math.sqrt(len(known))
    return Score(mean, (mean - half, mean + half))


def is_promoted(value: float, others: Sequence[float], reduction_factor: int, *, is_minimized: bool) -> bool:
    """Return whether a job goes on at a rung, where `others` were before it: it is among the best 1 / factor.

    One that comes first goes on: asynchronous halving waits for nobody.
    """
    if not math.isfinite(value):
        return False
    known = [other for other in others if math.isfinite(other)]
    num_better = sum(other < value if is_minimized else other > value for other in known)
    return num_better < math.ceil((len(known) + 1) / reduction_factor)
