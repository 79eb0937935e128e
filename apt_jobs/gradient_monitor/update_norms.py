"""How large the weights are and how far a step moved them, every few steps.

The weights before an update are kept as a sample of at most `SAMPLE_ELEMENTS` elements over all layers, evenly spaced:
a whole copy could be what makes a training run out of memory. Between two calls of the monitor lies one update.
Shapes: L layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from apt_jobs.gradient_monitor.norms import alike, as_real, norms_of

UPDATE_EVERY_STEPS = 10
SAMPLE_ELEMENTS = 4 << 20  # 16 MiB in float32
LEAST_SAMPLE_ELEMENTS = 64  # of a layer, however many there are


class UpdateNorms:
    """Call `note` at every step for which it is due, after the backward pass and before the update."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: _Sample | None = None
        self._after: _Sample | None = None
        self._is_open = False  # the weights before an update are kept, those after it are not known
        self._step = 0

    def is_due(self, step: int) -> bool:
        """Return whether `note` has something to do at this step; else it need not be called."""
        return self._is_open or step % UPDATE_EVERY_STEPS == 0 or self._step == 0

    @torch.no_grad()
    def note(self, step: int, weights: Sequence[Tensor]) -> tuple[int, Tensor] | None:
        """Return, when due, the step whose update is now known, and [weight norms L, update ratios L] on the device."""
        result = None
        places = [weight.data_ptr() for weight in weights]
        if self._is_open and self._before is not None and self._after is not None:
            if self._before.places == places:
                result = self._step, self._measure(weights, self._before.values, self._after.take())
            self._is_open = False
        if step % UPDATE_EVERY_STEPS == 0 or self._step == 0:  # the first one shows a bad learning rate at once
            if self._before is None or self._before.places != places:
                self._before, self._after = _Sample(weights, places), _Sample(weights, places)
            self._before.take()
            self._is_open, self._step = True, step
        return result

    def _measure(self, weights: Sequence[Tensor], before: list[Tensor], after: list[Tensor]) -> Tensor:
        moved = norms_of(torch._foreach_sub(after, before), self._device)
        of_sample = norms_of(after, self._device)
        ratios = moved / of_sample.clamp_min(torch.finfo(torch.float32).tiny)
        return torch.cat([norms_of(weights, self._device), ratios])


class _Sample:
    """Evenly spaced elements of each layer, and room for a copy of them in float32; both are made once."""

    def __init__(self, weights: Sequence[Tensor], places: list[int]) -> None:
        most = max(SAMPLE_ELEMENTS // max(len(weights), 1), LEAST_SAMPLE_ELEMENTS)
        self.places = places
        rows = [_in_a_row(as_real(weight)) for weight in weights]
        parts = [row[:: max(len(row) // most, 1)] for row in rows]
        self.values: list[Tensor] = [torch.empty(0)] * len(weights)
        self._copies: list[tuple[Tensor, list[Tensor]]] = []  # one launch for the weights of a type and device
        for indexes in alike(parts):
            sources = [parts[index] for index in indexes]
            to = torch.empty(sum(map(len, sources)), dtype=torch.float32, device=sources[0].device)
            self._copies.append((to, sources))
            for index, values in zip(indexes, torch.split(to, [len(source) for source in sources]), strict=True):
                self.values[index] = values

    def take(self) -> list[Tensor]:
        """Return the elements as they are now. Overwrites what was returned before."""
        for to, sources in self._copies:
            torch.cat(sources, out=to)
        return self.values


def _in_a_row(weight: Tensor) -> Tensor:
    """Return the elements as they lie in memory, not copied; of a weight with gaps one line of it."""
    strides = weight.stride()
    line = weight.permute(sorted(range(weight.dim()), key=lambda dimension: -strides[dimension]))
    if line.is_contiguous():
        return line.view(-1)
    while line.dim() > 1:
        line = line.select(-1, 0)
    return line
