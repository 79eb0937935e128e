"""The checkpoints of one attempt: when they are taken, written and pruned, and how a training resumes from one.

All ranks take a snapshot together; rank 0 writes it in a thread while training goes on. The format is in
`checkpoint.py`.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerFast

from apt_jobs.artifacts.folders import delete_folder
from apt_jobs.errors import OutOfSpace
from apt_jobs.events.kinds import CheckpointSaved
from apt_jobs.gradient_monitor.monitor import GradientMonitor
from apt_jobs.jobs.checkpoint_state import Adjustments, CheckpointEntry, CheckpointState
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.training.adapters import has_adapter, read_adapter
from apt_jobs.training.checkpoint import (
    TRAINED,
    Snapshot,
    load_training_state,
    take_snapshot,
    write_checkpoint,
)
from apt_jobs.training.ddp import Rank, barrier
from apt_jobs.training.ema import WeightAverage, reshard
from apt_jobs.training.model import load_model
from apt_jobs.training.progress import Progress, is_better
from apt_jobs.training.reporter import Reporter


class CheckpointManager:
    """Saves, prunes and restores. What it restores it changes in place: `progress`, `adjustments`, the model.

    Made on every rank. `save`, `resume` and `roll_back` are collectives: all ranks take part, at the same step.
    """

    def __init__(
        self,
        run_file: RunFile,
        rank: Rank,
        reporter: Reporter,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        optimizers: Sequence[Optimizer],
        scaler: torch.amp.GradScaler,
        monitor: GradientMonitor,
        progress: Progress,
        adjustments: Adjustments,
        average: WeightAverage | None,
    ) -> None:
        self._run_file, self._rank, self._reporter = run_file, rank, reporter
        self._options = run_file.spec.training
        self._model, self._tokenizer = model, tokenizer
        self._optimizers, self._scaler, self._monitor = optimizers, scaler, monitor
        self._progress, self._adjustments, self._average = progress, adjustments, average
        self._saved_step = 0
        self._writing: Future[None] | None = None  # of the last checkpoint, on rank 0
        self._writer = ThreadPoolExecutor(1, "checkpoint") if rank.is_first else None

    @property
    def is_saved(self) -> bool:
        """Whether there is a checkpoint of the current step."""
        return self._saved_step == self._progress.step

    def save(self, val_loss: float | None, epoch: int, *, wait: bool) -> None:
        """Take a snapshot and write it in the background, or now if `wait`. All ranks take part."""
        began = time.perf_counter()
        self._monitor.flush()  # its statistics are part of the state: waits for the GPU
        self.wait_for_checkpoint()
        self._saved_step = self._progress.step
        state = self._state(val_loss, epoch)
        snapshot = take_snapshot(self._model, self._optimizers, self._rank, self._average)
        if snapshot is not None and self._writer is not None:
            stall_ms = 1000.0 * (time.perf_counter() - began)
            self._writing = self._writer.submit(self._write, snapshot, state, stall_ms)
            if wait:
                self._writing.result()
        if wait:
            barrier()  # no rank may end, and torchrun with it, before rank 0 has written

    def wait_for_checkpoint(self) -> None:
        """Wait for the checkpoint that is being written. When it failed, training goes on with the one before."""
        if self._writing is None:
            return
        try:
            self._writing.result()
        except OutOfSpace as exc:
            self._reporter.error(f"{exc}; training goes on")
        self._writing = None

    def resume(self, folder: Path) -> None:
        """Restore everything but the model, which was loaded from the same folder. All ranks take part."""
        state = self._load(folder)
        self._progress.kept = [*state.kept, state.as_entry()]
        for field in fields(Adjustments):
            setattr(self._adjustments, field.name, getattr(state.adjustments, field.name))
        self._monitor.load_state_dict(state.monitor)

    def roll_back(self, name: str) -> int:
        """Go back to a checkpoint of this attempt, and return by how many steps. All ranks take part.

        Later checkpoints are removed: they hold what the roll-back is to get rid of.
        """
        folder, progress = self._run_file.checkpoint_path(name), self._progress
        is_adapter = has_adapter(self._model)
        reshard(self._model)
        weights = read_adapter(self._model, folder) if is_adapter else load_model(folder).state_dict()
        self._set_weights(weights, strict=not is_adapter)
        came_from = progress.step
        self._load(folder)
        for entry in [entry for entry in progress.kept if entry.step > progress.step]:
            self._remove(entry, f"rolled back to step {progress.step}")
        self._saved_step = progress.step
        return came_from - progress.step

    def _set_weights(self, weights: dict[str, Any], *, strict: bool = False) -> None:
        """Replace weights of the model by these, whole and by name. All ranks take part."""
        set_model_state_dict(self._model, weights, options=StateDictOptions(full_state_dict=True, strict=strict))

    def _load(self, folder: Path) -> CheckpointState:
        """Restore optimizer, random generators, loss scale and progress; returns the state that was saved.

        The model is that of the folder. Where it is an average, the weights that are trained take its place.
        """
        if self._average is not None:
            self._average.reset()
            if (folder / TRAINED).exists():  # else the average begins here
                self._set_weights(load_file(folder / TRAINED))
        state = load_training_state(folder, self._model, self._optimizers, self._rank)
        progress = self._progress
        progress.step, progress.train_loss = state.global_step, state.train_loss
        progress.best_val_loss = state.best_val_loss
        progress.lowest_val_loss, progress.num_worse = state.lowest_val_loss, state.num_worse
        if self._scaler.is_enabled() and state.scaler:
            self._scaler.load_state_dict(state.scaler)
        return state

    def _state(self, val_loss: float | None, epoch: int) -> CheckpointState:
        """Describe this step for the checkpoint. A better validation loss becomes the best one."""
        progress = self._progress
        is_best = val_loss is not None and is_better(val_loss, progress.best_val_loss)
        if is_best:
            progress.best_val_loss = val_loss
        return CheckpointState(
            global_step=progress.step,
            epoch=epoch,
            train_loss=progress.train_loss,
            val_loss=val_loss,
            best_val_loss=progress.best_val_loss,
            lowest_val_loss=progress.lowest_val_loss,
            num_worse=progress.num_worse,
            kept=list(progress.kept),
            is_best=is_best,
            name=f"step-{progress.step:08d}-a{self._run_file.attempt}",
            scaler=self._scaler.state_dict(),
            monitor=self._monitor.state_dict(),
            adjustments=self._adjustments.for_next_attempt(),
            config=self._run_file.spec.model.model_dump(),
        )

    def _write(self, snapshot: Snapshot, state: CheckpointState, stall_ms: float) -> None:
        """Write one checkpoint and report it, then prune old ones. Runs in the writer's thread."""
        began = time.perf_counter()
        folder = self._run_file.checkpoints_dir
        saved = write_checkpoint(folder, state.name, snapshot, self._model, self._tokenizer, state)
        self._reporter.emit(
            CheckpointSaved(
                checkpoint_id=saved.checkpoint_id,
                filename=f"{self._run_file.checkpoint_prefix}/{state.name}",
                step=state.global_step,
                epoch=state.epoch,
                val_loss=state.val_loss,
                train_loss=state.train_loss,
                size_bytes=saved.size_bytes,
                is_best=state.is_best,
                stall_ms=stall_ms,
                write_ms=1000.0 * (time.perf_counter() - began),
            )
        )
        self._progress.kept.append(replace(state.as_entry(), id=saved.checkpoint_id))
        self._prune()

    def _prune(self) -> None:
        """Keep the newest `keep_checkpoints`, every one at a multiple of `keep_every_steps`, and the best one."""
        kept, every = self._progress.kept, self._options.keep_every_steps
        best = next((entry for entry in reversed(kept) if entry.is_best), None)
        for entry in kept[: -self._options.keep_checkpoints]:
            if entry is best or (every is not None and entry.step % every == 0):
                continue
            self._remove(entry, "replaced by newer ones")

    def _remove(self, entry: CheckpointEntry, reason: str) -> None:
        self._progress.kept.remove(entry)
        folder = self._run_file.checkpoint_path(entry.name)
        if self._rank.is_first and folder.is_dir():
            self._reporter.checkpoint_removed(entry.id, reason)
            delete_folder(folder)
