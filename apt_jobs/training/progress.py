"""How far a training is: what a checkpoint keeps of it besides tensors."""

from dataclasses import dataclass, field
from typing import Any

# What `Progress.kept` remembers of a checkpoint, and where its own training state has it.
CHECKPOINT_ENTRY = {"id": "checkpoint_id", "name": "name", "is_best": "is_best", "step": "global_step"}


@dataclass(slots=True)
class Progress:
    """What a checkpoint keeps of the training itself; the same on every rank."""

    step: int = 0
    train_loss: float | None = None
    best_val_loss: float | None = None  # of the checkpoints that were saved
    kept: list[dict[str, Any]] = field(default_factory=list)  # entries of this job's checkpoints, oldest first
