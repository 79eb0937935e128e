"""The layers that a monitor watches: trainable parameters by name, and the norms of their gradients.

Shapes: L layers.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from apt_jobs.errors import InvalidInput
from apt_jobs.gradient_monitor.norms import local_part, norms_of

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module"})  # parts of names that DDP and compile add


class WatchedLayers:
    """Trainable parameters of `model`. The order never changes; parameters that are trained later come at the end."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.names: list[str] = []
        self.index_of: dict[int, int] = {}  # by id(parameter)
        self._parameters: list[nn.Parameter] = []
        self._not_empty: list[int] = []
        self._num_trainable = -1
        self.look_for_new()
        self.device = self._parameters[0].device if self._parameters else torch.device("cpu")
        self._zero = torch.zeros((), device=self.device)
        self._mesh = _mesh_of(self._parameters)

    def look_for_new(self) -> bool:
        """Watch parameters that were added or unfrozen since the last call. True: there are some."""
        if self._num_trainable >= 0 and self._num_trainable == _count_trainable(self._model):
            return False
        num_known = len(self.names)
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and id(parameter) not in self.index_of:
                self.index_of[id(parameter)] = len(self.names)
                self.names.append(_plain_name(name))
                self._parameters.append(parameter)
        self._num_trainable = _count_trainable(self._model)
        self._not_empty = [index for index, parameter in enumerate(self._parameters) if parameter.numel()]
        return num_known < len(self.names)

    def local_weights(self) -> list[Tensor]:
        """Return the weights [L]; of sharded ones this rank's part."""
        return [local_part(parameter.detach()) for parameter in self._parameters]

    def norms(self) -> tuple[Tensor, NDArray[np.bool_]]:
        """Return the float32 norm of each gradient [L] on the device, and which layers have a gradient [L].

        One fused call. For sharded gradients (FSDP2) one collective, as no rank has a whole one.
        """
        gradients = [parameter.grad for parameter in self._parameters]
        order = [index for index in self._not_empty if gradients[index] is not None]
        present = np.zeros(len(gradients), np.bool_)
        present[order] = True
        parts = [gradient for index in order if (gradient := gradients[index]) is not None]
        if self._mesh is not None:
            parts = [local_part(gradient) for gradient in parts]
        norms = norms_of(parts, self.device)
        if len(order) < len(gradients):  # the others count as 0
            of_layer = dict(zip(order, norms.unbind(), strict=True))
            norms = torch.stack([of_layer.get(index, self._zero) for index in range(len(gradients))])
        return self.whole(norms), present

    def whole(self, norms: Tensor) -> Tensor:
        """Return the norms [L] of whole tensors, from each rank's norms of its shards; of whole tensors as they are.

        Called by every rank.
        """
        if self._mesh is None:
            return norms
        is_sharded = [isinstance(parameter, DTensor) for parameter in self._parameters]
        squares = norms.double().square()
        for dimension, is_split in enumerate(self._mesh[1]):
            if is_split:
                dist.all_reduce(squares, group=self._mesh[0].get_group(dimension))
        summed = squares.sqrt().float()
        return summed if all(is_sharded) else torch.where(torch.tensor(is_sharded, device=norms.device), summed, norms)


def require_same_layers(names: tuple[str, ...], device: torch.device) -> None:
    """Compare a hash of the names over the ranks, so that no rank waits for another's later collective.

    Raises:
        InvalidInput: they differ (on every rank).
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    digest = int.from_bytes(hashlib.sha256("\n".join(names).encode()).digest()[:7], "big")
    if dist.get_backend() == "nccl":  # also on a rank without layers, whose device is not known from them
        device = torch.device("cuda", torch.cuda.current_device())
    mine = torch.tensor([digest], dtype=torch.int64, device=device)
    all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_ranks, mine)
    different = [rank for rank, other in enumerate(all_ranks) if other.item() != all_ranks[0].item()]
    if different:
        raise InvalidInput(f"ranks {different} have other layers than rank 0; every rank must build the same model")


def _count_trainable(model: nn.Module) -> int:
    return sum(parameter.requires_grad for parameter in _parameters_of(model))


def _parameters_of(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for module in model.modules() for p in module._parameters.values() if p is not None)


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _mesh_of(parameters: list[nn.Parameter]) -> tuple[DeviceMesh, tuple[bool, ...]] | None:
    """Return the mesh that parameters are sharded on, and in which of its dimensions; None: they are whole."""
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            return parameter.device_mesh, tuple(isinstance(place, Shard) for place in parameter.placements)
    return None
