"""Each rank's own gradient norms: what the backward pass gave this rank, before DDP averages the ranks.

DDP reduces copies of the gradients, bucket by bucket, and puts the averages in their places when the pass is over. So
all of a rank's own gradients are there when the pass ends and DDP waits for its last bucket: there they are measured,
all at once (`AtTheEnd`). Where DDP keeps no copies, each bucket is measured before its reduction begins (`EachBucket`).
Either way the gradients are the accumulated ones, once per optimizer step (not under `no_sync`), multiplied by the AMP
scale.
Shapes: L layers.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakMethod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from apt_jobs.gradient_monitor.norms import norms_of

ORDER_SETTLED_AT = 2  # steps that were seen: DDP rebuilds its buckets after the first


class LocalNorms:
    """What a rank saw of its own gradients in the last backward pass, until `take`."""

    def __init__(self, device: torch.device) -> None:
        self.wanted = True  # False: measure nothing, as this step is not recorded
        self._device, self._is_cuda = device, device.type == "cuda"
        self._seen: list[tuple[Sequence[Tensor], Tensor]] = []  # parameters as they became ready, their norms
        self._ready: Any = None

    def take(self, index_of: dict[int, int]) -> tuple[Tensor | None, list[int], Any]:
        """Return the last backward pass's norms (None: none was seen), their layers in order, and when it was done.

        `index_of` maps `id(parameter)` to the layer's index.
        """
        seen, self._seen = self._seen, []
        ready, self._ready = self._ready, None
        if not seen:
            return None, [], None
        places = [index_of.get(id(parameter), -1) for parameters, _ in seen for parameter in parameters]
        norms = seen[0][1] if len(seen) == 1 else torch.cat([measured for _, measured in seen])
        last_of = {place: position for position, place in enumerate(places) if place >= 0}
        if len(last_of) < len(places):
            norms = torch.stack([norms[position] for position in last_of.values()])
        return norms, list(last_of), ready


class AtTheEnd(LocalNorms):
    """Measures all gradients when a backward pass is over, while DDP still reduces its copies of the last ones.

    PyTorch calls what was queued in a pass at its end, in that order. DDP queues its own end once it has seen the last
    gradient: whatever a hook on any gradient queues comes earlier. One hook is enough, on the gradient that is ready
    last; an earlier one may belong to a pass within the pass (reentrant checkpointing), which ends earlier.

    The hooks do not keep this object alive: it knows the DDP module, whose parameters have the hooks, and Python does
    not free such a circle. The process group and its threads would live until the process is taken apart, and abort it
    there now and then.
    """

    def __init__(self, ddp: DistributedDataParallel, device: torch.device) -> None:
        super().__init__(device)
        self._ddp = ddp
        named = ddp.module.named_parameters()
        self._parameters = [p for name, p in named if p.requires_grad and name not in ddp.parameters_to_ignore]
        note = WeakMethod(self._note)
        self._hooks = {p: p.register_post_accumulate_grad_hook(partial(_call, note)) for p in self._parameters}
        self._noted: dict[nn.Parameter, None] = {}  # since `take`, as they became ready
        self._pass = -1
        self._num_steps = 0

    def take(self, index_of: dict[int, int]) -> tuple[Tensor | None, list[int], Any]:
        if self._seen:
            self._num_steps += 1
            if self._num_steps == ORDER_SETTLED_AT and not self._ddp.find_unused_parameters:
                last = next(reversed(self._noted))
                for parameter, hook in self._hooks.items():
                    if parameter is not last:
                        hook.remove()
        self._noted.clear()
        return super().take(index_of)

    def _note(self, parameter: nn.Parameter) -> None:
        self._noted[parameter] = None
        current = torch._C._current_graph_task_id()
        if self._pass != current and self.wanted and self._ddp.require_backward_grad_sync:
            self._pass = current
            torch.autograd.Variable._execution_engine.queue_callback(self._measure)

    @torch.no_grad()
    def _measure(self) -> None:
        self._ready = moment(is_cuda=self._is_cuda)
        if len(self._noted) > 1:  # only one: its hook is the last that there is
            self._parameters = [*self._noted, *(p for p in self._parameters if p not in self._noted)]
        gradients = {p: p.grad for p in self._parameters if p.grad is not None}
        if gradients:
            self._seen = [(list(gradients), norms_of(list(gradients.values()), self._device))]


def _call(note: WeakMethod[Any], parameter: nn.Parameter) -> None:
    """Return the hook of a parameter."""
    method = note()
    if method is not None:
        method(parameter)


class EachBucket(LocalNorms):
    """Measures each bucket of DDP in its communication hook, which divides by the number of ranks by itself.

    Buckets are rebuilt after the first iteration, so nothing is keyed on their index.

    Raises:
        RuntimeError: `ddp` has a communication hook already.
    """

    def __init__(self, ddp: DistributedDataParallel, device: torch.device) -> None:
        super().__init__(device)
        self._group: dist.ProcessGroup = ddp.process_group
        self._averages = dist.get_backend(self._group) == "nccl"
        ddp.register_comm_hook(self, _measure_and_average)

    def measure_and_average(self, bucket: GradBucket) -> Future[Tensor]:
        """Measure a bucket before its reduction begins, without a wait and without a copy to the host."""
        buffer = bucket.buffer()
        if self.wanted:
            gradients = [buffer] if buffer.is_sparse else bucket.gradients()
            self._seen.append((bucket.parameters(), norms_of(gradients, self._device)))
            if bucket.is_last():
                self._ready = moment(is_cuda=self._is_cuda)
        options = dist.AllreduceOptions()
        if self._averages:
            options.reduceOp = dist.ReduceOp(dist.ReduceOp.AVG)
        else:
            buffer.div_(self._group.size())
        work = self._group.allreduce([buffer], options)
        future: Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
        return future


def local_norms_of(ddp: DistributedDataParallel, device: torch.device) -> LocalNorms:
    """Return the way that fits how `ddp` treats gradients.

    Raises:
        RuntimeError: each bucket has to be seen, but `ddp` has a communication hook already.
    """
    is_sparse = any(getattr(module, "sparse", False) for module in ddp.module.modules())  # reduced in place
    is_copied = not (ddp.gradient_as_bucket_view or ddp.static_graph or is_sparse) and ddp.mixed_precision is None
    return (AtTheEnd if is_copied else EachBucket)(ddp, device)


def moment(*, is_cuda: bool) -> Any:
    """Now, on the device: a timing event, or seconds."""
    if not is_cuda:
        return time.perf_counter()
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    event.record()
    return event


def elapsed_ms(begin: Any, end: Any) -> float | None:
    """Return milliseconds between two moments that both have passed; None if one of them is missing."""
    if begin is None or end is None:
        return None
    if isinstance(begin, float):
        return 1000.0 * float(end - begin)
    return float(begin.elapsed_time(end))


def _measure_and_average(state: EachBucket, bucket: GradBucket) -> Future[Tensor]:
    """Return the hook. DDP asks for a function whose argument is named `bucket`."""
    return state.measure_and_average(bucket)
