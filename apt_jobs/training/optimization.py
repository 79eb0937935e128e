"""How the built-in trainer optimizes: the learning rate of each step, AdamW, the type to compute in."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from apt_jobs.errors import InvalidInput
from apt_jobs.gradient_monitor.norms import local_part
from apt_jobs.jobs.spec import TrainingOptions

CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_


def learning_rate_at(step: int, num_steps: int, options: TrainingOptions) -> float:
    """Return the learning rate of a step (from 1): linear warm-up, then down to `min_learning_rate_ratio` of the peak.

    Cosine: half a period (Loshchilov and Hutter 2017, eq. 5). wsd: warm-up, stable, decay (Hu et al. 2024, MiniCPM).
    """
    warmup_steps = options.warmup_steps
    if options.warmup_ratio is not None:
        warmup_steps = round(options.warmup_ratio * num_steps)
    if step <= warmup_steps:
        return options.learning_rate * step / warmup_steps
    done = min((step - warmup_steps) / max(num_steps - warmup_steps, 1), 1.0)
    match options.schedule:
        case "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * done))
        case "linear":
            left = 1.0 - done
        case "constant":
            left = 1.0
        case "wsd":
            left = min((num_steps - step) / max(round(options.decay_ratio * num_steps), 1), 1.0)
    ratio = options.min_learning_rate_ratio
    return options.learning_rate * (ratio + (1.0 - ratio) * max(left, 0.0))


class SkippingAdamW(torch.optim.AdamW):
    """Fused AdamW, which reads on the device by what to divide the gradients, and whether to leave the step out.

    The two attributes are those that `torch.amp.GradScaler` gives to fused optimizers, too.
    """

    grad_scale: Tensor  # gradients are divided by it
    found_inf: Tensor  # 1.0: change nothing, and do not count the step

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Stay fused: a checkpoint of another implementation would bring its own flag."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for group in self.param_groups:
            group["fused"] = True


def adamw(model: nn.Module, options: TrainingOptions) -> SkippingAdamW:
    """Decay on matrices only: not on norms and biases."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (options.beta1, options.beta2)
    return SkippingAdamW(groups, lr=options.learning_rate, betas=betas, fused=True)


class OptimizerStep:
    """Applies the gradients of a step, clipped, without a wait for the GPU.

    Whether the step counts is decided on the device, from the norm of the reduced gradients: it is the same on all
    ranks, so that all of them leave a step out whose norm is not finite.
    """

    def __init__(
        self, model: nn.Module, optimizer: SkippingAdamW, scaler: torch.amp.GradScaler, grad_clip_norm: float | None
    ) -> None:
        self._model, self._optimizer, self._scaler = model, optimizer, scaler
        self._limit = grad_clip_norm

    def set_learning_rate(self, learning_rate: float) -> None:
        """Use it from the next step on."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate

    @torch.no_grad()
    def apply(self, grad_norm: Tensor) -> None:
        """Update the weights and clear the gradients. `grad_norm` is their unscaled global norm (scalar)."""
        divisor = torch.ones_like(grad_norm)
        if self._limit is not None:  # as torch.nn.utils.clip_grad_norm_, but no pass over the gradients of its own
            divisor = ((grad_norm + CLIP_EPSILON) / self._limit).clamp_min(1.0)
        is_finite = grad_norm.isfinite()
        if self._scaler.is_enabled():
            # The scaler looks for Inf and NaN by itself, on each rank alone: what one of them has must be seen by all.
            factor = torch.where(is_finite, 1.0 / divisor, torch.nan)
            torch._foreach_mul_([local_part(p.grad) for p in self._model.parameters() if p.grad is not None], factor)
            self._scaler.step(self._optimizer)
            self._scaler.update()
        else:
            self._optimizer.grad_scale, self._optimizer.found_inf = divisor, (~is_finite).float()
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def precision_of(wanted: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type; None: float32 throughout."""
    if wanted == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if wanted == "fp16" and device.type != "cuda":
        raise InvalidInput("precision 'fp16' needs a GPU; use 'auto', 'bf16' or 'fp32'")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]
