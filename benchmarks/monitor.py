"""What the gradient monitor costs: a training step with it against the same step without, 2 gloo ranks on CPU.

Both kinds of step are taken in turns in one process group, so that a machine that slows down slows both.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from apt_jobs.events.spool import SpoolWriter
from apt_jobs.jobs.spec import APTConfig
from apt_jobs.training.ddp import process_group
from apt_jobs.training.gradient_monitor import GradientMonitor
from apt_jobs.training.model import build_model
from benchmarks.rows import Row, paired_row

NUM_PAIRS = 60
WARM_UP = 5
CONFIG = APTConfig(d_model=256, num_layers=4, num_attention_heads=4, vocab_size=4096, max_seq_len=128)


def rows() -> Iterator[Row]:
    """`monitor/ours-cpu-2ranks` and `monitor/spec-way-cpu-2ranks`, in milliseconds a step."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "times.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"),
            *("--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "-m", "benchmarks.monitor", str(output)),
        ]
        subprocess.run(command, check=True, timeout=280, capture_output=True)
        times = json.loads(output.read_text())
    for name, kind in (("monitor/ours-cpu-2ranks", "ours"), ("monitor/spec-way-cpu-2ranks", "spec_way")):
        yield paired_row(name, times[kind], times["none"], "the same step unmonitored", "ms/step")


def measure(output: Path) -> None:
    """One rank: time every kind of step in turns; rank 0 writes the times."""
    with process_group("cpu") as rank, SpoolWriter(output.with_suffix(f".{rank.rank}")) as spool:
        torch.manual_seed(1)
        model = build_model(CONFIG, CONFIG.vocab_size, 0)
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        monitor = GradientMonitor(model, spool=spool if rank.is_first else None, runs_dir=None)
        times: dict[str, list[float]] = {"none": [], "ours": [], "spec_way": []}
        for number in range(NUM_PAIRS + WARM_UP):
            for kind, measured in times.items():
                took_ms = _step(ddp, optimizer, monitor, kind, number)
                if number >= WARM_UP:
                    measured.append(took_ms)
        if rank.is_first:
            output.write_text(json.dumps(times))


def _step(ddp: Any, optimizer: torch.optim.Optimizer, monitor: GradientMonitor, kind: str, number: int) -> float:
    ids = torch.randint(0, CONFIG.vocab_size, (4, CONFIG.max_seq_len))
    torch.distributed.barrier()
    began = time.perf_counter()
    ddp(input_ids=ids, labels=ids).loss.backward()
    if kind == "ours":
        monitor.step(number)
    elif kind == "spec_way":
        for parameter in ddp.module.parameters():
            norm = torch.tensor(parameter.grad.norm().item())
            torch.distributed.all_reduce(norm)
    optimizer.step()
    optimizer.zero_grad()
    return 1000.0 * (time.perf_counter() - began)


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
