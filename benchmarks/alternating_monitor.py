"""The built-in trainer with its monitor at work in some blocks of steps and not in others: an entry point.

What is left without it is what any trainer does: the norm of all gradients, by which they are clipped. Pairs of blocks,
one with and one without, in random order. Writes to `alternating.json` how long `step` kept the host.
"""

import json
import os
import random
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from apt_jobs.events.spool import SpoolWriter
from apt_jobs.gradient_monitor.monitor import GradientMonitor
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.training import loop, loss

BLOCK_STEPS = 10
WRITE_EVERY_STEPS = 50


def is_monitored(step: int) -> bool:
    """Tell for a step (from 1) whether the monitor is at work."""
    block = (step - 1) // BLOCK_STEPS
    first = random.Random(block // 2).random() < 0.5
    return first == (block % 2 == 0)


class AlternatingMonitor(GradientMonitor):
    """At work in the blocks that `is_monitored` names."""

    host_ms: list[float] = []
    run_file: RunFile

    def step(self, step: int | None = None, *arguments: Any, **options: Any) -> Tensor:
        """Do as the monitor does, or measure the total norm alone."""
        assert step is not None
        if not is_monitored(step):
            gradients = [p.grad for p in self._layers._parameters if p.grad is not None]
            return torch.nn.utils.get_total_norm(gradients)
        began_s = time.perf_counter()
        norm = super().step(step, *arguments, **options)
        self.host_ms.append(1000.0 * (time.perf_counter() - began_s))
        is_due = step % WRITE_EVERY_STEPS == 0 or len(self.host_ms) % BLOCK_STEPS == 0
        if is_due and os.environ.get("RANK", "0") == "0":
            recorded = {"host_ms": statistics.median(self.host_ms), "num_dropped": self.num_dropped}
            (self.run_file.run_dir / "alternating.json").write_text(json.dumps(recorded))
        return norm


def train(run_file: RunFile, spool: SpoolWriter) -> None:
    """Train as the job says; `chunk_logits` of its arguments: the size of a chunk of the compiled loss."""
    AlternatingMonitor.run_file = run_file
    setattr(loop, "GradientMonitor", AlternatingMonitor)  # noqa: B010  # the trainer has no option for it
    train_tuned(run_file, spool)


def train_tuned(run_file: RunFile, spool: SpoolWriter) -> None:
    """Train with the usual monitor and another size of chunk."""
    chunk_logits = run_file.spec.arguments.get("chunk_logits")
    if chunk_logits is not None:
        loss.COMPILED_CHUNK_LOGITS = int(chunk_logits)
    loop.train(run_file, spool)


def train_uncaptured(run_file: RunFile, spool: SpoolWriter) -> None:
    """Train without a CUDA graph."""

    def refuse(*_: object) -> None:
        raise RuntimeError("it is not wanted here")

    setattr(loop, "CapturedPass", refuse)  # noqa: B010  # the trainer has no option for it
    loop.train(run_file, spool)
