"""What the host knows of one step: while its numbers are on their way from the GPU, and afterwards."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apt_jobs.events.kinds import StepTrained


@dataclass(slots=True)
class StepLabel:
    """What the host knows of a step while its numbers are on their way: local norms, norms, loss."""

    step: int
    at: float
    present: NDArray[np.bool_]
    local_order: list[int]  # the layer of each local norm
    has_loss: bool
    num_samples: int
    is_scaled: bool
    num_rollbacks: int
    step_time_ms: float | None
    learning_rate: float | None
    begin: Any
    ready: Any

    def as_metric(self, loss: float, norms: NDArray[np.float64]) -> StepTrained:
        """Return the job's curves, from rank 0's loss, for a loop that does not report them itself."""
        assert self.learning_rate is not None
        step_time_ms = self.step_time_ms or 0.0
        return StepTrained(
            step=self.step,
            epoch=0,
            train_loss=loss,
            learning_rate=self.learning_rate,
            grad_norm=math.sqrt(float(np.square(norms).sum())),
            step_time_ms=step_time_ms,
            tokens_per_s=0.0,
        )


@dataclass(slots=True)
class TimelineStep:
    """One step of the timeline that a monitor keeps in memory."""

    step: int
    timestamp: float
    norms: NDArray[np.float64]
    anomalous: NDArray[np.bool_]
