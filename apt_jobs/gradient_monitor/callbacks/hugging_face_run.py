"""A Hugging Face `Trainer` (TRL's too) as a job: progress, metrics, checkpoints, stops.

    run = apt_jobs.current_run()
    trainer.add_callback(RunCallback())
    trainer.train(resume_from_checkpoint=str(run.resume_dir) if run.resume_dir else None)

It uses `apt_jobs.current_run()` and nothing else of the service. Add `GradientMonitorCallback` for gradient norms.
"""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from apt_jobs.run.current import Run, current_run


class RunCallback(TrainerCallback):
    """Reports a training to its job. Add it on every rank."""

    def __init__(self, run: Run | None = None) -> None:
        self._run = run if run is not None else current_run()
        self._metrics: dict[str, Any] = {}  # the newest of each name
        self._saved_step = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say how many steps there are."""
        self._set_progress(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after this step if the job has to: the trainer saves first. All ranks ask at the same step."""
        self._set_progress(state)
        if self._run.should_stop():
            control.should_save = control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log what the trainer logs: `loss`, `learning_rate`, and `eval_loss` with all that was evaluated."""
        if not state.is_world_process_zero:
            return
        numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        self._metrics |= numbers
        if numbers:
            self._run.log(numbers, step=state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Register the checkpoint that the trainer wrote, once every rank has written its part."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.barrier()
        if not state.is_world_process_zero or state.global_step == self._saved_step:
            return
        self._saved_step = state.global_step
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        losses = {name: value for name, value in self._metrics.items() if name in ("loss", "eval_loss")}
        self._run.save_checkpoint(folder, step=state.global_step, metrics=losses)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what waits for its turn."""
        self._set_progress(state)
        self._run.flush()

    def _set_progress(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self._run.set_progress(state.global_step, state.max_steps or None)
