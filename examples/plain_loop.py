"""A training loop of your own with the gradient monitor: the three lines are marked.

    torchrun --nproc-per-node=2 examples/plain_loop.py
    python examples/plain_loop.py

As a job, when the worker knows it by name (APT_JOBS_ENTRY_POINTS='{"plain-loop": "examples/plain_loop.py"}'):

    {"kind": "train", "entry_point": "plain-loop", "num_ranks": 2, "arguments": {"steps": 100}}

A byte is predicted from the eight before it, on CPython's own documentation: a loss of about 3 after 100 steps.
"""

import argparse
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from apt_jobs.gradient_monitor import GradientMonitor  # one

CONTEXT, BATCH = 8, 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    num_steps = parser.parse_args().steps
    if is_distributed := dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    rank = dist.get_rank() if is_distributed else 0

    torch.manual_seed(1)
    model: nn.Module = nn.Sequential(
        nn.Embedding(256, 16), nn.Flatten(), nn.Linear(16 * CONTEXT, 64), nn.Tanh(), nn.Linear(64, 256)
    )
    if is_distributed:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.tensor(list("\n".join(topics.values()).encode()))
    generator = torch.Generator().manual_seed(rank)

    with GradientMonitor(model, optimizer) as monitor:  # two
        for step in range(1, num_steps + 1):
            x, y = batch_of(text, generator)
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            monitor.step(loss=loss, num_samples=BATCH)  # three: before clipping
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if rank == 0 and step % 20 == 0:
                print(f"step {step}  loss {loss.item():.3f}")
    if is_distributed:
        dist.destroy_process_group()


def batch_of(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bytes [BATCH, CONTEXT] from random places, and the byte after each [BATCH]."""
    starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=generator)
    windows = text[starts + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, -1]


if __name__ == "__main__":
    main()
