"""Each rank's own gradient norms, taken in DDP's communication hook: the last place where ranks can be told apart.

The hook sees the local, accumulated gradient once per optimizer step (not under `no_sync`), bucket by bucket in the
order of the backward pass, multiplied by the AMP scale. It divides by the number of ranks by itself. Buckets are
rebuilt after the first iteration, so nothing is keyed on their index. A bucket is a copy of the gradients, which stay
as they are until all buckets are reduced: so they are measured all at once, while the last bucket is on its way. Only
where a bucket is no copy, each is measured before its reduction begins.
Shapes: L layers.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

CPU_PIECE_ELEMENTS = 1 << 16  # PyTorch adds a whole CPU tensor in float32: of 38 million elements 0.3 % get lost


class Placement:
    """Puts norms that came in some order at their layers' places."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._zero = torch.zeros((), device=device)

    def place(self, norms: Sequence[Tensor], order: Sequence[int], num_layers: int) -> Tensor:
        """Float32 norms [L]; layers not in `order` are 0. Of a layer that is there twice the last counts."""
        if len({norm.get_device() for norm in norms} | {self._zero.get_device()}) > 1:
            norms = [norm.to(self._device) for norm in norms]
        placed = [self._zero] * num_layers
        for index, norm in zip(order, norms, strict=True):
            placed[index] = norm
        return torch.stack(placed) if placed else torch.zeros(0, device=self._device)


def norms_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """L2 norm of each tensor as a float32 scalar: one fused call for each type and device. Sparse ones are allowed."""
    groups: dict[tuple[torch.dtype, int], list[int]] = {}
    dense = [tensor if tensor.layout is torch.strided else tensor.coalesce().values() for tensor in tensors]
    kinds = [(tensor.dtype, tensor.get_device()) for tensor in dense]
    if len(set(kinds)) == 1:  # nearly always; the host's time for a step can be as short as the GPU's
        return list(_foreach_norm(dense))
    for index, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(index)
    norms: list[Tensor] = [torch.empty(0)] * len(dense)
    for indexes in groups.values():
        measured = _foreach_norm([dense[index] for index in indexes])
        for index, norm in zip(indexes, measured, strict=True):
            norms[index] = norm
    return norms


def _foreach_norm(tensors: list[Tensor]) -> Sequence[Tensor]:
    """Norms of tensors of one type and device. Large ones on a CPU are added up in pieces, as GPUs do by themselves."""
    if tensors[0].device.type != "cpu":
        return torch._foreach_norm(tensors, 2, dtype=torch.float32)
    pieces = [torch.split(tensor.reshape(-1), CPU_PIECE_ELEMENTS) for tensor in tensors]
    measured = torch._foreach_norm([piece for of_tensor in pieces for piece in of_tensor], 2, dtype=torch.float32)
    norms, start = list[Tensor](), 0
    for of_tensor in pieces:
        of_pieces = measured[start : start + len(of_tensor)]
        norms.append(of_pieces[0] if len(of_pieces) == 1 else torch.linalg.vector_norm(torch.stack(of_pieces)))
        start += len(of_tensor)
    return norms


class LocalNorms:
    """Registers the hook on `ddp` and keeps what it saw until `take`.

    Raises:
        RuntimeError: `ddp` has a communication hook already.
    """

    def __init__(self, ddp: DistributedDataParallel, device: torch.device) -> None:
        self.wanted = True  # False: only average, as this step is not recorded
        self.group: dist.ProcessGroup = ddp.process_group
        self.world_size = self.group.size()
        self.averages = dist.get_backend(self.group) == "nccl"
        self._is_cuda = device.type == "cuda"
        self._has_copies = not ddp.gradient_as_bucket_view and ddp.mixed_precision is None
        self._seen: list[tuple[list[Tensor], list[Tensor]]] = []
        self._waiting: list[Tensor] = []  # parameters whose gradients are measured with the last bucket
        self._placement = Placement(device)
        self._ready: Any = None
        ddp.register_comm_hook(self, _measure_and_average)

    def see(self, bucket: GradBucket) -> None:
        """Called before the reduction of a bucket begins. No wait, no copy to the host."""
        buffer, parameters = bucket.buffer(), bucket.parameters()
        if self._has_copies and not buffer.is_sparse:
            self._waiting += parameters
        else:
            self._seen.append((parameters, norms_of([buffer] if buffer.is_sparse else bucket.gradients())))
        if bucket.is_last():
            self._ready = moment(is_cuda=self._is_cuda)

    def see_rest(self) -> None:
        """Called when the reduction of the last bucket has begun, and none of a gradient itself."""
        waiting, self._waiting = self._waiting, []
        parameters = [parameter for parameter in waiting if parameter.grad is not None]
        if parameters:
            self._seen.append((parameters, norms_of([p.grad for p in parameters if p.grad is not None])))

    def take(self, index_of: dict[int, int], num_layers: int) -> tuple[Tensor | None, list[int], Any]:
        """Norms [L] of the last backward pass (None: none was seen), layers in its order, and when it was done.

        `index_of` maps `id(parameter)` to the layer's index.
        """
        seen, self._seen = self._seen, []
        ready, self._ready = self._ready, None
        if not seen:
            return None, [], None
        order = [index_of.get(id(parameter), -1) for parameters, _ in seen for parameter in parameters]
        norms = [norm for _, measured in seen for norm in measured]
        known = {index: place for place, index in enumerate(order) if index >= 0}  # the last of a layer counts
        ordered = list(known)
        placed = self._placement.place([norms[known[index]] for index in ordered], ordered, num_layers)
        return placed, ordered, ready


def moment(*, is_cuda: bool) -> Any:
    """Now, on the device: a timing event, or seconds."""
    if not is_cuda:
        return time.perf_counter()
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    event.record()
    return event


def elapsed_ms(begin: Any, end: Any) -> float | None:
    """Milliseconds between two moments that both have passed; None if one of them is missing."""
    if begin is None or end is None:
        return None
    if isinstance(begin, float):
        return 1000.0 * float(end - begin)
    return float(begin.elapsed_time(end))


def _measure_and_average(state: LocalNorms, bucket: GradBucket) -> Future[Tensor]:
    """The hook. DDP asks for an argument of the name `bucket`."""
    if state.wanted:
        state.see(bucket)
    buffer = bucket.buffer()
    options = dist.AllreduceOptions()
    if state.averages:
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.AVG)
    else:
        buffer.div_(state.world_size)
    work = state.group.allreduce([buffer], options)
    if state.wanted and bucket.is_last():
        state.see_rest()
    future: Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future
