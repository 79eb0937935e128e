"""How the built-in trainer's speed grows with the GPUs of one machine, DDP and FSDP2, compiled block by block.

    python -m benchmarks.gpu_scaling [--ranks 1 2 4] [--shapes 124M 888M] [--parts speed monitor reshard]

(speed) tokens a second of the trainer as a job runs it, on each number of ranks, over those of one;
(monitor) one training on the most ranks whose monitor works in some blocks of ten steps;
(reshard) an FSDP2 training that goes on from its sharded checkpoint on half of the ranks follows the losses of the one
without a break. On a CPU (`--device cpu`) all of it is tiny, over gloo. Needs what `benchmarks/gpu_train.py` needs.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from apt_jobs.events.kinds import StepTrained
from apt_jobs.events.spool import SpoolReader
from apt_jobs.jobs.run_file import RunFile
from benchmarks.alternating_monitor import BLOCK_STEPS
from benchmarks.gpu_train import SHAPES, TINY, WARM_UP_STEPS, Runs, Shape, compare_monitor, step_times_ms

RESHARDED_STEPS = 8
MAX_LOSS_DIFFERENCE = 2e-2  # relative; gathers and sums are in bf16, and in another order


def main() -> None:
    """Run the parts; exit status 1 if one failed or a resumed training left the losses of the whole one."""
    options = _options()
    shapes = [TINY] if options.device == "cpu" else [SHAPES[name] for name in options.shapes]
    print(f"{options.ranks} ranks on {options.device}, PyTorch {torch.__version__}", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    wrong = list[str]()
    with tempfile.TemporaryDirectory() as folder, options.output.open("a") as file:
        runs = Runs(Path(folder), options)
        for part in options.parts:
            for shape in shapes if part == "speed" else shapes[:1]:
                began = time.monotonic()
                recorded = PARTS[part](runs, shape, options)
                file.write(json.dumps({"part": part, "shape": shape.name, **recorded}) + "\n")
                file.flush()
                wrong += [] if recorded.get("is_right", True) else [f"{part}, {shape.name}"]
                print(f"\n({part}, {shape.name}: {time.monotonic() - began:.0f} s)", flush=True)
    if wrong:
        sys.exit(f"not right: {'; '.join(wrong)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 1, 2, 4, 8 up to the number of GPUs; CPU: 1 2")
    parser.add_argument("--shapes", nargs="*", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--sharding", nargs="*", choices=("ddp", "fsdp2"), default=["ddp", "fsdp2"])
    parser.add_argument("--parts", nargs="*", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--blocks", type=int, default=4, help="of ten steps each, of every training that is timed")
    parser.add_argument("--pairs", type=int, default=20, help="of blocks with and without the monitor")
    parser.add_argument("--compile", choices=("auto", "on", "off"), help="of the trainer; default: as a job has it")
    parser.add_argument("--output", type=Path, default=Path("build/gpu_scaling.jsonl"))
    options = parser.parse_args()
    if options.ranks is None:
        num_gpus = torch.cuda.device_count() if options.device == "cuda" else 2
        options.ranks = [number for number in (1, 2, 4, 8) if number <= num_gpus]
    if max(options.ranks) < 2:
        sys.exit("this is about several ranks: there are not two GPUs that PyTorch can use (try --device cpu)")
    return options


def _speed(runs: Runs, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    print("\n| shape | sharding | GPUs | ms a step | tokens/s | MFU | times one GPU | first step after |", flush=True)
    print("|---|---|---|---|---|---|---|---|", flush=True)
    recorded: dict[str, Any] = {"runs": []}
    alone_ms: float | None = None  # under DDP: a sharded training on one GPU shards nothing
    for sharding in options.sharding:
        for num_ranks in options.ranks:
            if sharding == "fsdp2" and num_ranks == 1:
                continue
            try:
                step_ms, first_s = _timed(runs, shape, options, num_ranks=num_ranks, sharding=sharding)
            except RuntimeError as exc:  # the others are worth their time
                print(f"\n{exc}", flush=True)
                recorded["is_right"] = False
                continue
            alone_ms = step_ms if num_ranks == 1 else alone_ms
            times = None if alone_ms is None else num_ranks * alone_ms / step_ms
            row = {"sharding": sharding, "num_ranks": num_ranks, "step_ms": step_ms, "times": times}
            recorded["runs"].append({**row, "first_step_s": first_s})
            rate = 1_000.0 * shape.tokens * num_ranks / step_ms
            speed = f"{step_ms:.2f} | {rate:,.0f} | {100.0 * shape.mfu(step_ms):.1f} %"
            against = "-" if times is None else f"{times:.3f}"
            print(f"| {shape.name} | {sharding} | {num_ranks} | {speed} | {against} | {first_s:.1f} s |", flush=True)
    return recorded


def _timed(runs: Runs, shape: Shape, options: argparse.Namespace, **fields: Any) -> tuple[float, float]:
    """Return the median time of a step in milliseconds, and seconds to the first one."""
    done_at, began = runs.steps(
        runs.run_file(shape, deterministic=False, **fields), WARM_UP_STEPS + BLOCK_STEPS * options.blocks
    )
    return statistics.median(step_times_ms(done_at)), done_at[1] - began


def _monitor(runs: Runs, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    return compare_monitor(runs, shape, options, num_ranks=max(options.ranks))


def _reshard(runs: Runs, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    num_ranks, half_steps = max(options.ranks), RESHARDED_STEPS // 2
    fields: dict[str, Any] = {"max_steps": RESHARDED_STEPS, "checkpoint_every_steps": half_steps, "sharding": "fsdp2"}
    whole = runs.run_file(shape, num_ranks=num_ranks, **fields)
    runs.steps(whole, RESHARDED_STEPS, to_the_end=True)
    fewer = runs.run_file(
        shape,
        resume_dir=whole.checkpoints_dir / f"step-{half_steps:08d}-a1",
        num_ranks=num_ranks // 2,
        gradient_accumulation_steps=2,  # as many sequences a step
        **fields,
    )
    runs.steps(fewer, RESHARDED_STEPS - half_steps, to_the_end=True)
    losses, resumed = _losses(whole), _losses(fewer)
    difference = max(abs(resumed[step] / losses[step] - 1.0) for step in range(half_steps + 1, RESHARDED_STEPS + 1))
    print(f"\n{shape.name}, FSDP2, {num_ranks} ranks to {num_ranks // 2}: losses differ by {difference}", flush=True)
    recorded = {"losses": losses, "resumed": resumed, "difference": difference}
    return {"is_right": difference <= MAX_LOSS_DIFFERENCE, **recorded}


def _losses(run_file: RunFile) -> dict[int, float]:
    events = (event for _, event in SpoolReader(run_file.spool_path(0)).read())
    return {event.step: event.train_loss for event in events if isinstance(event, StepTrained)}


PARTS = {"speed": _speed, "monitor": _monitor, "reshard": _reshard}


if __name__ == "__main__":
    main()
