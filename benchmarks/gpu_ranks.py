"""The same claims where they are harder: norms, faults, cost and speed of trainings on several GPUs of one machine.

    python -m benchmarks.gpu_ranks [--parts norms nan kill cost scaling] [--quick]

Starts ranks by itself, one for each GPU, and prints a table for each part:
(norms) each rank's norms before the reduction, and the global ones, against float64 (`benchmarks/rank_norms.py`);
(nan) a NaN on one rank is located by the supervisor's code and reaches no weight (`benchmarks/job_runs.py`);
(kill) kill -9 of one rank: the resumed training equals one without a break, and no process is left;
(cost) a monitored step against an unmonitored one, GPT-2 124M and 1.3B (`benchmarks/gpu_monitor.py`);
(scaling) tokens a second of all GPUs against one. On a CPU (`--device cpu`) all of it is tiny, over gloo.
Besides the project it needs PyTorch, transformers, numpy, orjson, pydantic, pydantic-settings and SQLAlchemy.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.job_runs import JobRuns
from benchmarks.torchrun import run_ranks

PART_TIMEOUT_S = 540.0
SCALING_SECONDS = 8.0


@dataclass(frozen=True, slots=True)
class Shape:
    """A model and its batch on each GPU."""

    name: str
    modes: tuple[str, ...]
    arguments: tuple[str, ...]
    tokens: int  # of a step of one rank
    share: float = 1.0  # of the time


TINY_MODEL = ("--device=cpu", "--num-layers=2", "--width=64", "--length=32", "--vocabulary-size=512", "--batch-size=2")
TINY = (Shape("tiny", ("eager",), TINY_MODEL, 2 * 32),)
GPT2 = (
    Shape("GPT-2 124M", ("eager", "compiled"), ("--batch-size=16", "--length=1024"), 16 * 1024),
    Shape("GPT-2 124M, clipped", ("eager", "compiled"), ("--batch-size=16", "--length=1024", "--clip"), 16 * 1024),
    Shape(
        "GPT-2 1.3B",
        ("eager",),
        ("--num-layers=24", "--width=2048", "--batch-size=8", "--length=1024"),
        8 * 1024,
        share=1.5,
    ),
)


class Report:
    """What is printed at once and written at the end, and whether all of it was right."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self.wrong: list[str] = []
        self.step_ms: dict[tuple[str, str], float] = {}  # of all ranks, by shape and mode
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("")

    def table(self, *columns: str) -> None:
        print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)

    def row(self, part: str, values: dict[str, Any], *cells: str, is_right: bool = True) -> None:
        """One line; `values` go to the file."""
        print(f"| {' | '.join(cells)} |", flush=True)
        with self._output.open("a") as file:
            file.write(json.dumps({"part": part, "is_right": is_right, **values}) + "\n")
        if not is_right:
            self.wrong.append(f"{part}: {cells[0]}")


