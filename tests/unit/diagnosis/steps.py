"""Steps as a healthy training makes them, to be broken by tests."""

import math
import random
from collections.abc import Callable

from apt_jobs.diagnosis.anomalies import AnomalyDetector
from apt_jobs.diagnosis.incidents import Finding
from apt_jobs.diagnosis.step_join import JoinedStep
from apt_jobs.events.kinds import GradientsRecorded, RankGradientsRecorded
from apt_jobs.jobs.monitor_options import MonitorOptions

LAYERS = (
    *("embed.weight", "layers.0.attention.weight", "layers.0.mlp.weight"),
    *("layers.1.attention.weight", "layers.1.mlp.weight", "norm.weight"),
)


def record(step: int, rank: int, norms: tuple[float, ...], **fields: float | bool | None) -> RankGradientsRecorded:
    known: dict[str, float | bool | None] = {"loss": 2.0, "step_time_ms": 100.0, "compute_time_ms": 80.0, **fields}
    return RankGradientsRecorded(
        step=step,
        rank=rank,
        norms=norms,
        loss=known["loss"],
        step_time_ms=known["step_time_ms"],
        compute_time_ms=known["compute_time_ms"],
        num_samples=8,
        is_scaled=bool(known.get("is_scaled", False)),
        num_dropped=0,
    )


class Training:
    """Makes joined steps of `num_ranks` ranks with log-normal noise, and looks at them with a detector."""

    def __init__(self, num_ranks: int = 4, seed: int = 0, **options: float) -> None:
        self.num_ranks, self._random = num_ranks, random.Random(seed)
        self.options = MonitorOptions(**options)  # type: ignore[arg-type]  # the values of its own fields
        self.detector = AnomalyDetector(self.options, num_ranks)
        self.detector.name_layers(LAYERS)
        self.number = 0

    def step(self, spoil: Callable[[JoinedStep], None] | None = None) -> list[Finding]:
        """One more step. `spoil` may change it before it is looked at."""
        return self.detector.detect(self.make(spoil))

    def make(self, spoil: Callable[[JoinedStep], None] | None = None) -> JoinedStep:
        self.number += 1
        joined = JoinedStep(self.number)
        for rank in range(self.num_ranks):
            norms = tuple(math.exp(self._random.gauss(-index, 0.2)) for index in range(len(LAYERS)))
            joined.ranks[rank] = record(
                self.number, rank, norms, loss=2.0 + self._random.gauss(0, 0.05), compute_time_ms=self._time()
            )
        join(joined)
        if spoil is not None:
            spoil(joined)
        return joined

    def healthy(self, num_steps: int) -> list[Finding]:
        return [finding for _ in range(num_steps) for finding in self.step()]

    def _time(self) -> float:
        return 80.0 * math.exp(self._random.gauss(0, 0.05))


def join(joined: JoinedStep) -> None:
    """Global norms as the mean of the ranks' own."""
    columns = zip(*(record.norms for record in joined.ranks.values()), strict=True)
    norms = tuple(sum(column) / len(joined.ranks) for column in columns)
    options = MonitorOptions()
    outside = tuple(
        index for index, norm in enumerate(norms) if not options.vanishing_below <= norm <= options.exploding_above
    )
    joined.gradients = GradientsRecorded(joined.step, norms, outside)


def scaled(joined: JoinedStep, factor: float, ranks: tuple[int, ...], layers: tuple[int, ...] | None = None) -> None:
    """Multiply norms of some ranks and layers."""
    for rank in ranks:
        old = joined.ranks[rank]
        norms = tuple(
            norm * factor if layers is None or index in layers else norm for index, norm in enumerate(old.norms)
        )
        joined.ranks[rank] = record(
            old.step, rank, norms, loss=old.loss, compute_time_ms=old.compute_time_ms, is_scaled=old.is_scaled
        )
    join(joined)
