"""Joins what the ranks of one attempt say of the same step, and what only the join can tell: the noise scale.

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
    gradients: GradientsRecorded | None = None  # the global norms; None: rank 0 did not say
    ranks: dict[int, RankGradientsRecorded] = field(default_factory=dict)
    num_rollbacks: int = 0


class StepJoiner:
    """Takes records in any order, gives steps in order."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._open: dict[tuple[int, int], JoinedStep] = {}  # by number of roll-backs, then step
        self._last = 0, 0

    def add(self, event: GradientsRecorded | RankGradientsRecorded) -> Iterator[JoinedStep]:
        """Steps that are complete now, or for which nobody waits any longer."""
        key = event.num_rollbacks, event.step
        joined = self._open.setdefault(key, JoinedStep(event.step, num_rollbacks=event.num_rollbacks))
        if isinstance(event, RankGradientsRecorded):
            joined.ranks[event.rank] = event
        else:
            joined.gradients = event
        if joined.gradients is not None and len(joined.ranks) == self._num_ranks:
            yield from self._give(key)
        elif len(self._open) > MAX_OPEN_STEPS:
            yield from self._give(min(self._open))

    def rest(self) -> Iterator[JoinedStep]:
        """What is not complete and never will be: the ranks have ended."""
        if self._open:
            yield from self._give(max(self._open))

    def _give(self, up_to: tuple[int, int]) -> Iterator[JoinedStep]:
        """A step that is complete also ends the wait for those before it: ranks write in order."""
        for key in sorted(key for key in self._open if key <= up_to):
            joined = self._open.pop(key)
            if key > self._last:  # else a late record of a step that was given already
                self._last = key
                yield joined


class NoiseScale:
    """The gradient noise scale B_simple in samples (McCandlish et al. 2018, appendix A.1).

    From the squared norm of small batches (each rank's gradient) and of the big one (their mean).
    """

    def __init__(self) -> None:
        self._signal = self._noise = 0.0

    def add(self, joined: JoinedStep) -> float | None:
        """The smoothed estimate after one more step; None: not known."""
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


def summary(joined: JoinedStep, num_ranks: int, noise_scale: float | None) -> RanksJoined:
    """What is stored of every step."""
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
