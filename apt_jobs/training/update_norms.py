"""How large the weights are and how far a step moved them, every few steps.

The weights before an update are kept as a sample of at most `SAMPLE_ELEMENTS` elements over all layers, evenly spaced:
a whole copy could be what makes a training run out of memory. Between two calls of the monitor lies one update.
Shapes: L layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from apt_jobs.training.local_norms import norms_of

UPDATE_EVERY_STEPS = 10
SAMPLE_ELEMENTS = 4 << 20  # 16 MiB in float32
LEAST_SAMPLE_ELEMENTS = 64  # of a layer, however many there are


class UpdateNorms:
    """Call `note` at every step, after the backward pass and before the update."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: list[Tensor] | None = None
        self._step = 0

    @torch.no_grad()
    def note(self, step: int, weights: Sequence[Tensor]) -> tuple[int, Tensor] | None:
        """The step whose update is now known and [weight norms L, update ratios L] on the device, when it is due."""
        result = None
        if self._before is not None:
            if len(self._before) == len(weights):
                result = self._step, self._measure(weights, self._before)
            self._before = None
        if step % UPDATE_EVERY_STEPS == 0 or self._step == 0:  # the first one shows a bad learning rate at once
            self._before, self._step = self._sample(weights), step
        return result

    def _measure(self, weights: Sequence[Tensor], before: list[Tensor]) -> Tensor:
        after = self._sample(weights)
        moved = torch.stack(norms_of(torch._foreach_sub(after, before)))
        of_sample = torch.stack(norms_of(after))
        ratios = moved / of_sample.clamp_min(torch.finfo(torch.float32).tiny)
        whole = torch.stack([norm.to(self._device) for norm in norms_of(weights)])
        return torch.cat([whole, ratios.to(self._device)])

    def _sample(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Evenly spaced elements of each layer, copied, in float32. Layers that are taken whole share one launch."""
        most = max(SAMPLE_ELEMENTS // max(len(weights), 1), LEAST_SAMPLE_ELEMENTS)
        flat = [weight.reshape(-1) for weight in weights]
        parts = [weight[:: max(weight.numel() // most, 1)] for weight in flat]
        copies = [torch.empty(part.shape, dtype=torch.float32, device=part.device) for part in parts]
        is_whole = [part.is_contiguous() for part in parts]
        torch._foreach_copy_(_where(copies, is_whole), _where(parts, is_whole))
        for copy, part in zip(_where(copies, is_whole, False), _where(parts, is_whole, False), strict=True):
            copy.copy_(part)
        return copies


def _where(tensors: Sequence[Tensor], flags: Sequence[bool], wanted: bool = True) -> list[Tensor]:
    return [tensor for tensor, flag in zip(tensors, flags, strict=True) if flag is wanted]
