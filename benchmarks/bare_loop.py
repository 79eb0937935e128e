"""The peer of `benchmarks/gpu_train.py`: the loop that everybody writes, around a whole model under `torch.compile`.

Llama of Hugging Face, bf16 autocast, fused AdamW, gradients clipped to 1, batches that lie on the GPU already, TF32,
the loss read once in ten steps. Writes the milliseconds of a step, one number for each block of ten.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from apt_jobs.jobs.model_config import APTConfig
from apt_jobs.training.model import build_model

NUM_BATCHES = 8
WARM_UP_STEPS = 10
BLOCK_STEPS = 10


def main() -> None:
    """Train and time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=json.loads, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    config = APTConfig.model_validate(options.model)
    is_cuda = options.device == "cuda"
    model: Any = build_model(config, config.vocab_size, 0).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    called = model if options.eager else torch.compile(model)
    size = (options.batch_size, config.max_seq_len)
    batches = [torch.randint(config.vocab_size, size, device=options.device) for _ in range(NUM_BATCHES)]

    def run(num_steps: int) -> float:
        """Return seconds a step."""
        began_s = time.perf_counter()
        for number in range(num_steps):
            ids = batches[number % NUM_BATCHES]
            with torch.autocast(options.device, dtype=torch.bfloat16):
                loss = called(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()
        if is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - began_s) / num_steps

    began_s = time.perf_counter()
    run(1)
    first_step_s = time.perf_counter() - began_s
    run(WARM_UP_STEPS)
    step_ms = [1000.0 * run(BLOCK_STEPS) for _ in range(options.blocks)]
    options.output.write_text(json.dumps({"step_ms": step_ms, "first_step_s": first_step_s}))


if __name__ == "__main__":
    main()
