"""`torch.compile` of a model, block by block: all blocks share one graph, so that it is compiled once in seconds.

Compiled graphs are kept on disk (`TORCHINDUCTOR_CACHE_DIR`, which whoever starts the ranks sets): the next training of
the same shape finds them. What cannot be compiled (no C compiler, an operation that fails) is trained without.
"""

from collections.abc import Callable

import torch
import torch._dynamo
import torch._inductor.config
from torch import nn

from apt_jobs.training.blocks import blocks_of, norms_outside_blocks
from apt_jobs.training.ddp import Rank, summed
from apt_jobs.training.loss import ChunkedLoss

MAX_REASON_CHARS = 500  # of an error: compilers print whole programs


class Compilation:
    """What was compiled of one model, and how to undo it."""

    def __init__(self, model: nn.Module, loss: ChunkedLoss | None, *, deterministic: bool) -> None:
        self._loss = loss
        self._modules = [*blocks_of(model), *norms_outside_blocks(model)]
        if deterministic and hasattr(torch._inductor.config, "deterministic"):
            # Kernels are then chosen by rule and not by a race, so that a resumed training has the same ones.
            torch._inductor.config.deterministic = True
        for module in self._modules:
            module.compile(dynamic=False)
        if loss is not None:
            loss.compile()

    def undo(self) -> None:
        """Compute as if nothing had been compiled."""
        for module in self._modules:
            module._compiled_call_impl = None
        if self._loss is not None:
            self._loss.uncompile()


def is_wanted(compile_option: str, device: torch.device) -> bool:
    """Tell what `training.compile` means on `device`."""
    return compile_option == "on" or (compile_option == "auto" and device.type == "cuda")


def compile_or_fall_back(
    model: nn.Module, loss: ChunkedLoss | None, try_out: Callable[[], None], rank: Rank, *, deterministic: bool
) -> str | None:
    """Compile `model` and try it; returns why it is left uncompiled on all ranks, None if it is compiled.

    `try_out` computes one micro batch without a collective. All ranks take part: a rank that fell back alone would
    compute other bits than the others. To be called before the model is spread over the ranks, as a pass that breaks
    off in the middle of a reduction could not be repeated.
    """
    compilation = Compilation(model, loss, deterministic=deterministic)
    reason: str | None = None
    try:
        with torch.random.fork_rng([rank.device] if rank.device.type == "cuda" else []):
            try_out()
    except torch.OutOfMemoryError:
        raise
    except Exception as exc:  # of many kinds: no compiler, no Triton, an operation that has no form, a bug in one
        reason = f"{type(exc).__name__}: {exc}"[:MAX_REASON_CHARS]
    failed = torch.tensor([reason is not None], dtype=torch.float32, device=rank.device)
    num_failed = int(summed(failed).item())  # collective and sync point, once, before training
    if not num_failed:
        torch._dynamo.config.suppress_errors = True  # a graph that is needed later (validation) falls back alone
        return None
    compilation.undo()
    torch._dynamo.reset()
    model.zero_grad(set_to_none=True)
    return reason or f"it failed on {num_failed} other ranks"
