"""The gradient monitor in a Hugging Face `Trainer`.

    trainer.add_callback(GradientMonitorCallback(trainer))

`Trainer` has no event between the backward pass and clipping: `on_pre_optimizer_step` comes after it. But it clips, or
only measures when `max_grad_norm` is 0, with one call of its accelerator's `clip_grad_norm_` in every optimizer step,
and goes backward with its `backward` (transformers 5, `trainer.py`). Both calls are watched while it trains, so that
norms are those before clipping, and a loss is the one that was differentiated, also where `logging_nan_inf_filter`
hides it. Each rank's own norms are taken before DDP averages.
"""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from apt_jobs.errors import InvalidInput
from apt_jobs.gradient_monitor.monitor import GradientMonitor

UNSUPPORTED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)  # they keep gradients where torch has none


class GradientMonitorCallback(TrainerCallback):
    """Watch the training of a `Trainer`.

    Args:
        trainer: The trainer that it is added to.
        **options: Keyword arguments of `GradientMonitor`, as `every_steps`.

    Raises:
        InvalidInput: the trainer leaves its gradients to DeepSpeed or Megatron-LM (raised when the training begins).

    Example:
        trainer = Trainer(model=model, args=args, train_dataset=dataset)
        trainer.add_callback(GradientMonitorCallback(trainer))
        trainer.train()
    """

    def __init__(self, trainer: Trainer, **options: Any) -> None:
        self._trainer, self._options = trainer, options
        self._loss: Tensor | None = None  # of this optimizer step so far
        self.monitor: GradientMonitor | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the monitor on every rank, when the model is wrapped."""
        self._accelerator: Accelerator = self._trainer.accelerator
        if self._accelerator.distributed_type in UNSUPPORTED:
            raise InvalidInput(f"the gradients of {self._accelerator.distributed_type} cannot be watched")
        self.monitor = GradientMonitor(self._trainer.model_wrapped, kwargs["optimizer"], **self._options)
        self._loss = None
        self._watch_accelerator()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the accelerator."""
        assert self.monitor is not None
        self.monitor.flush()
        del self._accelerator.backward, self._accelerator.clip_grad_norm_

    def _watch_accelerator(self) -> None:
        backward, clip = self._accelerator.backward, self._accelerator.clip_grad_norm_

        def watched_backward(loss: Tensor, **kwargs: Any) -> None:
            self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
            backward(loss, **kwargs)

        def watched_clip(*args: Any, **kwargs: Any) -> Any:
            self._record()
            return clip(*args, **kwargs)

        self._accelerator.backward, self._accelerator.clip_grad_norm_ = watched_backward, watched_clip

    def _record(self) -> None:
        assert self.monitor is not None
        args, scaler, loss = self._trainer.args, self._accelerator.scaler, self._loss
        self._loss = None
        self.monitor.step(
            self._trainer.state.global_step + 1,
            1.0 if scaler is None else scaler.get_scale(),
            loss=loss,
            num_samples=args.per_device_train_batch_size * args.gradient_accumulation_steps,
        )
