"""One rank of the monitor's tests: trains small models in every way that matters and compares with the slow way.

The slow way: the same model without DDP on this rank's data alone, its gradients as float64, averaged over the ranks
with a plain all-reduce. Writes what was measured and what was expected as JSON.
"""

import copy
import gc
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from apt_jobs.events.kinds import GradientsRecorded, RankGradientsRecorded, UpdatesMeasured
from apt_jobs.events.spool import SpoolReader, SpoolWriter
from apt_jobs.gradient_monitor.monitor import GradientMonitor
from apt_jobs.gradient_monitor.norms import local_part
from apt_jobs.training.ddp import process_group
from apt_jobs.training.run import leave

NUM_STEPS = 3


class Odd(nn.Module):
    """Layers that are used, shared, frozen, empty, or used by rank 0 alone."""

    def __init__(self, *, odd: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)
        if odd:
            self.again = self.first
            self.frozen = nn.Linear(6, 6).requires_grad_(False)
            self.empty = nn.Parameter(torch.empty(0))
            self.sometimes = nn.Linear(6, 6)
        self.odd = odd

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        if self.odd:
            y = torch.tanh(self.again(self.frozen(y))) + self.empty.sum()
            y = self.sometimes(y) if dist.get_rank() == 0 else y
        out: Tensor = self.last(y)
        return out


