"""Each rank's own gradient norms, taken in DDP's communication hook: the last place where ranks can be told apart.

The hook sees the local, accumulated gradient once per optimizer step (not under `no_sync`), bucket by bucket in the
order of the backward pass, multiplied by the AMP scale. It divides by the number of ranks by itself. Buckets are
rebuilt after the first iteration, so nothing is keyed on their index.
Shapes: L layers.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

CPU_PIECE_ELEMENTS = 1 << 16  # PyTorch adds a whole CPU tensor in float32: of 38 million elements 0.3 % get lost
SPLIT_ELEMENTS = 1 << 24  # GPU tensors with more in all are measured on two streams


class Placement:
    """Puts norms that came in some order at their layers' places."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._zero = torch.zeros((), device=device)

    def place(self, norms: Sequence[Tensor], order: Sequence[int], num_layers: int) -> Tensor:
        """Float32 norms [L]; layers not in `order` are 0. Of a layer that is there twice the last counts."""
        placed = [self._zero] * num_layers
        for index, norm in zip(order, norms, strict=True):
            placed[index] = norm if norm.device == self._device else norm.to(self._device)
        return torch.stack(placed) if placed else torch.zeros(0, device=self._device)


def norms_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """L2 norm of each tensor as a float32 scalar: one fused call for each type and device. Sparse ones are allowed."""
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    dense = [tensor.coalesce().values() if tensor.is_sparse else tensor for tensor in tensors]
    for index, tensor in enumerate(dense):
        groups.setdefault((tensor.dtype, tensor.device), []).append(index)
    norms: list[Tensor] = [torch.empty(0)] * len(dense)
    for indexes in groups.values():
        measured = _foreach_norm([dense[index] for index in indexes])
        for index, norm in zip(indexes, measured, strict=True):
            norms[index] = norm
    return norms


def _foreach_norm(tensors: list[Tensor]) -> Sequence[Tensor]:
    """Norms of tensors of one type and device. Large ones on a CPU are added up in pieces, as GPUs do by themselves."""
    if tensors[0].device.type != "cpu":
        return _on_two_streams(tensors)
    pieces = [torch.split(tensor.reshape(-1), CPU_PIECE_ELEMENTS) for tensor in tensors]
    measured = torch._foreach_norm([piece for of_tensor in pieces for piece in of_tensor], 2, dtype=torch.float32)
    norms, start = list[Tensor](), 0
    for of_tensor in pieces:
        of_pieces = measured[start : start + len(of_tensor)]
        norms.append(of_pieces[0] if len(of_pieces) == 1 else torch.linalg.vector_norm(torch.stack(of_pieces)))
        start += len(of_tensor)
    return norms


def _on_two_streams(tensors: list[Tensor]) -> Sequence[Tensor]:
    """One launch of `_foreach_norm` has too few blocks to fill a large GPU: two at once read a sixth faster."""
    device = tensors[0].device
    if device.type != "cuda" or len(tensors) == 1 or sum(tensor.numel() for tensor in tensors) < SPLIT_ELEMENTS:
        return torch._foreach_norm(tensors, 2, dtype=torch.float32)
    halves: tuple[list[int], list[int]] = [], []
    sizes = [0, 0]
    for index in sorted(range(len(tensors)), key=lambda index: -tensors[index].numel()):
        smaller = int(sizes[1] < sizes[0])
        halves[smaller].append(index)
        sizes[smaller] += tensors[index].numel()
    norms = list(tensors)
    current, other = torch.cuda.current_stream(device), _other_stream(device)
    other.wait_stream(current)
    for half, stream in zip(halves, (current, other), strict=True):
        with torch.cuda.stream(stream):
            measured = torch._foreach_norm([tensors[index] for index in half], 2, dtype=torch.float32)
        for index, norm in zip(half, measured, strict=True):
            norms[index] = norm
    current.wait_stream(other)
    return norms


@cache
def _other_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


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
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._seen: list[tuple[list[Tensor], list[Tensor]]] = []
        self._placement = Placement(device)
        self._ready: Any = None
        ddp.register_comm_hook(self, _measure_and_average)

    @contextmanager
    def seeing(self, bucket: GradBucket) -> Iterator[None]:
        """Measure one bucket's local gradients; no wait, no copy to the host.

        On a GPU beside the backward pass, as is what is launched within: the reduction must not begin earlier.
        """
        if bucket.is_last():
            self._ready = moment(is_cuda=self._stream is not None)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            gradients = [bucket.buffer()] if bucket.buffer().is_sparse else bucket.gradients()
            self._seen.append((bucket.parameters(), norms_of(gradients)))
            yield

    def take(self, index_of: dict[int, int], num_layers: int) -> tuple[Tensor | None, list[int], Any]:
        """Norms [L] of the last backward pass (None: none was seen), layers in its order, and when it was done.

        `index_of` maps `id(parameter)` to the layer's index.
        """
        seen, self._seen = self._seen, []
        ready, self._ready = self._ready, None
        if not seen:
            return None, [], None
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
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
    with state.seeing(bucket) if state.wanted else nullcontext():
        buffer = bucket.buffer()
        options = dist.AllreduceOptions()
        if state.averages:
            options.reduceOp = dist.ReduceOp(dist.ReduceOp.AVG)
        else:
            buffer.div_(state.world_size)
        work = state.group.allreduce([buffer], options)
    future: Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future
