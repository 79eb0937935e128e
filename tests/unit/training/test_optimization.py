"""A step of the optimizer: clipped as PyTorch clips, left out when its norm is not finite, without a look at it."""

import copy
import math

import pytest
import torch
from torch import nn

from apt_jobs.jobs.spec import TrainingOptions
from apt_jobs.training.optimization import OptimizerStep, adamw


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def _scaler(*, is_enabled: bool) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=is_enabled, init_scale=1024.0)


def _backward(model: nn.Module, scaler: torch.amp.GradScaler | None = None) -> torch.Tensor:
    loss = model(torch.ones(4, 5)).square().sum()
    torch.autograd.backward(loss if scaler is None else scaler.scale(loss))
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm if scaler is None else norm / scaler.get_scale()


@pytest.mark.parametrize("limit", [None, 1e-3, 1e3])
def test_steps_are_those_of_clipping_and_adamw(limit: float | None) -> None:
    options = TrainingOptions(grad_clip_norm=limit)
    ours, theirs = _model(), _model()
    step = OptimizerStep(ours, adamw(ours, options), _scaler(is_enabled=False), limit)
    step.set_learning_rate(0.01)
    plain = adamw(theirs, options)
    for group in plain.param_groups:
        group["lr"] = 0.01
    for _ in range(5):
        step.apply(_backward(ours))
        _backward(theirs)
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit)
        plain.step()
        plain.zero_grad()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf])
def test_a_step_whose_norm_is_not_finite_changes_nothing(norm: float, is_scaled: bool) -> None:
    """Even where this rank's own gradients are finite: with shards, another rank may have the bad one."""
    model, options = _model(), TrainingOptions()
    optimizer = adamw(model, options)
    scaler = _scaler(is_enabled=is_scaled)
    step = OptimizerStep(model, optimizer, scaler, 1.0)
    step.apply(_backward(model, scaler))
    weights = [parameter.clone() for parameter in model.parameters()]
    before = copy.deepcopy(optimizer.state_dict()["state"])
    _backward(model, scaler)
    step.apply(torch.tensor(norm))
    assert all(torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True))
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(before[key][name], after[key][name]) for key in before for name in before[key])
    assert scaler.get_scale() == (512.0 if is_scaled else 1.0)
    assert all(parameter.grad is None for parameter in model.parameters())
    step.apply(_backward(model, scaler))
    assert not torch.equal(weights[0], next(model.parameters()))


def test_a_state_of_another_implementation_does_not_turn_the_skipping_off() -> None:
    model = _model()
    optimizer = adamw(model, TrainingOptions())
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["fused"] = None
    optimizer.load_state_dict(state)
    assert all(group["fused"] for group in optimizer.param_groups)
