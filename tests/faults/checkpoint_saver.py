"""Saves checkpoints until it is killed: one forked child for each line on stdin, so that torch is loaded once.

A line is a folder, and the largest file in bytes that the child may write once it has saved one checkpoint (0: no
limit). The child's pid is printed, then the name of each checkpoint whose save returned, `full` when the disk refused
one, and `gone` when the child has ended.
"""

import os
import resource
import sys
from pathlib import Path

import torch
from safetensors.torch import save

from apt_jobs.errors import OutOfSpace
from apt_jobs.jobs.checkpoint_state import CheckpointState
from apt_jobs.jobs.model_config import APTConfig
from apt_jobs.training.checkpoint import Snapshot, write_checkpoint
from apt_jobs.training.model import build_model
from apt_jobs.training.tokenizer import train_tokenizer

torch.set_num_threads(1)  # only a process with one thread may fork
CONFIG = APTConfig(d_model=128, num_layers=2, num_attention_heads=2, vocab_size=512, max_seq_len=32)
MODEL = build_model(CONFIG, CONFIG.vocab_size, 0)
TOKENIZER = train_tokenizer("a short text " * 100, 300, 32)


def save_forever(folder: Path, max_file_bytes: int) -> None:
    """Each checkpoint has other weights, all of one value: a mixture of two would show."""
    number = 0
    while True:
        number += 1
        weights = {name: torch.full_like(tensor, number) for name, tensor in MODEL.state_dict().items()}
        moments = {f"{name}/exp_avg": tensor for name, tensor in weights.items()}
        snapshot = Snapshot(weights, moments, [], [save({"cpu": torch.get_rng_state()})])
        name = f"{os.getpid()}-{number}"
        try:
            write_checkpoint(folder, name, snapshot, MODEL, TOKENIZER, CheckpointState(global_step=number))
        except OutOfSpace:
            print("full", flush=True)
            return
        print(name, flush=True)
        if max_file_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        folder, max_file_bytes = line.split()
        if (pid := os.fork()) == 0:
            print(os.getpid(), flush=True)
            save_forever(Path(folder), int(max_file_bytes))
            os._exit(0)
        os.waitpid(pid, 0)
        print("gone", flush=True)


if __name__ == "__main__":
    main()
