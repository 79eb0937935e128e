"""The training of the latency benchmark, a registered entry point: real steps with pauses of random length between."""

import argparse
import random
import time

import torch
from torch import nn

from apt_jobs.gradient_monitor.monitor import GradientMonitor

WIDTH, NUM_BLOCKS, BATCH = 32, 37, 8  # 150 layers' worth of events: two tensors a block, and one more block


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--shortest-s", type=float, required=True)
    parser.add_argument("--longest-s", type=float, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    blocks = [block for _ in range(NUM_BLOCKS) for block in (nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Tanh())]
    model = nn.Sequential(*blocks, nn.Linear(WIDTH, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    chance = random.Random(1)
    with GradientMonitor(model, optimizer) as monitor:
        for _ in range(arguments.steps):
            time.sleep(chance.uniform(arguments.shortest_s, arguments.longest_s))
            x = torch.randn(BATCH, WIDTH)
            loss = (model(x).squeeze(1) - x.sum(1)).square().mean()
            loss.backward()
            monitor.step(loss=loss, num_samples=BATCH)
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    main()
