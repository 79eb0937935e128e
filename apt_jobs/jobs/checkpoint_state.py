"""The state of a training at one step besides its tensors: `training_state.json` of a checkpoint.

Written by rank 0, read by every rank of the attempt that resumes. A new field gets a default, with which checkpoints
of earlier versions are read.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apt_jobs.errors import InvalidCheckpoint

STATE_FILE = "training_state.json"


@dataclass(frozen=True, slots=True)
class CheckpointEntry:
    """What is remembered of a checkpoint of this job that was saved and not removed."""

    id: str
    name: str
    is_best: bool
    step: int


@dataclass(slots=True)
class Adjustments:
    """What commands have changed for good; part of a checkpoint."""

    learning_rate_factor: float = 1.0
    skipped_steps: int = 0  # the batches of step N are those that N + `skipped_steps` would have had
    num_rollbacks: int = 0  # of this attempt

    def for_next_attempt(self) -> "Adjustments":
        """Return what a checkpoint keeps: the next attempt counts its own roll-backs."""
        return replace(self, num_rollbacks=0)


class CheckpointState(BaseModel):
    """The document in `training_state.json`.

    `scaler`, `monitor` and `optimizer_groups` are states of their owners, which nobody else reads.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, ser_json_inf_nan="constants", protected_namespaces=())

    global_step: int
    epoch: int = 0
    train_loss: float | None = None
    val_loss: float | None = None  # of this step
    best_val_loss: float | None = None  # of all checkpoints so far, this one included
    lowest_val_loss: float | None = None  # of all validations so far
    num_worse: int = 0  # validations since then
    is_best: bool = False
    name: str = ""  # of the folder
    kept: list[CheckpointEntry] = Field(default_factory=list)  # earlier ones that are still there, oldest first
    adjustments: Adjustments = Field(default_factory=Adjustments)
    scaler: dict[str, Any] = Field(default_factory=dict)
    monitor: dict[str, Any] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)  # the model's `APTConfig`
    checkpoint_id: str = ""  # known when it is written
    optimizer_groups: list[dict[str, Any]] = Field(default_factory=list)

    def as_entry(self) -> CheckpointEntry:
        """Return how later checkpoints remember this one."""
        return CheckpointEntry(self.checkpoint_id, self.name, self.is_best, self.global_step)


def write_checkpoint_state(folder: Path, state: CheckpointState) -> None:
    """Write the state into the folder of a checkpoint.

    Raises:
        OSError: the disk does not take it.
    """
    (folder / STATE_FILE).write_text(state.model_dump_json())


def read_checkpoint_state(folder: Path) -> CheckpointState:
    """Read the state of a checkpoint.

    Raises:
        InvalidCheckpoint: it is not there, or is no such state.
    """
    try:
        return CheckpointState.model_validate_json((folder / STATE_FILE).read_bytes())
    except OSError as exc:
        raise InvalidCheckpoint(f"checkpoint {folder.name!r} cannot be trained on from: {exc}") from exc
    except ValidationError as exc:
        wrong = ", ".join(sorted({".".join(map(str, error["loc"])) for error in exc.errors()})) or "not JSON"
        raise InvalidCheckpoint(f"{STATE_FILE} of checkpoint {folder.name!r} is damaged: {wrong[:300]}") from exc
