"""What repeatable operations (`training.deterministic`) cost on a GPU: the same step with them and without, in turns.

    python -m benchmarks.gpu_repeatable

GPT-2 124M, 16 sequences of 1024 tokens, bf16 autocast, fused AdamW, eager; blocks of ten steps in random order. The
ratio is that of a block to the one of the usual operations in its round.
"""

import argparse
import os
import random
import sys
import time

import torch

from apt_jobs.training.ddp import repeatable
from benchmarks.gpt2 import GPT2
from benchmarks.gpu_monitor import BLOCK_STEPS, NUM_BATCHES, Trained, run_steps
from benchmarks.intervals import bootstrap

VOCABULARY_SIZE = 50_257
SHAPE = (16, 1024)
WAYS = ("usual", "repeatable")


def main() -> None:
    """Measure, and print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU that PyTorch can use")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    device = torch.device("cuda")
    with device:
        model = GPT2(12, 768, SHAPE[1], VOCABULARY_SIZE)
        batches = [torch.randint(0, VOCABULARY_SIZE, SHAPE) for _ in range(NUM_BATCHES)]
    trained = Trained(model, model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))
    for way in WAYS:
        _block(trained, batches, way, device)
    rounds, chance, ends_at = list[dict[str, float]](), random.Random(7), time.perf_counter() + options.seconds
    while time.perf_counter() < ends_at:
        order = chance.sample(WAYS, len(WAYS))
        rounds.append({way: _block(trained, batches, way, device) for way in order})
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {len(rounds)} rounds")
    for way in WAYS:
        ratio = bootstrap([times[way] / times["usual"] for times in rounds])
        step_ms = bootstrap([times[way] for times in rounds]).median
        print(f"| {way} | {step_ms:.2f} ms | {ratio.median:.4f} | {ratio.low:.4f} to {ratio.high:.4f} |")


def _block(trained: Trained, batches: list[torch.Tensor], way: str, device: torch.device) -> float:
    """Return milliseconds a step."""
    torch.use_deterministic_algorithms(False)
    if way == "repeatable":
        repeatable(device)
    torch.cuda.synchronize()
    began = time.perf_counter()
    run_steps(trained, lambda loss: None, batches, BLOCK_STEPS)
    torch.cuda.synchronize()
    return 1000.0 * (time.perf_counter() - began) / BLOCK_STEPS


if __name__ == "__main__":
    main()
