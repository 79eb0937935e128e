"""The optimizers that a job may choose, and which parameters each of their groups holds.

AdamW is PyTorch's fused one and decides on the device whether a step counts. The others are told by the host, which
waits for the norm of the gradients: none of them can leave a step out by itself.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.parameter_options import ParameterGroup
from apt_jobs.jobs.training_options import TrainingOptions
from apt_jobs.training.blocks import blocks_of

MAX_NAMED = 30  # parameters in an error


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


class Lion(Optimizer):
    """Lion (Chen et al. 2023, algorithm 2): the sign of a mix of momentum and gradient, with decoupled decay."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            momenta = [self.state[p].setdefault("exp_avg", torch.zeros_like(p)) for p in parameters]
            beta1, beta2 = group["betas"]
            # As lists of tensors: one launch for many of them. lerp(a, b, w) is (1 - w) a + w b.
            updates = torch._foreach_lerp(momenta, gradients, 1.0 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1.0 - beta2)


@dataclass(slots=True)
class _Group:
    """Parameters with one rate and one decay."""

    factor: float
    weight_decay: float
    parameters: list[nn.Parameter] = field(default_factory=list)


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Train no parameter whose name is like one of `patterns`.

    Raises:
        InvalidInput: a pattern fits no name, or all of them together fit every name.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        _require_match(pattern, names, "training.freeze")
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InvalidInput("training.freeze leaves no parameter to train")


def build_optimizers(model: nn.Module, options: TrainingOptions) -> tuple[Optimizer, ...]:
    """Return what updates the trainable parameters; each of its groups has the `factor` of its rate.

    Two groups by default: decay is for matrices only, not for norms and biases.

    Raises:
        InvalidInput: a pattern fits no parameter, or the optimizer is not installed.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for group in options.parameter_groups:
        _require_match(group.pattern, trained, "training.parameter_groups")
    betas, rate = (options.beta1, options.beta2), options.peak_learning_rate
    if options.optimizer == "muon":
        inside = _matrices_of_blocks(model)
        by_muon = {name: parameter for name, parameter in trained.items() if id(parameter) in inside}
        rest = {name: parameter for name, parameter in trained.items() if name not in by_muon}
        return tuple(
            make(groups)
            for make, groups in (
                # Updates of the size of AdamW's, so that both take one rate (Liu et al. 2025, equation 4).
                (lambda it: torch.optim.Muon(it, lr=rate, adjust_lr_fn="match_rms_adamw"), _groups(by_muon, options)),
                (lambda it: SkippingAdamW(it, lr=rate, betas=betas, fused=True), _groups(rest, options)),
            )
            if groups
        )
    groups = _groups(trained, options)
    match options.optimizer:
        case "adafactor":  # without a first momentum and with a factored second one (Shazeer and Stern 2018)
            return (torch.optim.Adafactor(groups, lr=rate),)
        case "lion":
            return (Lion(groups, rate, betas),)
        case "adamw_8bit":
            return (_adamw_8bit(groups, rate, betas),)
    return (SkippingAdamW(groups, lr=rate, betas=betas, fused=True),)


def _adamw_8bit(groups: list[dict[str, Any]], rate: float, betas: tuple[float, float]) -> Optimizer:
    try:
        import bitsandbytes  # nothing else needs it
    except ImportError as exc:
        raise InvalidInput(
            "optimizer 'adamw_8bit' needs bitsandbytes, which is not installed on this worker; use 'adamw'"
        ) from exc
    if not torch.cuda.is_available():
        raise InvalidInput("optimizer 'adamw_8bit' needs a GPU; use 'adamw'")
    optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(groups, lr=rate, betas=betas)
    return optimizer


def _groups(parameters: dict[str, nn.Parameter], options: TrainingOptions) -> list[dict[str, Any]]:
    """Return torch's parameter groups, none of them empty, always in the same order."""
    found: dict[tuple[int, bool], _Group] = {}
    for name, parameter in parameters.items():
        number, special = _first_match(name, options.parameter_groups)
        decays = parameter.dim() >= 2 or (special is not None and special.weight_decay is not None)
        decay = options.weight_decay if special is None or special.weight_decay is None else special.weight_decay
        factor = 1.0 if special is None else special.learning_rate_factor
        group = found.setdefault((number, not decays), _Group(factor, decay if decays else 0.0))
        group.parameters.append(parameter)
    return [
        {"params": group.parameters, "weight_decay": group.weight_decay, "factor": group.factor}
        for _, group in sorted(found.items())
    ]


def _first_match(name: str, groups: list[ParameterGroup]) -> tuple[int, ParameterGroup | None]:
    for number, group in enumerate(groups):
        if fnmatchcase(name, group.pattern):
            return number, group
    return len(groups), None


def _matrices_of_blocks(model: nn.Module) -> set[int]:
    """Return ids of the matrices within blocks: Muon is for hidden layers, not for embeddings and the head."""
    return {id(p) for block in blocks_of(model) for p in block.parameters() if p.dim() == 2}


def _require_match(pattern: str, names: Iterable[str], where: str) -> None:
    known = list(names)
    if not any(fnmatchcase(name, pattern) for name in known):
        shown = ", ".join(known[:MAX_NAMED])
        raise InvalidInput(f"{where}: {pattern!r} fits no parameter; there are {len(known)}, as {shown}")
