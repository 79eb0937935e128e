"""Numbers on their way from the GPU to the host: copied to pinned memory, read when they are there, never waited for.

What finds no free slot is dropped and counted: the training goes on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RING_SLOTS = 4  # steps whose numbers may be on their way at once
Label = TypeVar("Label")


@dataclass(slots=True)
class _Slot:
    host: Tensor  # pinned float32
    event: Any  # torch.cuda.Event
    label: Any = None
    size: int = 0
    number: int = -1  # -1: free


class PinnedRing(Generic[Label]):
    """Carries float32 vectors with a label each, in order. On a CPU they are there at once."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._slots: list[_Slot] = []
        self._ready: list[tuple[Label, NDArray[np.float32]]] = []
        self._number = 0
        self.num_dropped = 0

    def send(self, values: Tensor, label: Label) -> None:
        """Start the copy of a 1-d tensor."""
        if not self._is_cuda:
            self._ready.append((label, values.numpy()))
            return
        slot = self._free_slot(values.numel())
        if slot is None:
            self.num_dropped += 1
            return
        slot.host[: values.numel()].copy_(values, non_blocking=True)
        slot.event.record()
        slot.label, slot.size, slot.number = label, values.numel(), self._number
        self._number += 1

    def collect(self, *, wait: bool = False) -> Iterator[tuple[Label, NDArray[np.float32]]]:
        """Yield what has arrived, oldest first; with `wait` everything that was sent."""
        ready, self._ready = self._ready, []
        yield from ready
        for slot in sorted((slot for slot in self._slots if slot.number >= 0), key=lambda slot: slot.number):
            if wait:
                slot.event.synchronize()
            elif not slot.event.query():
                return
            values = slot.host[: slot.size].numpy().copy()
            slot.number = -1
            yield slot.label, values

    def _free_slot(self, size: int) -> _Slot | None:
        if len(self._slots) < RING_SLOTS:
            event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self._slots.append(_Slot(torch.empty(size, pin_memory=True), event))
        free = next((slot for slot in self._slots if slot.number < 0), None)
        if free is not None and free.host.numel() < size:
            free.host = torch.empty(size, pin_memory=True)
        return free
