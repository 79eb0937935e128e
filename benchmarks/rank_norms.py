"""One rank of the check of norms on several GPUs: each way to train, against float64 done the slow way.

    torchrun --nproc-per-node=N -m benchmarks.rank_norms [--device cpu ...]

Two references. The slow way: the same weights without DDP on this rank's data alone; its gradients are what this rank
must have had before the reduction, and their mean over the ranks, in float64, what all have after it. And the same
bits: the gradients themselves, just before they are measured; it tells the error of the arithmetic alone.
Sharded gradients (FSDP2) belong to no rank: of them the norms of the whole ones, from the shards, are compared.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from apt_jobs.events.kinds import GradientsRecorded, RankGradientsRecorded
from apt_jobs.events.spool import SpoolReader, SpoolWriter
from apt_jobs.gradient_monitor import local_norms
from apt_jobs.gradient_monitor.monitor import GradientMonitor
from apt_jobs.gradient_monitor.norms import norms_of
from apt_jobs.training.ddp import Rank, process_group, repeatable
from benchmarks.gpt2 import GPT2

NUM_STEPS = 3  # DDP sorts its buckets again after the first
TOLERANCE = {"cuda": 1e-6, "cpu": 1e-5}  # on a CPU PyTorch adds up in float32, one number after another


@dataclass(frozen=True, slots=True)
class Case:
    """One way to train."""

    name: str
    micro_steps: int = 1
    autocast: bool = False
    compiled: bool = False
    sharded: bool = False
    bucket_view: bool = False


CASES = (
    Case("DDP, float32"),
    Case("DDP, bf16", autocast=True),
    Case("DDP, bf16, 3 micro batches (no_sync)", micro_steps=3, autocast=True),
    Case("DDP, bf16, gradients as bucket views", autocast=True, bucket_view=True),
    Case("DDP, bf16, compiled", autocast=True, compiled=True),
    Case("DDP, bf16, compiled, 3 micro batches (no_sync)", micro_steps=3, autocast=True, compiled=True),
    Case("FSDP2, bf16", autocast=True, sharded=True),
    Case("FSDP2, bf16, 3 micro batches", micro_steps=3, autocast=True, sharded=True),
)


@dataclass(frozen=True, slots=True)
class Checked:
    """The largest relative errors over layers, steps and ranks; None: there is no such norm."""

    case: str
    num_layers: int
    num_steps: int
    same_bits_error: float | None  # local norms against float64 of the very gradients
    local_error: float | None  # local norms against the slow way
    global_error: float  # norms after the reduction against the slow way
    is_right: bool


class Recorded:
    """Float64 norms of what is about to be measured, in its order."""

    def __init__(self) -> None:
        self.norms: list[Tensor] = []

    def __call__(self, tensors: list[Tensor], device: torch.device) -> Tensor:
        self.norms += [tensor.double().norm() for tensor in tensors]
        return norms_of(tensors, device)


def main() -> None:
    """Check every case; rank 0 prints a line for each and writes them."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder, process_group(options.device) as rank:
        repeatable(rank.device)
        checked = []
        for number, case in enumerate(CASES):
            result = _check(options, case, rank, Path(folder) / f"{number}.spool")
            checked.append(asdict(result))
            if rank.is_first:
                print(result, flush=True)
            torch._dynamo.reset()
        if rank.is_first:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(checked))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--vocabulary-size", type=int, default=50_257)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("build/rank_norms.json"))
    return parser.parse_args()


