"""A Lightning `Trainer` as a job: progress, metrics, checkpoints, stops.

    run = apt_jobs.current_run()
    trainer = Trainer(callbacks=[RunCallback(), ModelCheckpoint(every_n_train_steps=100)])
    trainer.fit(module, data, ckpt_path=run.resume_dir and run.resume_dir / "checkpoint.ckpt")

It uses `apt_jobs.current_run()` and nothing else of the service. Add `GradientMonitorCallback` for gradient norms.
"""

import math
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from apt_jobs.run.current import Run, current_run

CHECKPOINT_FILE = "checkpoint.ckpt"  # in a registered checkpoint
DEFAULT_LOG_EVERY_STEPS = 50  # as Lightning's


class RunCallback(Callback):
    """Reports a training to its job. What `ModelCheckpoint` wrote is registered before the next batch."""

    def __init__(self, run: Run | None = None) -> None:
        super().__init__()
        self._run = run if run is not None else current_run()
        self._seen: tuple[str, int] | None = None  # file and step that `ModelCheckpoint` saved last
        self._registered_step = -1
        self._num_steps = -1  # when a batch ended last

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many steps there are, where that is known."""
        self._set_progress(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Register what was saved after the batch before: `ModelCheckpoint` comes after all other callbacks."""
        self._register_new(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step: log, and stop if the job has to. All ranks ask at the same step."""
        if trainer.global_step == self._num_steps:
            return  # gradients are being accumulated
        self._num_steps = trainer.global_step
        self._set_progress(trainer)
        every = getattr(trainer, "log_every_n_steps", 0) or DEFAULT_LOG_EVERY_STEPS
        if trainer.is_global_zero and trainer.global_step % every == 0:
            self._run.log(_numbers(trainer.logged_metrics), step=trainer.global_step)
        if self._run.should_stop():
            file = self._run.output_dir / f"stopped-{trainer.global_step}.ckpt"
            trainer.save_checkpoint(file)  # all ranks take part
            self._register(trainer, file, trainer.global_step)
            if trainer.is_global_zero:
                _remove(file)
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was validated, but not the check of two batches before the training."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            self._run.log(_numbers(trainer.callback_metrics), step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register the last checkpoint, and write what waits for its turn."""
        self._register_new(trainer)
        self._set_progress(trainer)
        self._run.flush()

    def _register_new(self, trainer: Trainer) -> None:
        for callback in trainer.checkpoint_callbacks:
            file = getattr(callback, "_last_checkpoint_saved", "") if isinstance(callback, ModelCheckpoint) else ""
            step = getattr(callback, "_last_global_step_saved", trainer.global_step)
            if file and (file, step) != self._seen:
                self._seen = file, step
                self._register(trainer, Path(file), step)

    def _register(self, trainer: Trainer, file: Path, step: int) -> None:
        """Register a file, or the folder that a sharded strategy wrote, by a name that the next attempt knows."""
        if not trainer.is_global_zero or step == self._registered_step or not file.exists():
            return
        self._registered_step = step
        folder = self._run.output_dir / f".registering-{step}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        copy = folder / CHECKPOINT_FILE
        shutil.copytree(file, copy) if file.is_dir() else shutil.copyfile(file, copy)
        self._run.save_checkpoint(folder, step=step, metrics=_numbers(trainer.callback_metrics), move=True)
        shutil.rmtree(folder, ignore_errors=True)

    def _set_progress(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            total = trainer.estimated_stepping_batches
            is_known = math.isfinite(total) and total > 0
            self._run.set_progress(trainer.global_step, int(total) if is_known else None)


def _numbers(metrics: Any) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
