"""How long a save holds up a training: the snapshot that all ranks wait for, against snapshot and writing in one go."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from apt_jobs.jobs.checkpoint_state import CheckpointState
from apt_jobs.jobs.model_config import APTConfig
from apt_jobs.training.checkpoint import take_snapshot, write_checkpoint
from apt_jobs.training.ddp import process_group
from apt_jobs.training.model import build_model
from apt_jobs.training.tokenizer import train_tokenizer
from benchmarks.rows import Row, paired_row

NUM_SAVES = 12
CONFIG = APTConfig(d_model=384, num_layers=6, num_attention_heads=6, vocab_size=2048, max_seq_len=64)


def rows() -> Iterator[Row]:
    """`checkpoint/stall`, in milliseconds a save of a model of 12 million parameters with AdamW's state, 2 ranks."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "apt_jobs.training.launch_ranks", "--nproc-per-node=2", "--rdzv-backend=apt-jobs"),
            *("--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "-m", "benchmarks.checkpoint", folder),
        ]
        subprocess.run(command, check=True, timeout=280, capture_output=True)
        times = json.loads((Path(folder) / "times.json").read_text())
    yield paired_row("checkpoint/stall", times["stall"], times["whole"], "snapshot and writing in one go", "ms/save")


def measure(folder: Path) -> None:
    """One rank: train a step, save, in turns; rank 0 writes the times."""
    with process_group("cpu") as rank:
        model = build_model(CONFIG, CONFIG.vocab_size, 0)
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        tokenizer = train_tokenizer("a short text " * 100, 300, 32)
        times: dict[str, list[float]] = {"stall": [], "whole": []}
        for number in range(NUM_SAVES):
            ids = torch.randint(0, CONFIG.vocab_size, (2, CONFIG.max_seq_len))
            ddp(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            torch.distributed.barrier()
            began = time.perf_counter()
            snapshot = take_snapshot(model, [optimizer], rank)
            times["stall"].append(1000.0 * (time.perf_counter() - began))
            if snapshot is not None:
                saved = write_checkpoint(
                    folder, str(number), snapshot, model, tokenizer, CheckpointState(global_step=number)
                )
                times["whole"].append(1000.0 * (time.perf_counter() - began))
                shutil.rmtree(saved.folder)
            torch.distributed.barrier()
        if rank.is_first:
            (folder / "times.json").write_text(json.dumps(times))


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
