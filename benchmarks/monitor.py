"""What the gradient monitor costs on CPU: a training step with it against the same step without, on 2 gloo ranks.

The measurement is that of `benchmarks.gpu_monitor`, with a model of 4 million parameters: variants in turns in one
process group, so that a machine that slows down slows all of them.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.rows import Row
from benchmarks.torchrun import run_ranks

SECONDS = 180
MODEL = ("--num-layers=4", "--width=256", "--length=128", "--vocabulary-size=4096", "--batch-size=4")
NAMES = {
    "SPEC's way": "monitor/spec-way-cpu-2ranks",
    "histograms": "monitor/histograms-cpu-2ranks",
    "ours, no local norms": "monitor/ours-without-rank-norms-cpu-2ranks",
    "ours": "monitor/ours-cpu-2ranks",
}


def rows() -> Iterator[Row]:
    """Yield milliseconds a step; the ratio is to the unmonitored step, with its 95 % interval."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "cells.jsonl"
        options = ("--device=cpu", "--settings=ddp", "--modes=eager", f"--seconds={SECONDS}", f"--output={output}")
        run_ranks(2, "benchmarks.gpu_monitor", *options, *MODEL, timeout_s=600)
        cells = {cell["variant"]: cell for cell in map(json.loads, output.read_text().splitlines())}
    unmonitored_ms = cells["none"]["step_ms"]
    for variant, name in NAMES.items():
        cell, ratio = cells[variant], cells[variant]["ratio"]
        yield Row(
            name,
            cell["step_ms"],
            unmonitored_ms,
            f"the same step unmonitored, {ratio['low']:.3f} to {ratio['high']:.3f}",
            ratio["median"],
            "ms/step",
        )
