"""What the gradient monitor costs on GPUs: the same training step without it, with it, and with what others do.

    python -m benchmarks.gpu_monitor [--quick]
    torchrun --nproc-per-node=N -m benchmarks.gpu_monitor [--quick]

GPT-2 124M, 16 sequences of 1024 tokens a GPU, bf16 autocast (not on a CPU), fused AdamW, no wait for the GPU in a step
but those of the variant. Blocks of ten steps (update norms come every ten) are timed in turns and in random order; the
ratio is that of a block to the unmonitored block of its round. With `--clip` each step clips its gradients as well: by
the norm that the monitor has at hand, the others by one of their own. In a group of one rank there are no local norms.
Besides the project it needs PyTorch, numpy, orjson and pydantic.
"""

import argparse
import gc
import importlib.util
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NEEDED = ("torch", "numpy", "orjson", "pydantic")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    sys.exit(f"this Python ({sys.executable}) lacks {', '.join(missing)}: install them, or put them on PYTHONPATH")

# ruff: noqa: E402  # what is missing is said first, all of it at once
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from apt_jobs.events.spool import SpoolWriter
from apt_jobs.gradient_monitor.monitor import GradientMonitor
from apt_jobs.training.ddp import Rank, process_group
from benchmarks.gpt2 import GPT2
from benchmarks.intervals import Interval, bootstrap

