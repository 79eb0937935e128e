"""How the built-in trainer optimizes: the learning rate of each step, AdamW, the type to compute in."""

import math

import torch
from torch import nn

from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.spec import TrainingOptions


def learning_rate_at(step: int, num_steps: int, options: TrainingOptions) -> float:
    """Linear warm-up, then half a cosine down to `min_learning_rate_ratio` (Loshchilov and Hutter 2017, eq. 5)."""
    if step <= options.warmup_steps:
        return options.learning_rate * step / options.warmup_steps
    done = (step - options.warmup_steps) / max(num_steps - options.warmup_steps, 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
    ratio = options.min_learning_rate_ratio
    return options.learning_rate * (ratio + (1.0 - ratio) * cosine)


def adamw(model: nn.Module, options: TrainingOptions, device: torch.device) -> torch.optim.AdamW:
    """Decay on matrices only: not on norms and biases."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (options.beta1, options.beta2)
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=betas, fused=device.type == "cuda")


def precision_of(wanted: str, device: torch.device) -> torch.dtype | None:
    """The autocast type; None: float32 throughout."""
    if wanted == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if wanted == "fp16" and device.type != "cuda":
        raise InvalidInput("precision 'fp16' needs a GPU; use 'auto', 'bf16' or 'fp32'")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]
