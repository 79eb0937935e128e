"""How the built-in trainer optimizes: the learning rate of each step, its application, the type to compute in."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apt_jobs.errors import InvalidInput
from apt_jobs.gradient_monitor.norms import local_part
from apt_jobs.jobs.training_options import TrainingOptions
from apt_jobs.training.optimizers import SkippingAdamW

CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_
NO_WARMUP_STEPS = 10_000  # time scale of inverse_sqrt without a warm-up, as in transformers


def learning_rate_at(step: int, num_steps: int, options: TrainingOptions) -> float:
    """Return the learning rate of a step (from 1): linear warm-up, then down to `min_learning_rate_ratio` of the peak.

    Cosine: half a period (Loshchilov and Hutter 2017, eq. 5). wsd: warm-up, stable, decay (Hu et al. 2024, MiniCPM).
    inverse_sqrt: Vaswani et al. 2017, eq. 3, as in transformers.
    """
    peak = options.peak_learning_rate
    warmup_steps = options.warmup_steps
    if options.warmup_ratio is not None:
        warmup_steps = round(options.warmup_ratio * num_steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
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
        case "inverse_sqrt":
            scale = warmup_steps or NO_WARMUP_STEPS
            left = math.sqrt(scale / (step - warmup_steps + scale))
    ratio = options.min_learning_rate_ratio
    return peak * (ratio + (1.0 - ratio) * max(left, 0.0))


class OptimizerStep:
    """Applies the gradients of a step, clipped, without a wait for the GPU if AdamW alone does it.

    Whether the step counts is decided on the device, from the norm of the reduced gradients: it is the same on all
    ranks, so that all of them leave a step out whose norm is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        scaler: torch.amp.GradScaler,
        grad_clip_norm: float | None,
    ) -> None:
        self._model, self._optimizers, self._scaler = model, list(optimizers), scaler
        self._limit = grad_clip_norm
        self._waits = not all(isinstance(optimizer, SkippingAdamW) for optimizer in self._optimizers)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Use it from the next step on."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group.get("factor", 1.0)

    @torch.no_grad()
    def apply(self, grad_norm: Tensor) -> None:
        """Update the weights and clear the gradients. `grad_norm` is their unscaled global norm (scalar)."""
        divisor = torch.ones_like(grad_norm)
        if self._limit is not None:  # as torch.nn.utils.clip_grad_norm_, but no pass over the gradients of its own
            divisor = ((grad_norm + CLIP_EPSILON) / self._limit).clamp_min(1.0)
        is_finite = grad_norm.isfinite()
        if self._scaler.is_enabled():
            # The scaler looks for Inf and NaN by itself, on each rank alone: what one of them has must be seen by all.
            self._multiply_gradients(torch.where(is_finite, 1.0 / divisor, torch.nan))
            for optimizer in self._optimizers:
                self._scaler.step(optimizer)
            self._scaler.update()
        elif not self._waits or bool(is_finite):  # sync point, except with AdamW alone
            self._step(divisor, is_finite)
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _step(self, divisor: Tensor, is_finite: Tensor) -> None:
        if self._waits:
            self._multiply_gradients(1.0 / divisor)
            divisor = torch.ones_like(divisor)
        for optimizer in self._optimizers:
            if isinstance(optimizer, SkippingAdamW):
                optimizer.grad_scale, optimizer.found_inf = divisor, (~is_finite).float()
            optimizer.step()

    def _multiply_gradients(self, factor: Tensor) -> None:
        torch._foreach_mul_([local_part(p.grad) for p in self._model.parameters() if p.grad is not None], factor)


def compute_type_of(precision: str, device: torch.device) -> torch.dtype:
    """Return the type that products are computed in."""
    if precision == "bf16-true":
        return torch.bfloat16
    return precision_of(precision, device) or torch.float32


def precision_of(wanted: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type; None: all is computed in the type of the weights."""
    if wanted == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if wanted == "fp16" and device.type != "cuda":
        raise InvalidInput("precision 'fp16' needs a GPU; use 'auto', 'bf16' or 'fp32'")
    return {"fp32": None, "bf16-true": None, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]
