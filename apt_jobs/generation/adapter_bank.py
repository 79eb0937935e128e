"""Low-rank matrices of several adapters beside one model: rows of different ones share its weights in one forward.

Behind each linear layer that an adapter changes a hook adds `x A B` (Hu et al. 2021, equation 3), with the A and B of
each row's own adapter. Where no row of a forward has an adapter the hooks cost a comparison a layer.
Shapes: N rows of a forward, Q tokens of a row, S slots of adapters (slot 0 is that of rows without one), I inputs and
O outputs of a layer, R rank.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from apt_jobs.generation.models import Fingerprint, LoadedModel

RANKS = 8  # ranks are padded to a multiple of this, so that most adapters have one size

Matrices = Mapping[str, tuple[Tensor, Tensor]]  # of a layer by its name: A (I, R) and B (R, O), the scale in B


class _Step(threading.local):
    """Which adapter the rows of this thread's forward have."""

    slot_N: Tensor | None = None
    only: int | None = None  # that of all rows, where the host knows that it is one
    reached: set[str] | None = None  # receives the layers whose hooks were called


_step = _Step()


@contextmanager
def adapting(slot_N: Tensor) -> Iterator[None]:
    """Let the rows of a forward be changed by the adapters in these slots. Nothing here waits for a GPU."""
    if slot_N.device.type == "cpu":
        slots = slot_N.tolist()
        _step.only = slots[0] if len(set(slots)) == 1 else None
    if _step.only != 0:
        _step.slot_N = slot_N
    try:
        yield
    finally:
        _step.slot_N = _step.only = None


def adapting_rows(slots: Sequence[int], device: torch.device) -> AbstractContextManager[None]:
    """Do the same for rows whose adapters the host knows."""
    return adapting(torch.tensor(slots, device=device)) if any(slots) else nullcontext()


@contextmanager
def reached_layers() -> Iterator[set[str]]:
    """Collect the names of the layers that a forward passes and adapters change."""
    _step.reached = set()
    try:
        yield _step.reached
    finally:
        _step.reached = None


@dataclass(slots=True)
class _Layer:
    a_SIR: Tensor
    b_SRO: Tensor
    hook: RemovableHandle


class AdapterBank:
    """The matrices of all slots. All calls come from one thread.

    Its tensors move when it grows; `version` then is another one, and what was captured before is of no use.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._layers: dict[str, _Layer] = {}
        self._num_slots = self._rank = 0
        self.version = 0

    def growth_bytes(self, slot: int, matrices: Matrices) -> int:
        """Return the memory that `write` will take in addition to what it frees."""
        num_slots, rank = self._size_with(slot, matrices)
        sizes = {name: a_IR.shape[0] + b_RO.shape[1] for name, (a_IR, b_RO) in matrices.items()}
        sizes |= {name: layer.a_SIR.shape[1] + layer.b_SRO.shape[2] for name, layer in self._layers.items()}
        held = sum(layer.a_SIR.numel() + layer.b_SRO.numel() for layer in self._layers.values())
        return (num_slots * rank * sum(sizes.values()) - held) * self._dtype.itemsize

    @torch.inference_mode()
    def write(self, slot: int, matrices: Matrices) -> None:
        """Put an adapter into a slot in place of what was there."""
        num_slots, rank = self._size_with(slot, matrices)
        for name in sorted({*self._layers, *matrices}):
            layer = self._layers.get(name)
            if layer is None:
                a_IR, b_RO = matrices[name]
                hook = self._model.get_submodule(name).register_forward_hook(self._hook_of(name))
                layer = self._layers[name] = _Layer(
                    self._zeros(num_slots, a_IR.shape[0], rank), self._zeros(num_slots, rank, b_RO.shape[1]), hook
                )
                self.version += 1
            elif layer.a_SIR.shape[::2] != (num_slots, rank):
                layer.a_SIR = self._grown(layer.a_SIR, num_slots, layer.a_SIR.shape[1], rank)
                layer.b_SRO = self._grown(layer.b_SRO, num_slots, rank, layer.b_SRO.shape[2])
                self.version += 1
            layer.a_SIR[slot].zero_()
            layer.b_SRO[slot].zero_()
            if name in matrices:
                a_IR, b_RO = matrices[name]
                layer.a_SIR[slot, :, : a_IR.shape[1]] = a_IR
                layer.b_SRO[slot, : b_RO.shape[0]] = b_RO
        self._num_slots, self._rank = num_slots, rank

    def close(self) -> None:
        """Leave the model as it was."""
        for layer in self._layers.values():
            layer.hook.remove()
        self._layers = {}
        self._num_slots = self._rank = 0

    def _size_with(self, slot: int, matrices: Matrices) -> tuple[int, int]:
        rank = max((a_IR.shape[1] for a_IR, _ in matrices.values()), default=1)
        num_slots = max(self._num_slots, 1 << slot.bit_length())  # a power of two: moving is rare
        return num_slots, max(self._rank, (rank + RANKS - 1) // RANKS * RANKS)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def _grown(self, old: Tensor, *shape: int) -> Tensor:
        new = self._zeros(*shape)
        new[: old.shape[0], : old.shape[1], : old.shape[2]] = old
        return new

    def _hook_of(self, name: str) -> Any:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if _step.slot_N is None:
                return None
            if _step.reached is not None:
                _step.reached.add(name)
            layer = self._layers[name]
            return output + _change(inputs[0], layer, _step.slot_N, _step.only).view_as(output)

        return add


class User(Protocol):
    """Who needs an adapter to stay in its slot."""

    @property
    def is_at_work(self) -> bool:
        """Say whether any of its texts may still be computed."""


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """One version of an adapter, or of several, one upon the other: one that was replaced on disk is another one."""

    folders: tuple[Path, ...]
    fingerprint: Fingerprint


@dataclass(slots=True, eq=False)
class Adapter:
    """An adapter that was read. `model`: its base model as it is with it."""

    key: AdapterKey
    model: LoadedModel
    matrices: Matrices
    bank: AdapterBank
    slot: int = 0  # 0: none
    users: list[User] = field(default_factory=list)

    @property
    def is_at_work(self) -> bool:
        self.users = [user for user in self.users if user.is_at_work]
        return bool(self.users)


def _change(x: Tensor, layer: _Layer, slot_N: Tensor, only: int | None) -> Tensor:
    """Return what the adapters add behind a layer. Some models flatten rows and tokens before a layer."""
    if only is not None:
        return x @ layer.a_SIR[only] @ layer.b_SRO[only]
    x_NQI = x.reshape(slot_N.shape[0], -1, x.shape[-1])
    return torch.bmm(torch.bmm(x_NQI, layer.a_SIR[slot_N]), layer.b_SRO[slot_N])
