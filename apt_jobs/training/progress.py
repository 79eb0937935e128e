"""How far a training is: what a checkpoint keeps of it besides tensors."""

import math
from dataclasses import dataclass, field

from apt_jobs.jobs.checkpoint_state import CheckpointEntry


@dataclass(slots=True)
class Progress:
    """What a checkpoint keeps of the training itself; the same on every rank, but `kept` is rank 0's to maintain."""

    step: int = 0
    train_loss: float | None = None
    best_val_loss: float | None = None  # of the checkpoints that were saved
    kept: list[CheckpointEntry] = field(default_factory=list)  # oldest first


def is_better(val_loss: float, best: float | None) -> bool:
    """Tell whether a validation loss is the best so far. NaN is never: nothing would be better than it afterwards."""
    return math.isfinite(val_loss) and (best is None or val_loss < best)