class Nested(nn.Module):
    """Activations are checkpointed the reentrant way: each layer has a backward pass within the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        for layer in self.layers:
            x = torch.tanh(checkpoint(layer, x, use_reentrant=True))
        return x


class Rows(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(20, 5, sparse=True)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.rows((x.abs() * 7).long() % 20))
        return out


@dataclass
class Case:
    """One way to train."""

    model: Callable[[], nn.Module] = lambda: Odd(odd=False)
    ddp: dict[str, Any] = field(default_factory=dict)
    micro_steps: int = 1
    scale: float = 1.0
    is_unscaled: bool = False  # as `scaler.unscale_` does it before clipping
    autocast: bool = False
    dtype: torch.dtype = torch.float32
    compiled: bool = False
    clip: float | None = None
    poisoned_rank: int | None = None
    other_hook: bool = False
    scaled_by_hook: bool = False  # a hook of each gradient that runs after the monitor's
    sharded: bool = False


CASES = {
    "plain": Case(),
    "bucket_view": Case(ddp={"gradient_as_bucket_view": True}),
    "small_buckets": Case(ddp={"bucket_cap_mb": 0.0001}),
    "accumulated": Case(micro_steps=3),
    "accumulated_bucket_view": Case(micro_steps=3, ddp={"gradient_as_bucket_view": True}),
    "scaled": Case(scale=1024.0),
    "unscaled": Case(scale=1024.0, is_unscaled=True),
    "clipped": Case(clip=1e-3),
    "bf16_autocast": Case(autocast=True),
    "bf16_weights": Case(dtype=torch.bfloat16),
    "compiled": Case(compiled=True),
    "odd_layers": Case(model=lambda: Odd(odd=True), ddp={"find_unused_parameters": True}),
    "sparse": Case(model=Rows),
    "poisoned": Case(poisoned_rank=1),
    "nested": Case(model=Nested, ddp={"bucket_cap_mb": 0.0001}),
    "static_graph": Case(ddp={"static_graph": True}),
    "other_hook": Case(other_hook=True),
    "other_hook_bucket_view": Case(other_hook=True, ddp={"gradient_as_bucket_view": True}),
    "scaled_by_hook": Case(scale=1024.0, scaled_by_hook=True),
    "sharded": Case(sharded=True),
    "sharded_accumulated": Case(sharded=True, micro_steps=3, scale=1024.0, clip=1e-3),
}


def main(folder: Path) -> None:
    """Run every case."""
    with process_group("cpu") as rank:
        results: dict[str, Any] = {}
        for name, case in CASES.items():
            alive: list[weakref.ref[Any]] = []
            results[name] = run(case, folder / f"{name}-{rank.rank}.spool", rank.rank, alive)
            gc.collect()
            results[name]["is_freed"] = alive[0]() is None
        results["other_layers"] = _disagree(rank.rank)
        (folder / f"results-{rank.rank}.json").write_text(json.dumps(results))


def run(case: Case, path: Path, rank: int, alive: list[weakref.ref[Any]]) -> dict[str, Any]:
    """Names, measured and expected norms of each step, measured and expected local norms of each step.

    `alive` gets the DDP module.
    """
    torch.manual_seed(11)
    model = case.model().to(case.dtype)
    whole = copy.deepcopy(model)  # of the same weights, on this rank alone
    ddp = _spread(case, model)
    alive.append(weakref.ref(ddp))
    forward = torch.compile(ddp, backend="aot_eager") if case.compiled else ddp
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    expected: list[list[float]] = []
    expected_local: list[list[float]] = []
    totals: list[float] = []
    weights: list[Tensor] = []
    moved: list[list[float]] = []
    with SpoolWriter(path) as spool:
        monitor = GradientMonitor(ddp, spool=spool)
        if case.scaled_by_hook:
            _scale_by_hook(case, model)
        for step in range(1, NUM_STEPS + 1):
            batches = [_batch(case, step, micro, rank) for micro in range(case.micro_steps)]
            _copy_weights(whole, model)
            local = _slow_gradients(case, whole, batches)
            expected_local.append([gradient.norm().item() for gradient in local])
            for gradient in local:
                dist.all_reduce(gradient)
            expected.append([(gradient / 2).norm().item() for gradient in local])
            for number, batch in enumerate(batches, start=1):
                with nullcontext() if number == case.micro_steps else _not_reduced(ddp):
                    torch.autograd.backward(_loss(case, forward, batch) * (1.0 if case.scaled_by_hook else case.scale))
            if case.is_unscaled:
                _unscale(case, model)
            totals.append(monitor.step(step, case.scale, is_unscaled=case.is_unscaled).item())
            if not case.is_unscaled:
                _unscale(case, model)
            if case.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), case.clip)
            before = _own_weights(model)
            if case.poisoned_rank is None:
                optimizer.step()
            moved.append([_ratio(new, old) for new, old in zip(_own_weights(model), before, strict=True)])
            optimizer.zero_grad()
            if step == 1:
                _copy_weights(whole, model)
                weights = [parameter.detach().double() for parameter in whole.parameters() if parameter.requires_grad]
    events = [event for _, event in SpoolReader(path).read()]
    return {
        "names": monitor.names,
        "norms": [event.norms for event in events if isinstance(event, GradientsRecorded)],
        "expected": expected,
        "local": [event.norms for event in events if isinstance(event, RankGradientsRecorded)],
        "expected_local": expected_local,
        "totals": totals,
        "compute_ms": [event.compute_time_ms for event in events if isinstance(event, RankGradientsRecorded)],
        "updates": [
            [event.step, event.weight_norms, event.update_ratios]
            for event in events
            if isinstance(event, UpdatesMeasured)
        ],
        "expected_updates": [1, [weight.norm().item() for weight in weights], moved[0]],
        "kinds": [event.kind for event in events],
    }


def _scale_by_hook(case: Case, model: nn.Module) -> None:
    def scale(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad *= case.scale

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(scale)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _unscale(case: Case, model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None and case.scale != 1.0:
            parameter.grad /= case.scale


def _spread(case: Case, model: nn.Module) -> Any:
    if case.sharded:
        return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    ddp = DistributedDataParallel(model, **case.ddp)
    if case.other_hook:
        ddp.register_comm_hook(None, allreduce_hook)
    return ddp


@contextmanager
def _not_reduced(spread: Any) -> Iterator[None]:
    if isinstance(spread, DistributedDataParallel):
        with spread.no_sync():
            yield
        return
    spread.set_requires_gradient_sync(False)
    yield
    spread.set_requires_gradient_sync(True)


@torch.no_grad()
def _copy_weights(whole: nn.Module, model: nn.Module) -> None:
    for to, parameter in zip(whole.parameters(), model.parameters(), strict=True):
        to.copy_(parameter.full_tensor() if isinstance(parameter, DTensor) else parameter)


def _own_weights(model: nn.Module) -> list[Tensor]:
    """What this rank holds of each weight, in float64."""
    own = [local_part(parameter.detach()) for parameter in model.parameters() if parameter.requires_grad]
    return [weight.to(torch.float64, copy=True) for weight in own]


def _ratio(new: Tensor, old: Tensor) -> float:
    return ((new - old).norm() / new.norm()).item() if new.numel() else 0.0


def _slow_gradients(case: Case, model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    alone = copy.deepcopy(model)
    for batch in batches:
        torch.autograd.backward(_loss(case, alone, batch))
    return [
        torch.zeros_like(parameter, dtype=torch.float64)
        if parameter.grad is None
        else parameter.grad.to_dense().double()
        for parameter in alone.parameters()
        if parameter.requires_grad
    ]


def _loss(case: Case, model: Any, batch: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.autocast):
        out = model(batch)
    loss: Tensor = out.float().square().mean() / case.micro_steps
    return loss


def _batch(case: Case, step: int, micro: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    batch = torch.randn(8, 6, generator=generator).to(case.dtype) * (1.0 + rank)
    if case.poisoned_rank == rank and step == 2:
        batch[0, 0] = float("nan")
    return batch


def _disagree(rank: int) -> str:
    """What a rank says whose model has another layer than its peer's."""
    try:
        GradientMonitor(nn.Linear(3, 3, bias=rank == 0))
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    return "nothing"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
