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
    lowest_val_loss: float | None = None  # of all validations
    num_worse: int = 0  # validations in a row since then
    kept: list[CheckpointEntry] = field(default_factory=list)  # oldest first

    def note_validation(self, val_loss: float) -> None:
        """Count validations that bring nothing better; NaN and Infinity do not."""
        if is_better(val_loss, self.lowest_val_loss):
            self.lowest_val_loss, self.num_worse = val_loss, 0
        else:
            self.num_worse += 1


def is_better(val_loss: float, best: float | None) -> bool:
    """Tell whether a validation loss is the best so far. NaN is never: nothing would be better than it afterwards."""
    return math.isfinite(val_loss) and (best is None or val_loss < best)
