"""Forward and backward pass of one micro batch as one CUDA graph, for a training on a single GPU.

A block-wise compiled model keeps a slow host busier than a fast GPU: thousands of launches a step, each through Python.
All shapes are the same in each step and nothing in a pass waits for the host, so that the launches are recorded once
and replayed by one call. Same kernels, same order, same bits.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

WARM_UP_PASSES = 2  # on the stream of the capture, so that libraries have their workspaces


class CapturedPass:
    """One pass, captured. Its gradients lie where they lay when it was captured: whoever clears `grad` loses nothing.

    Args:
        compute_loss: of a micro batch; the loss is a scalar.
        parameters: those whose gradients are to be computed.
        ids_BT: a micro batch, for the shape.
        num_micro_batches: in a step; the loss and the gradients are their mean.
    """

    def __init__(
        self,
        compute_loss: Callable[[Tensor], Tensor],
        parameters: Sequence[nn.Parameter],
        ids_BT: Tensor,
        num_micro_batches: int,
    ) -> None:
        self._parameters = list(parameters)
        self._ids = ids_BT.clone()
        self._graph = torch.cuda.CUDAGraph()
        self._sums: list[Tensor] | None = None  # of the micro batches, if there are several

        def one_pass() -> Tensor:
            loss = compute_loss(self._ids) / num_micro_batches
            torch.autograd.backward(loss)
            return loss.detach()

        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.random.fork_rng([ids_BT.device]):
            for _ in range(WARM_UP_PASSES):
                one_pass()
                self._clear()
        torch.cuda.current_stream().wait_stream(side)
        # Other threads go on with calls that a capture may not see (pinned memory of the prefetcher, NCCL's watchdog).
        with (
            torch.random.fork_rng([ids_BT.device]),
            torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"),
        ):
            self._loss = one_pass()
        self._gradients = [parameter.grad for parameter in self._parameters]
        self._clear()

    def run(self, micro_batches: Sequence[Tensor]) -> Tensor:
        """Put the gradients of a step into `grad`; returns its mean loss (scalar). No wait for the GPU."""
        total = torch.zeros_like(self._loss)
        for number, ids in enumerate(micro_batches):
            self._ids.copy_(ids)
            self._graph.replay()
            total += self._loss
            if len(micro_batches) > 1:
                self._add(is_first=number == 0)
        gradients = self._gradients if self._sums is None else self._summed()
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return total

    def _add(self, *, is_first: bool) -> None:
        """Keep this micro batch's gradients: the next replay overwrites them."""
        found = [gradient for gradient in self._gradients if gradient is not None]
        if self._sums is None:
            self._sums = [torch.empty_like(gradient) for gradient in found]
        if is_first:
            torch._foreach_copy_(self._sums, found)
        else:
            torch._foreach_add_(self._sums, found)

    def _summed(self) -> list[Tensor | None]:
        sums = iter(self._sums or ())
        return [None if gradient is None else next(sums) for gradient in self._gradients]

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
