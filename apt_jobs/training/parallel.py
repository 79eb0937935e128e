"""How one model is spread over the ranks: a whole copy on each (DDP), or a shard of every parameter (FSDP2).

The loop is the same for both. What differs is here: the module to call, how gradients wait while they accumulate, and
the gradients that a rank holds.
Shapes: B sequences, T tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from apt_jobs.jobs.training_options import TrainingOptions
from apt_jobs.training.blocks import blocks_of
from apt_jobs.training.ddp import Rank


class Alone:
    """One rank: there is nothing to reduce, so that DDP's copies of all gradients would be for nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.module = model

    def warm_up_buckets(self, ids_BT: Tensor) -> None:
        """Do nothing: there are no buckets."""

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Do nothing: gradients stay on the rank anyway."""
        yield


class Replicated:
    """DDP: gradients are averaged over the ranks in the backward."""

    def __init__(self, model: nn.Module, rank: Rank) -> None:
        self.module: nn.Module = DistributedDataParallel(
            model, device_ids=[rank.device.index] if rank.device.type == "cuda" else None
        )

    def warm_up_buckets(self, ids_BT: Tensor) -> None:
        """Run one backward pass that counts for nothing, after which DDP sorts gradients into their final buckets.

        The order of a sum over more than two ranks depends on the place in a bucket: with the first buckets, the first
        step after a resume would differ in its last bits from the same step in the middle of a training.
        """
        device = ids_BT.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.autograd.backward(self.module(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss)
        self.module.zero_grad(set_to_none=True)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Leave the gradients of a backward within on the rank."""
        assert isinstance(self.module, DistributedDataParallel)
        with self.module.no_sync():
            yield


class Sharded:
    """FSDP2: each block of the model gathers its parameters while it computes, and scatters its gradients."""

    def __init__(self, model: nn.Module, rank: Rank, precision: torch.dtype | None) -> None:
        # Parameters are kept and gradients reduced in float32; what is gathered to compute with is half as large.
        policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
        mesh = init_device_mesh(rank.device.type, (rank.world_size,))
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        self.module = model  # now an FSDPModule, too

    def warm_up_buckets(self, ids_BT: Tensor) -> None:
        """Nothing to do: each block is reduced by itself, from the first step on."""

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Leave the gradients of a backward within, whole, on the rank."""
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.module.set_requires_gradient_sync(True)


def spread(
    model: nn.Module, options: TrainingOptions, rank: Rank, precision: torch.dtype | None
) -> Alone | Replicated | Sharded:
    """Spread `model`, which is on the rank's device, as the job asks. Called by every rank.

    `module` of the result is what to call. To call a sharded one is a collective: every rank does it equally often.
    """
    if options.sharding == "fsdp2":
        return Sharded(model, rank, precision)
    return Alone(model) if rank.world_size == 1 else Replicated(model, rank)
