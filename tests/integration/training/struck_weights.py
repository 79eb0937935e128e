"""The built-in trainer, but on rank 1 a bit of a weight flips after some steps: from then on its loss is NaN."""

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from apt_jobs.events.spool import SpoolWriter
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.training import loop
from apt_jobs.training.torchrun import read_rank_info

STRUCK_AFTER_STEPS = 32
EXPONENT_BIT = 1 << 30  # of a float32: a norm's weight of about 1 becomes 1e38, or infinite


def train(run_file: RunFile, spool: SpoolWriter) -> None:
    """An entry point."""
    num_steps = 0

    def strike(optimizer: Optimizer, *_: object) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == STRUCK_AFTER_STEPS and read_rank_info().rank == 1:
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            weight = next(parameter for parameter in parameters if parameter.dim() == 1)
            weight.data.view(torch.int32)[0] ^= EXPONENT_BIT

    register_optimizer_step_post_hook(strike)
    loop.train(run_file, spool)
