"""What the gradient monitor costs on CPU: a training step with it against the same step without, on 2 gloo ranks.

The measurement is that of `benchmarks.gpu_monitor`, with a model of 4 million parameters: variants in turns in one
process group, so that a machine that slows down slows all of them.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.rows import Row

SECONDS = 180
MODEL = ("--num-layers=4", "--width=256", "--length=128", "--vocabulary-size=4096", "--batch-size=4")
NAMES = {
    "SPEC's way": "monitor/spec-way-cpu-2ranks",
    "histograms": "monitor/histograms-cpu-2ranks",
    "ours, no local norms": "monitor/ours-without-rank-norms-cpu-2ranks",
    "ours, everything": "monitor/ours-cpu-2ranks",
}


def rows() -> Iterator[Row]:
    """Milliseconds a step; the ratio is to the unmonitored step, with its 95 % interval."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "cells.jsonl"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"),
            *("--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "-m", "benchmarks.gpu_monitor"),
            *("--device=cpu", "--settings=ddp", "--modes=eager", f"--seconds={SECONDS}", f"--output={output}", *MODEL),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True, timeout=600, capture_output=True)
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