BLOCK_STEPS = 10
SLOW_EVERY_ROUNDS = 3  # what costs a lot needs fewer rounds to be known
NUM_BATCHES = 8
NUM_BINS = 64
MAX_NORM = 1.0  # of all gradients, as GPT-2 is trained
LEAST_ROUNDS = 4
NONE, SPEC, HISTOGRAMS, GLOBAL, EVERYTHING = "none", "SPEC's way", "histograms", "ours, no local norms", "ours"
VARIANTS = (NONE, SPEC, HISTOGRAMS, GLOBAL, EVERYTHING)
SLOW = (SPEC, HISTOGRAMS)
SINGLE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One variant in one setting."""

    setting: str  # "plain" or "ddp", "eager" or "compiled"
    variant: str
    step_ms: float
    ratio: Interval  # of a step to the unmonitored one
    num_rounds: int
    num_dropped: int  # steps whose norms could not be kept


@dataclass(slots=True)
class Trained:
    """One copy of the model with its optimizer, and what is called for the loss."""

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer


Watch = Callable[[Tensor], Tensor | None]  # called with the loss, after the backward pass; the total norm if it has it
Variant = tuple[Trained, Watch, GradientMonitor | None]


def main() -> None:
    """Measure every cell; rank 0 prints a table and writes JSON lines."""
    options = _options()
    if "RANK" not in os.environ:
        os.environ.update(SINGLE)
    with tempfile.TemporaryDirectory() as folder, process_group(options.device) as rank:
        cells: list[Cell] = []
        for cell in _measure(options, rank, Path(folder)):
            cells.append(cell)
            if rank.is_first:
                print(_line(cell), flush=True)
        if rank.is_first:
            _write(options, rank, cells)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the time, with wider intervals")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the four settings, without compilation")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--settings", nargs="*", default=["plain", "ddp"], choices=("plain", "ddp"))
    parser.add_argument("--modes", nargs="*", default=["eager", "compiled"], choices=("eager", "compiled"))
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--clip", action="store_true", help=f"clip gradients to a norm of {MAX_NORM}")
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary-size", type=int, default=50_257)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=Path("build/gpu_monitor.jsonl"))
    options = parser.parse_args()
    options.variants = list(dict.fromkeys([NONE, *options.variants]))
    if options.quick:
        options.seconds /= 4
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU that PyTorch can use; try --device cpu and a small model (see --help)")
    return options


def _measure(options: argparse.Namespace, rank: Rank, folder: Path) -> Iterator[Cell]:
    torch.manual_seed(rank.rank)
    shape = (options.batch_size, options.length)
    batches = [torch.randint(0, options.vocabulary_size, shape, device=rank.device) for _ in range(NUM_BATCHES)]
    for setting in options.settings:
        copies = _copies(options, rank, batches, is_ddp=setting == "ddp")
        monitors = _monitors(options, copies, folder / f"{setting}-{rank.rank}")
        for mode in options.modes:
            name = f"{setting} {mode}"
            if mode == "compiled":
                copies = [Trained(copy.model, torch.compile(copy.forward), copy.optimizer) for copy in copies]
            variants = _variants(options, copies, monitors)
            began = time.perf_counter()
            for trained, watch, _ in variants.values():
                run_steps(trained, watch, batches, 3)
            _wait(rank)
            if rank.is_first:
                print(f"{name}: ready after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
            dropped_before = {key: monitor.num_dropped for key, monitor in monitors.items()}
            times = _rounds(variants, batches, rank, options.seconds)
            yield from _cells(name, variants, times, dropped_before)
        error = _error(copies[0], batches[0][:1])
        if rank.is_first:
            print(f"{setting}: largest relative error of a norm {error:.1e}", flush=True)
        del copies, monitors, variants
        torch._dynamo.reset()


def _copies(options: argparse.Namespace, rank: Rank, batches: list[Tensor], *, is_ddp: bool) -> list[Trained]:
    """Return the model and, for the monitor with local norms, another with the same weights and optimizer state.

    A hook cannot be taken off DDP again; and of a large model there is no room for all of it twice.
    """
    first = _copy(options, rank, is_ddp=is_ddp)
    if not (is_ddp and rank.world_size > 1 and EVERYTHING in options.variants):
        return [first]
    run_steps(first, lambda loss: None, batches, 1)
    second = _copy(options, rank, is_ddp=is_ddp)
    for mine, other in zip(second.model.parameters(), first.model.parameters(), strict=True):
        mine.data = other.data
        second.optimizer.state[mine] = first.optimizer.state[other]
    return [first, second]


def _copy(options: argparse.Namespace, rank: Rank, *, is_ddp: bool) -> Trained:
    torch.manual_seed(1)
    with rank.device:
        model: nn.Module = GPT2(options.num_layers, options.width, options.length, options.vocabulary_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if is_ddp:
        model = DistributedDataParallel(model, device_ids=[rank.device.index] if options.device == "cuda" else None)
    return Trained(model, model, optimizer)


def _monitors(options: argparse.Namespace, copies: list[Trained], path: Path) -> dict[str, GradientMonitor]:
    """Ours, each with a spool, after what it watches."""
    watched: dict[str, tuple[nn.Module, Trained]] = {EVERYTHING: (copies[-1].model, copies[-1])}
    if len(copies) > 1:
        watched = {GLOBAL: (getattr(copies[0].model, "module"), copies[0]), **watched}  # noqa: B009  # DDP's own
    return {
        name: GradientMonitor(model, of.optimizer, SpoolWriter(path.with_suffix(f".{index}")))
        for index, (name, (model, of)) in enumerate(watched.items())
        if name in options.variants
    }


def _variants(
    options: argparse.Namespace, copies: list[Trained], monitors: dict[str, GradientMonitor]
) -> dict[str, Variant]:
    first = copies[0]
    parameters = list(first.model.parameters())
    variants: dict[str, Variant] = {
        NONE: (first, lambda loss: None, None),
        SPEC: (first, lambda loss: _item_per_parameter(parameters), None),
        HISTOGRAMS: (first, lambda loss: _histograms(parameters), None),
    }
    for name, monitor in monitors.items():
        trained = copies[-1] if name == EVERYTHING else first
        variants[name] = trained, lambda loss, monitor=monitor: monitor.step(loss=loss), monitor  # type: ignore[misc]
    if options.clip:
        variants = {name: (of, _clipping(of, watch), monitor) for name, (of, watch, monitor) in variants.items()}
    return {name: variant for name, variant in variants.items() if name in options.variants}


def _clipping(trained: Trained, watch: Watch) -> Watch:
    """`watch`, and then clip."""
    parameters = list(trained.model.parameters())

    def watch_and_clip(loss: Tensor) -> None:
        total = watch(loss)
        if total is None:
            nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        else:
            nn.utils.clip_grads_with_norm_(parameters, MAX_NORM, total)

    return watch_and_clip


def _item_per_parameter(parameters: list[nn.Parameter]) -> None:
    """Measure as SPEC describes: each norm is read alone, and each layer has a collective."""
    for parameter in parameters:
        assert parameter.grad is not None
        norm = torch.tensor(parameter.grad.norm().item(), device=parameter.device)
        dist.all_reduce(norm)


def _histograms(parameters: list[nn.Parameter]) -> None:
    """Compute what `wandb.watch(log="gradients")` computes of each tensor at each step (wandb 0.2x, `TorchHistory`)."""
    for parameter in parameters:
        assert parameter.grad is not None
        flat = parameter.grad.detach().reshape(-1)
        finite = torch.isfinite(flat)
        flat = flat if finite.all() else flat[finite]
        low, high = flat.min().item(), flat.max().item()
        flat.float().histc(bins=NUM_BINS, min=low, max=high).cpu().tolist()
        torch.linspace(low, high, NUM_BINS + 1).tolist()


def _rounds(variants: dict[str, Variant], batches: list[Tensor], rank: Rank, seconds: float) -> list[dict[str, float]]:
    """Return milliseconds a step of each variant in each round; slow ones are missing in most. All ranks do as many."""
    order, rounds, ends_at = random.Random(7), list[dict[str, float]](), time.perf_counter() + seconds
    gc.disable()  # a collection takes longer than what is measured, and comes when it likes
    while _any(rank, time.perf_counter() < ends_at) or len(rounds) < LEAST_ROUNDS:
        names = [name for name in variants if name not in SLOW or not _is_skipped(rounds)]
        gc.collect()
        order.shuffle(names)
        times: dict[str, float] = {}
        for name in names:
            trained, watch, _ = variants[name]
            _wait(rank)
            began = time.perf_counter()
            run_steps(trained, watch, batches, BLOCK_STEPS)
            _wait(rank)
            times[name] = 1000.0 * (time.perf_counter() - began) / BLOCK_STEPS
        rounds.append(times)
    gc.enable()
    return rounds


def _is_skipped(rounds: list[dict[str, float]]) -> bool:
    return len(rounds) % SLOW_EVERY_ROUNDS != 0


def run_steps(trained: Trained, watch: Watch, batches: list[Tensor], count: int) -> None:
    for number in range(count):
        batch = batches[number % len(batches)]
        with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=batch.is_cuda):
            loss = trained.forward(batch)
        torch.autograd.backward(loss)
        watch(loss)
        trained.optimizer.step()
        trained.optimizer.zero_grad(set_to_none=True)


def _wait(rank: Rank) -> None:
    """Until all ranks have done all their work."""
    if rank.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def _any(rank: Rank, flag: bool) -> bool:
    flags = torch.tensor([float(flag)], device=rank.device)
    dist.all_reduce(flags)
    return bool(flags.item() > 0)


def _cells(
    setting: str, variants: dict[str, Variant], rounds: list[dict[str, float]], dropped_before: dict[str, int]
) -> Iterator[Cell]:
    for name, (_, _, monitor) in variants.items():
        of_rounds = [times for times in rounds if name in times]
        ratio = bootstrap([times[name] / times["none"] for times in of_rounds])
        step_ms = bootstrap([times[name] for times in of_rounds]).median
        num_dropped = monitor.num_dropped - dropped_before[name] if monitor else 0
        yield Cell(setting, name, step_ms, ratio, len(of_rounds), num_dropped)


def _error(trained: Trained, batch: Tensor) -> float:
    """Return the largest relative error of the monitor's norms against float64. Called by every rank."""
    model = trained.model.module if isinstance(trained.model, DistributedDataParallel) else trained.model
    monitor = GradientMonitor(model, runs_dir=None)
    torch.autograd.backward(model(batch))
    monitor.step()
    monitor.flush()
    layers = monitor.export_for_webui()["gradient_timeline"][-1]["layers"]
    expected = {name: p.grad.double().norm().item() for name, p in model.named_parameters() if p.grad is not None}
    trained.optimizer.zero_grad(set_to_none=True)
    return max(abs(float(layers[name]["norm"]) / float(norm) - 1.0) for name, norm in expected.items() if norm > 0.0)


def _line(cell: Cell) -> str:
    ratio = cell.ratio
    return (
        f"| {cell.setting} | {cell.variant} | {cell.step_ms:.2f} | {ratio.median:.4f} "
        f"| {ratio.low:.4f} to {ratio.high:.4f} | {cell.num_rounds} | {cell.num_dropped} |"
    )


def _write(options: argparse.Namespace, rank: Rank, cells: list[Cell]) -> None:
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    where = f"{rank.world_size} x {device}, PyTorch {torch.__version__}, {options.num_layers} layers of {options.width}"
    print(f"\n{where}, {options.batch_size} x {options.length} tokens a rank, blocks of {BLOCK_STEPS} steps\n")
    print("| setting | variant | ms a step | ratio | 95 % interval | rounds | dropped |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(map(_line, cells)))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"device": device, "world_size": rank.world_size, "torch": torch.__version__}
    with options.output.open("w") as file:
        for cell in cells:
            file.write(json.dumps({**about, **asdict(cell)}) + "\n")


if __name__ == "__main__":
    main()
