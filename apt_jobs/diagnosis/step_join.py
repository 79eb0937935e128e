"""Join the records of all ranks by step, and estimate the gradient noise scale, which needs all of them.

The ranks' spools are read one after another, so a step is complete a little after its first record. A rank that fell
silent does not hold the others up for longer than `MAX_OPEN_STEPS`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from apt_jobs.events.kinds import GradientsRecorded, RankGradientsRecorded, RanksJoined

MAX_OPEN_STEPS = 256
NOISE_DECAY = 0.95  # one step's estimate is negative 7-11 % of the time: numerator and denominator are smoothed


@dataclass(slots=True)
class JoinedStep:
    """One step of all ranks."""

    step: int
    gradients: GradientsRecorded | None = None  # the global norms; None: rank 0 recorded none
    ranks: dict[int, RankGradientsRecorded] = field(default_factory=dict)
    num_rollbacks: int = 0


class StepJoiner:
    """Join records, which come in any order, to steps in order."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._open: dict[tuple[int, int], JoinedStep] = {}  # by number of roll-backs, then step
        self._last = 0, 0

    def add(self, event: GradientsRecorded | RankGradientsRecorded) -> Iterator[JoinedStep]:
        """Yield the steps that are complete now, or that have waited too long."""
        key = event.num_rollbacks, event.step
        joined = self._open.setdefault(key, JoinedStep(event.step, num_rollbacks=event.num_rollbacks))
        if isinstance(event, RankGradientsRecorded):
            joined.ranks[event.rank] = event
        else:
            joined.gradients = event
        if joined.gradients is not None and len(joined.ranks) == self._num_ranks:
            yield from self._emit(key)
        elif len(self._open) > MAX_OPEN_STEPS:
            yield from self._emit(min(self._open))

    def flush(self) -> Iterator[JoinedStep]:
        """Yield the steps that will never be complete: the ranks have ended."""
        if self._open:
            yield from self._emit(max(self._open))

    def _emit(self, up_to: tuple[int, int]) -> Iterator[JoinedStep]:
        """Yield the steps up to a key: a complete one ends the wait for those before it, since ranks write in order."""
        for key in sorted(key for key in self._open if key <= up_to):
            joined = self._open.pop(key)
            if key > self._last:  # else a late record of a step that was emitted already
                self._last = key
                yield joined


class NoiseScale:
    """Estimate the gradient noise scale B_simple, in samples (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1).

    With g_b the gradient of a rank's batch of b samples, and g_B their mean over all B samples:
        |G|^2 ~ (B |g_B|^2 - b |g_b|^2) / (B - b)
        S ~ (|g_b|^2 - |g_B|^2) / (1/b - 1/B)
        B_simple = S / |G|^2
    Numerator and denominator are smoothed apart, as their ratio is biased.
    """

    def __init__(self) -> None:
        self._signal = self._noise = 0.0

    def add(self, joined: JoinedStep) -> float | None:
        """Add a step and return the smoothed estimate; None while it is not known."""
        ranks = [rank for rank in joined.ranks.values() if rank.norms]
        if joined.gradients is None or len(ranks) < 2:
            return None
        small = sum(rank.num_samples for rank in ranks) / len(ranks)
        big = small * len(ranks)
        small_square = sum(_square(rank.norms) for rank in ranks) / len(ranks)
        big_square = _square(joined.gradients.norms)
        if not (math.isfinite(small_square) and math.isfinite(big_square)):
            return None
        signal = (big * big_square - small * small_square) / (big - small)
        noise = (small_square - big_square) / (1.0 / small - 1.0 / big)
        self._signal += (1.0 - NOISE_DECAY) * (signal - self._signal)
        self._noise += (1.0 - NOISE_DECAY) * (noise - self._noise)
        return self._noise / self._signal if self._signal > 0.0 and self._noise > 0.0 else None


def summarize(joined: JoinedStep, num_ranks: int, noise_scale: float | None) -> RanksJoined:
    """Make the event that is stored of every step."""
    ranks = [joined.ranks.get(rank) for rank in range(num_ranks)]
    return RanksJoined(
        step=joined.step,
        losses=tuple(None if rank is None else rank.loss for rank in ranks),
        grad_norms=tuple(math.sqrt(_square(rank.norms)) if rank and rank.norms else None for rank in ranks),
        step_times_ms=tuple(None if rank is None else rank.step_time_ms for rank in ranks),
        compute_times_ms=tuple(None if rank is None else rank.compute_time_ms for rank in ranks),
        noise_scale=noise_scale,
    )


def _square(norms: tuple[float, ...]) -> float:
    return sum(norm * norm for norm in norms)
