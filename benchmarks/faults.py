"""Faults that are put into a real training: each changes a batch, a gradient, a weight, the loss or the learning rate.

A fault begins at one step and, unless it is a single event, lasts. `Fault` says where it really is, so that what a
rule names can be judged.
"""

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

FaultKind = Literal[
    "nan_batch", "inf_gradient", "exploding_layer", "frozen_layer", "learning_rate", "labels", "bit_flip", "scaled_loss"
]
FAULTS: tuple[FaultKind, ...] = (
    *("nan_batch", "inf_gradient", "exploding_layer", "frozen_layer"),
    *("learning_rate", "labels", "bit_flip", "scaled_loss"),
)
TIMES = 10.0  # of an exploding layer, and of a scaled loss
LEARNING_RATE_TIMES = 100.0
EXPONENT_BITS = range(23, 31)  # of a float32


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong, from which step on, and where. None: on all ranks, in no single layer."""

    kind: FaultKind
    step: int
    rank: int | None
    layer: str | None


def draw(kind: FaultKind, first_step: int, num_ranks: int, model: nn.Module, seed: int) -> Fault:
    """Return a fault at one of ten steps, on any rank, in any matrix of the blocks. The same on every rank."""
    dice = random.Random(f"{kind} {seed}")
    matrices = [name for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("blocks.")]
    has_rank = kind in ("nan_batch", "inf_gradient", "labels", "bit_flip", "scaled_loss")
    has_layer = kind in ("inf_gradient", "exploding_layer", "frozen_layer", "bit_flip")
    step, rank, layer = first_step + dice.randrange(10), dice.randrange(num_ranks), dice.choice(matrices)
    return Fault(kind, step, rank if has_rank else None, layer if has_layer else None)


class Injection:
    """Puts one fault into the training of one rank, while it is entered. `step` is set before each step."""

    def __init__(self, fault: Fault, model: nn.Module, rank: int, seed: int) -> None:
        self._fault, self._model = fault, model
        self._is_here = fault.rank is None or fault.rank == rank
        self._dice = random.Random(seed)
        self._step = 0

    def begin(self, step: int) -> None:
        """To be called before the step: a bit flips between two steps."""
        self._step = step
        if self._now and self._fault.kind == "bit_flip" and self._is_here:
            self._flip()

    @property
    def learning_rate_factor(self) -> float:
        return LEARNING_RATE_TIMES if self._since and self._fault.kind == "learning_rate" else 1.0

    def labels(self, ids: Tensor) -> Tensor:
        """Return what the model is to predict: of a rank with corrupted labels, anything."""
        if self._since and self._is_here and self._fault.kind == "labels":
            return torch.randint(0, int(self._model.tokens.num_embeddings), ids.shape)  # type: ignore[union-attr, arg-type]  # GPT2's own
        return ids

    def loss(self, loss: Tensor) -> Tensor:
        """Return the loss that is differentiated."""
        is_scaled = self._since and self._is_here and self._fault.kind == "scaled_loss"
        return loss * TIMES if is_scaled else loss

    def hooks(self) -> list[Callable[[], None]]:
        """Hang the fault into the model; what is returned takes it out again."""
        if not self._is_here:
            return []
        if self._fault.kind == "nan_batch":
            handle = self._model.tokens.register_forward_hook(self._spoil_sample)  # type: ignore[union-attr]  # GPT2's own
            return [handle.remove]
        if self._fault.kind in ("inf_gradient", "exploding_layer", "frozen_layer"):
            layer = self._model.get_parameter(self._fault.layer or "")
            return [layer.register_hook(self._spoil_gradient).remove]  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return []

    @property
    def _since(self) -> bool:
        return self._step >= self._fault.step

    @property
    def _now(self) -> bool:
        return self._step == self._fault.step

    def _spoil_sample(self, module: nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor | None:
        if not self._now:
            return None
        poison = torch.zeros_like(embedded)
        poison[0, 0, 0] = torch.nan
        return embedded + poison

    def _spoil_gradient(self, gradient: Tensor) -> Tensor | None:
        if self._fault.kind == "inf_gradient":
            if not self._now:
                return None
            spoilt = gradient.clone()
            spoilt.view(-1)[self._dice.randrange(spoilt.numel())] = torch.inf
            return spoilt
        if not self._since:
            return None
        return gradient * (TIMES if self._fault.kind == "exploding_layer" else 0.0)

    @torch.no_grad()
    def _flip(self) -> None:
        weights = self._model.get_parameter(self._fault.layer or "").view(-1)
        index, bit = self._dice.randrange(weights.numel()), self._dice.choice(EXPONENT_BITS)
        (bits,) = struct.unpack("<I", struct.pack("<f", float(weights[index])))
        (flipped,) = struct.unpack("<f", struct.pack("<I", bits ^ (1 << bit)))
        weights[index] = flipped