def main() -> None:
    """Run the parts; exit status 1 if something was not right."""
    options = _options()
    report = Report(options.output)
    device = options.device
    print(f"{options.ranks} ranks on {device}, PyTorch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            began = time.monotonic()
            PARTS[part](options, report, Path(folder) / part)
            print(f"\n({part}: {time.monotonic() - began:.0f} s)", flush=True)
    if report.wrong:
        sys.exit(f"not right: {'; '.join(report.wrong)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, help="default: as many as there are GPUs; 2 on a CPU")
    parser.add_argument("--parts", nargs="*", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--shapes", nargs="*", choices=[shape.name for shape in GPT2])
    parser.add_argument("--modes", nargs="*", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring the cost of each shape in each mode")
    parser.add_argument("--output", type=Path, default=Path("build/gpu_ranks.jsonl"))
    options = parser.parse_args()
    if options.ranks is None:  # the driver tells their number: no GPU is held here
        options.ranks = torch.cuda.device_count() if options.device == "cuda" else 2
    if options.ranks < 2:
        sys.exit("this is about several ranks: there are not two GPUs that PyTorch can use (try --device cpu)")
    return options


def _shapes(options: argparse.Namespace) -> Iterator[tuple[Shape, str]]:
    for shape in TINY if options.device == "cpu" else GPT2:
        if options.device == "cuda" and options.shapes and shape.name not in options.shapes:
            continue
        yield from ((shape, mode) for mode in shape.modes if mode in options.modes)


def _norms(options: argparse.Namespace, report: Report, folder: Path) -> None:
    output = folder.with_suffix(".json")
    model = TINY_MODEL if options.device == "cpu" else ()
    run_ranks(options.ranks, "benchmarks.rank_norms", *model, f"--output={output}", timeout_s=PART_TIMEOUT_S)
    report.table("training", "local, same bits", "local, slow way", "global, slow way", "right")
    for checked in json.loads(output.read_text()):
        errors = [checked[name] for name in ("same_bits_error", "local_error", "global_error")]
        cells = ["none" if error is None else f"{error:.1e}" for error in errors]
        report.row("norms", checked, checked["case"], *cells, _yes(checked["is_right"]), is_right=checked["is_right"])


def _nan(options: argparse.Namespace, report: Report, folder: Path) -> None:
    report.table("fault", "put into", "found", "no weight changed", "right")
    for fault in ("nan_batch", "nan_gradient"):
        recorded = JobRuns(folder, options.ranks, options.device).poison(fault)
        put = f"rank {recorded.rank}, step {recorded.step}, {recorded.layer or 'its batch'}"
        ranks = ", ".join(map(str, recorded.found_ranks))
        found = f"rank {ranks}, step {recorded.found_step}, {recorded.found_layer or recorded.message}"
        cells = (put, found, _yes(recorded.is_skipped_everywhere), _yes(recorded.is_right))
        report.row("nan", asdict(recorded), fault, *cells, is_right=recorded.is_right)


def _kill(options: argparse.Namespace, report: Report, folder: Path) -> None:
    recorded = JobRuns(folder, options.ranks, options.device).kill()
    report.table("killed", "resumed from", "bitwise equal at the end", "all gone after", "GPUs held", "right")
    num_equal = recorded.num_files - len(recorded.different_files)
    equal = f"{num_equal} of {recorded.num_files} files at step {recorded.num_steps}"
    cells = (
        *(f"rank {recorded.rank} at step {recorded.at_step}", f"step {recorded.resumed_from_step}", equal),
        *(f"{recorded.ended_after_s:.1f} s", str(len(recorded.gpu_processes)), _yes(recorded.is_right)),
    )
    report.row("kill", asdict(recorded), *cells, is_right=recorded.is_right)


def _cost(options: argparse.Namespace, report: Report, folder: Path) -> None:
    report.table("model", "mode", "unmonitored ms", "monitored ms", "ratio", "95 % interval", "rounds", "dropped")
    for shape, mode in _shapes(options):
        cells = _timed(options, shape, mode, folder, options.ranks, options.seconds * shape.share, "ours")
        ours, ratio = cells["ours"], cells["ours"]["ratio"]
        report.step_ms[shape.name, mode] = ours["step_ms"]
        report.row(
            "cost",
            {"model": shape.name, "mode": mode, "unmonitored_ms": cells["none"]["step_ms"], **ours},
            *(shape.name, mode, f"{cells['none']['step_ms']:.2f}", f"{ours['step_ms']:.2f}", f"{ratio['median']:.4f}"),
            *(f"{ratio['low']:.4f} to {ratio['high']:.4f}", str(ours["num_rounds"]), str(ours["num_dropped"])),
        )


def _scaling(options: argparse.Namespace, report: Report, folder: Path) -> None:
    report.table("model", "mode", "tokens/s on 1", f"tokens/s on {options.ranks}", "times")
    for shape, mode in _shapes(options):
        if "--clip" in shape.arguments:
            continue  # the same model again: only its cost is of interest
        alone_ms = _timed(options, shape, mode, folder, 1, SCALING_SECONDS, "ours")["ours"]["step_ms"]
        all_ms = report.step_ms.get((shape.name, mode))
        if all_ms is None:
            all_ms = _timed(options, shape, mode, folder, options.ranks, SCALING_SECONDS, "ours")["ours"]["step_ms"]
        rates = [1000.0 * shape.tokens / alone_ms, 1000.0 * shape.tokens * options.ranks / all_ms]
        values = {"model": shape.name, "mode": mode, "tokens_per_s": rates, "times": rates[1] / rates[0]}
        cells_of_row = (shape.name, mode, f"{rates[0]:,.0f}", f"{rates[1]:,.0f}", f"{rates[1] / rates[0]:.2f}")
        report.row("scaling", values, *cells_of_row)


def _timed(
    options: argparse.Namespace, shape: Shape, mode: str, folder: Path, num_ranks: int, seconds: float, *variants: str
) -> dict[str, dict[str, Any]]:
    """Return cells of `benchmarks.gpu_monitor` under DDP, by variant."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "cells.jsonl"
    how = ("--settings", "ddp", "--modes", mode, "--variants", *variants, "--seconds", str(seconds))
    where = (*shape.arguments, f"--output={output}")
    run_ranks(num_ranks, "benchmarks.gpu_monitor", *how, *where, timeout_s=PART_TIMEOUT_S)
    return {cell["variant"]: cell for cell in map(json.loads, output.read_text().splitlines())}


def _yes(flag: bool) -> str:
    return "yes" if flag else "NO"


PARTS: dict[str, Callable[[argparse.Namespace, Report, Path], None]] = {
    "norms": _norms,
    "nan": _nan,
    "kill": _kill,
    "cost": _cost,
    "scaling": _scaling,
}


if __name__ == "__main__":
    main()