def _check(options: argparse.Namespace, case: Case, rank: Rank, path: Path) -> Checked:
    torch.manual_seed(11)
    with rank.device:
        model = GPT2(options.num_layers, options.width, options.length, options.vocabulary_size)
    alone = copy.deepcopy(model)
    spread = _spread(case, model, rank)
    backend = "inductor" if rank.device.type == "cuda" else "aot_eager"
    forward, forward_alone = (
        torch.compile(module, backend=backend) if case.compiled else module for module in (spread, alone)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    slow: list[list[float]] = []
    slow_global: list[list[float]] = []
    same_bits: list[list[float]] = []
    with SpoolWriter(path) as spool:
        monitor = GradientMonitor(spread, spool=spool)
        for step in range(1, NUM_STEPS + 1):
            batches = _batches(options, case, step, rank)
            _copy_weights(alone, model)
            gradients = _slow_gradients(case, alone, forward_alone, batches)
            slow.append([gradient.norm().item() for gradient in gradients])
            for gradient in gradients:
                dist.all_reduce(gradient)
            slow_global.append([(gradient / rank.world_size).norm().item() for gradient in gradients])
            del gradients
            with _recorded() as recorded:
                for number, batch in enumerate(batches, start=1):
                    with nullcontext() if number == case.micro_steps else _unreduced(spread):
                        torch.autograd.backward(_loss(case, forward, batch))
            same_bits.append([norm.item() for norm in recorded.norms])
            monitor.step(step)
            optimizer.step()
            optimizer.zero_grad()
        monitor.flush()
    events = [event for _, event in SpoolReader(path).read()]
    local = [event.norms for event in events if isinstance(event, RankGradientsRecorded)]
    reduced = [event.norms for event in events if isinstance(event, GradientsRecorded)]
    in_order = [sorted(norms) for norms in local], [sorted(norms) for norms in same_bits]
    bits_error, local_error = (0.0, 0.0) if case.sharded else (_error(*in_order), _error(local, slow))
    global_error = _error(reduced, slow_global) if rank.is_first else 0.0
    worst = torch.tensor([bits_error, local_error, global_error], dtype=torch.float64, device=rank.device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    bits_error, local_error, global_error = worst.tolist()
    is_right = max(worst.tolist()) <= TOLERANCE[rank.device.type]
    return Checked(
        case=case.name,
        num_layers=len(monitor.names),
        num_steps=NUM_STEPS,
        same_bits_error=None if case.sharded else bits_error,
        local_error=None if case.sharded else local_error,
        global_error=global_error,
        is_right=is_right,
    )


def _spread(case: Case, model: nn.Module, rank: Rank) -> nn.Module:
    if not case.sharded:
        device_ids = [rank.device.index] if rank.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=case.bucket_view)
    mesh = init_device_mesh(rank.device.type, (rank.world_size,))
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextmanager
def _recorded() -> Iterator[Recorded]:
    """While it lasts, local gradients are measured in float64 as well."""
    with patch.object(local_norms, "norms_of", Recorded()) as recorded:
        yield recorded


@contextmanager
def _unreduced(spread: Any) -> Iterator[None]:
    if isinstance(spread, DistributedDataParallel):
        with spread.no_sync():
            yield
        return
    assert isinstance(spread, FSDPModule)
    spread.set_requires_gradient_sync(False)
    yield
    spread.set_requires_gradient_sync(True)


@torch.no_grad()
def _copy_weights(alone: nn.Module, model: nn.Module) -> None:
    for to, parameter in zip(alone.parameters(), model.parameters(), strict=True):
        to.copy_(parameter.full_tensor() if isinstance(parameter, DTensor) else parameter)


def _slow_gradients(case: Case, alone: nn.Module, forward: Any, batches: list[Tensor]) -> list[Tensor]:
    for batch in batches:
        torch.autograd.backward(_loss(case, forward, batch))
    gradients = [p.grad.double() for p in alone.parameters() if p.grad is not None]
    alone.zero_grad()
    return gradients


def _loss(case: Case, forward: Any, batch: Tensor) -> Tensor:
    with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=case.autocast):
        loss: Tensor = forward(batch)
    return loss / case.micro_steps


def _batches(options: argparse.Namespace, case: Case, step: int, rank: Rank) -> list[Tensor]:
    """Other tokens for each rank, step and micro batch."""
    dice = torch.Generator().manual_seed(1_000 * step + rank.rank)
    shape = (case.micro_steps, options.batch_size, options.length)
    return list(torch.randint(0, options.vocabulary_size, shape, generator=dice).to(rank.device))


def _error(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    """Return the largest relative difference, over all steps and layers."""
    pairs = [pair for steps in zip(found, expected, strict=True) for pair in zip(*steps, strict=True)]
    return max(abs(one / other - 1.0) for one, other in pairs)


if __name__ == "__main__":
    main()
