"""An exponential moving average of the trained weights, kept beside them on each rank, sharded as they are.

With it a checkpoint's model is the average, which is what is validated and what generates; the weights that are trained
are in a file of their own, from which a training goes on.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from apt_jobs.gradient_monitor.norms import local_part


class WeightAverage:
    """Polyak averaging with exponential weights, in float32.

    The decay grows with the steps, min(decay, (1 + step) / (10 + step)), so that the first weights, which are random,
    are soon forgotten (as in TensorFlow's `ExponentialMovingAverage` with `num_updates`).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with the weights that the model has. It is spread over the ranks already."""
        self._model, self._decay = model, decay
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._averages = [weight.clone() for weight in self._weights()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after an optimizer step (from 1). No collective, no wait for a GPU."""
        decay = min(self._decay, (1.0 + step) / (10.0 + step))
        torch._foreach_lerp_(self._averages, self._weights(), 1.0 - decay)

    @torch.no_grad()
    def reset(self) -> None:
        """Take the weights that the model has for the average."""
        torch._foreach_copy_(self._averages, self._weights())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model be the average within. What is gathered of sharded weights is gathered again after it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        reshard(self._model)
        for weight, average in zip(self._weights(), self._averages, strict=True):
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)

    def _weights(self) -> list[Tensor]:
        """Return what this rank has of the trained weights."""
        return [local_part(parameter.detach()) for parameter in self._parameters]


def reshard(model: nn.Module) -> None:
    """Let go of weights that a forward pass without a backward one has left gathered: they are about to change."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
