"""The gradient monitor in a Lightning `Trainer`.

    Trainer(callbacks=[GradientMonitorCallback()])

Lightning calls `on_before_optimizer_step` when gradients are reduced and unscaled, and before it clips them
(lightning 2.6, `plugins/precision`). Each rank's own norms are taken before DDP averages.
"""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from apt_jobs.gradient_monitor.monitor import GradientMonitor


class GradientMonitorCallback(Callback):
    """Watch a training of a Lightning `Trainer`.

    Args:
        num_samples: How many samples a rank contributes to an optimizer step.
        **options: Keyword arguments of `GradientMonitor`, as `every_steps`.

    Raises:
        InvalidInput: there is nothing to watch (raised when the training begins).

    Example:
        trainer = Trainer(max_steps=100, callbacks=[GradientMonitorCallback(num_samples=64)])
        trainer.fit(module, loader)
    """

    def __init__(self, num_samples: int = 1, **options: Any) -> None:
        super().__init__()
        self._num_samples, self._options = num_samples, options
        self._loss: Tensor | None = None  # of this optimizer step so far
        self.monitor: GradientMonitor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the monitor on every rank, when the model is wrapped."""
        self.monitor = GradientMonitor(trainer.strategy.model or pl_module, trainer.optimizers[0], **self._options)
        self._loss = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """`loss` is divided by the number of accumulated batches, and multiplied by the AMP scale."""
        loss = loss.detach() / _scale(trainer)
        self._loss = loss if self._loss is None else self._loss + loss

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Of several optimizers the steps of all count, and each is recorded."""
        assert self.monitor is not None
        loss, self._loss = self._loss, None
        self.monitor.step(
            trainer.global_step + 1, _scale(trainer), is_unscaled=True, loss=loss, num_samples=self._num_samples
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is still on its way."""
        assert self.monitor is not None
        self.monitor.flush()


def _scale(trainer: Trainer) -> float:
    """Return the AMP loss scale of float16; 1 in any other precision."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
