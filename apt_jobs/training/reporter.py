"""What rank 0 tells of a training: it appends events to its spool, which the supervisor reads and stores.

Other ranks make a reporter, too, and it does nothing there: callers need not ask which rank they are.
"""

from collections.abc import Sequence

import torch
from torch import nn

from apt_jobs.events.kinds import (
    ActionTaken,
    CheckpointRemoved,
    Event,
    LineLogged,
    MetricsLogged,
    SamplesGenerated,
    StepTrained,
    TrainingFinished,
    TrainingStarted,
    Validated,
)
from apt_jobs.events.spool import SpoolWriter
from apt_jobs.training.commands import Command
from apt_jobs.training.data import Batches
from apt_jobs.training.ddp import Rank
from apt_jobs.training.model import describe, num_parameters
from apt_jobs.training.progress import Progress, is_better


class Reporter:
    """Emits the events of one attempt. No collective, no wait for a GPU."""

    def __init__(self, spool: SpoolWriter, rank: Rank, batches: Batches) -> None:
        self._spool, self._rank, self._batches = spool, rank, batches

    def emit(self, event: Event) -> None:
        """Append one event on rank 0."""
        if self._rank.is_first:
            self._spool.append(event)

    def started(self, model: nn.Module, resumed_from_step: int) -> None:
        """Emit what is trained, on what."""
        if not self._rank.is_first:
            return
        is_gpu = self._rank.device.type == "cuda"
        self.emit(
            TrainingStarted(
                world_size=self._rank.world_size,
                device=torch.cuda.get_device_name(self._rank.device) if is_gpu else "cpu",
                backend=self._rank.backend,
                num_parameters=num_parameters(model),
                num_trainable_parameters=num_parameters(model, only_trainable=True),
                num_steps=self._batches.num_steps,
                steps_per_epoch=self._batches.steps_per_epoch,
                tokens_per_step=self._batches.tokens_per_step,
                resumed_from_step=resumed_from_step,
                model_config=describe(model),
            )
        )

    def step_trained(
        self, step: int, train_loss: float, learning_rate: float, grad_norm: float, step_time_s: float
    ) -> None:
        """Emit the curves of one step."""
        self.emit(
            StepTrained(
                step=step,
                epoch=self._batches.epoch_of(step),
                train_loss=train_loss,
                learning_rate=learning_rate,
                grad_norm=grad_norm,
                step_time_ms=1000.0 * step_time_s,
                tokens_per_s=self._batches.tokens_per_step / step_time_s,
            )
        )

    def step_skipped(self, step: int, grad_norm: float) -> None:
        """Log that a step changed no weight."""
        self.warning(f"step {step} is skipped: its gradient norm is {grad_norm}")

    def validated(self, step: int, val_loss: float, best: float | None) -> None:
        """Emit a validation loss; `best`: of the checkpoints so far."""
        self.emit(Validated(step, self._batches.epoch_of(step), val_loss, is_better(val_loss, best)))

    def measured(self, step: int, values: dict[str, int | float]) -> None:
        """Emit further numbers of a step, by name, as user scripts do."""
        if values:
            self.emit(MetricsLogged(step, 0, values))

    def sampled(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Emit what was generated at a checkpoint."""
        self.emit(SamplesGenerated(step, tuple(prompts), tuple(texts)))

    def checkpoint_removed(self, checkpoint_id: str, reason: str) -> None:
        """Emit that a checkpoint is about to be deleted."""
        self.emit(CheckpointRemoved(checkpoint_id, reason))

    def command_applied(self, step: int, command: Command, *, is_done: bool, outcome: str) -> None:
        """Emit what became of a policy's command."""
        self.emit(ActionTaken(step, "done" if is_done else "refused", command.action, command.incident, outcome))

    def finished(self, progress: Progress) -> None:
        """Emit that all steps are done."""
        epoch = self._batches.epoch_of(max(progress.step, 1))
        self.emit(TrainingFinished(progress.step, epoch, progress.train_loss, progress.best_val_loss))

    def warning(self, message: str) -> None:
        """Log something that the training goes on without."""
        self.emit(LineLogged("warning", "rank 0", message))

    def error(self, message: str) -> None:
        """Log something that failed and does not end the training."""
        self.emit(LineLogged("error", "rank 0", message))
