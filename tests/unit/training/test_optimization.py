"""A step of the optimizer: clipped as PyTorch clips, left out when its norm is not finite, without a look at it."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from apt_jobs.jobs.spec import TrainingOptions
from apt_jobs.training.optimization import OptimizerStep, adamw, learning_rate_at


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


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", {1: 0.1, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("linear", {1: 0.1, 10: 1.0, 55: 0.55, 82: 0.28, 100: 0.1}),
        ("constant", {1: 0.1, 10: 1.0, 55: 1.0, 100: 1.0}),
        ("wsd", {1: 0.1, 10: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule: Any, expected: dict[int, float]) -> None:
    for warmup in ({"warmup_steps": 10}, {"warmup_ratio": 0.1}):
        fields: dict[str, Any] = {"learning_rate": 1.0, "min_learning_rate_ratio": 0.1, **warmup}
        options = TrainingOptions(schedule=schedule, **fields)
        found = {step: learning_rate_at(step, 100, options) for step in expected}
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    "warmup", [{"warmup_steps": 0}, {"warmup_steps": 200}, {"warmup_ratio": 0.0}, {"warmup_ratio": 0.9}]
)
def test_no_step_has_a_rate_above_the_peak_or_below_zero(schedule: Any, num_steps: int, warmup: dict[str, Any]) -> None:
    options = TrainingOptions(schedule=schedule, learning_rate=1.0, min_learning_rate_ratio=0.0, **warmup)
    rates = [learning_rate_at(step, num_steps, options) for step in range(1, num_steps + 1)]
    assert all(0.0 <= rate <= 1.0 for rate in rates)
