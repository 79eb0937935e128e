"""A step of the optimizer: clipped as PyTorch clips, left out when its norm is not finite, without a look at it."""

import copy
import math
import sys
from typing import Any

import pytest
import torch
from torch import nn

from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.training_options import TrainingOptions
from apt_jobs.training.optimization import OptimizerStep, learning_rate_at
from apt_jobs.training.optimizers import build_optimizers, freeze


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
    step = OptimizerStep(ours, build_optimizers(ours, options), _scaler(is_enabled=False), limit)
    step.set_learning_rate(0.01)
    [plain] = build_optimizers(theirs, options)
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
    [optimizer] = build_optimizers(model, options)
    scaler = _scaler(is_enabled=is_scaled)
    step = OptimizerStep(model, [optimizer], scaler, 1.0)
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
    [optimizer] = build_optimizers(model, TrainingOptions())
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
        ("inverse_sqrt", {1: 0.1, 10: 1.0, 40: 0.1 + 0.9 / 2.0, 90: 0.1 + 0.9 / 3.0}),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule: Any, expected: dict[int, float]) -> None:
    for warmup in ({"warmup_steps": 10}, {"warmup_ratio": 0.1}):
        fields: dict[str, Any] = {"learning_rate": 1.0, "min_learning_rate_ratio": 0.1, **warmup}
        options = TrainingOptions(schedule=schedule, **fields)
        found = {step: learning_rate_at(step, 100, options) for step in expected}
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd", "inverse_sqrt"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    "warmup", [{"warmup_steps": 0}, {"warmup_steps": 200}, {"warmup_ratio": 0.0}, {"warmup_ratio": 0.9}]
)
def test_no_step_has_a_rate_above_the_peak_or_below_zero(schedule: Any, num_steps: int, warmup: dict[str, Any]) -> None:
    options = TrainingOptions(schedule=schedule, learning_rate=1.0, min_learning_rate_ratio=0.0, **warmup)
    rates = [learning_rate_at(step, num_steps, options) for step in range(1, num_steps + 1)]
    assert all(0.0 <= rate <= 1.0 for rate in rates)


def _blocks() -> nn.Module:
    """Two matrices and a norm in a block, an embedding and a head outside."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    model = nn.ModuleDict({"embed": nn.Linear(5, 6, bias=False), "block": block, "head": nn.Linear(6, 3)})
    model._no_split_modules = ["Sequential"]  # type: ignore[assignment]  # as Hugging Face's models name their blocks
    return model


def _steps(optimizer: str, gradients: list[torch.Tensor], shape: tuple[int, ...], **options: Any) -> torch.Tensor:
    """The weights of one parameter after `gradients`, from ones, by our optimizer."""
    holder = nn.ParameterDict({"w": nn.Parameter(torch.ones(shape))})
    block = nn.Sequential(holder)
    block._no_split_modules = ["ParameterDict"]  # type: ignore[assignment]
    fields: dict[str, Any] = {"optimizer": optimizer, "weight_decay": 0.1, "grad_clip_norm": None, **options}
    step = OptimizerStep(block, build_optimizers(block, TrainingOptions(**fields)), _scaler(is_enabled=False), None)
    step.set_learning_rate(0.01)
    for gradient in gradients:
        holder["w"].grad = gradient.clone()
        step.apply(gradient.norm())
    weights: torch.Tensor = holder["w"].detach()
    return weights


GRADIENTS = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def test_lion_is_algorithm_2_of_its_paper() -> None:
    weights, momentum = torch.ones(4, 3).double(), torch.zeros(4, 3).double()
    for gradient in GRADIENTS:
        mixed = 0.9 * momentum + 0.1 * gradient.double()
        weights = weights - 0.01 * (mixed.sign() + 0.1 * weights)
        momentum = 0.95 * momentum + 0.05 * gradient.double()
    torch.testing.assert_close(_steps("lion", GRADIENTS, (4, 3)).double(), weights, rtol=1e-5, atol=1e-6)


def test_muon_moves_along_orthogonal_matrices_of_the_size_of_adamw() -> None:
    """By an exact singular value decomposition; five steps of Newton and Schulz come near it (Jordan et al. 2024)."""
    weights, momentum = torch.ones(4, 3).double(), torch.zeros(4, 3).double()
    for gradient in GRADIENTS:
        momentum = 0.95 * momentum + 0.05 * gradient.double()  # torch's Muon averages; a factor that cancels
        u, _, vh = torch.linalg.svd(0.05 * gradient.double() + 0.95 * momentum, full_matrices=False)
        weights = weights - 0.01 * 0.1 * weights - 0.01 * 0.2 * math.sqrt(4) * (u @ vh)
    found = _steps("muon", GRADIENTS, (4, 3)).double()
    moved, expected = found - 1.0, weights - 1.0
    assert float((moved * expected).sum() / (moved.norm() * expected.norm())) > 0.98
    assert float(moved.norm() / expected.norm()) == pytest.approx(1.0, abs=0.3)


def test_adafactor_is_algorithm_4_of_its_paper() -> None:
    """With relative steps and a factored second moment (Shazeer and Stern 2018)."""
    weights = torch.ones(4, 3).double()
    rows, columns = torch.zeros(4, 1).double(), torch.zeros(1, 3).double()
    for step, gradient in enumerate(GRADIENTS, 1):
        square = gradient.double() ** 2
        beta2 = 1.0 - step**-0.8
        rows = beta2 * rows + (1 - beta2) * square.mean(1, keepdim=True)
        columns = beta2 * columns + (1 - beta2) * square.mean(0, keepdim=True)
        update = gradient.double() / (rows * columns / rows.mean()).sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        rate = min(0.01, step**-0.5) * max(1e-3, float(weights.square().mean().sqrt()))
        weights = weights - 0.01 * 0.1 * weights - rate * update
    torch.testing.assert_close(_steps("adafactor", GRADIENTS, (4, 3)).double(), weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["lion", "muon", "adafactor"])
def test_other_optimizers_leave_a_step_out_whose_norm_is_not_finite(optimizer: str) -> None:
    bad = torch.full((4, 3), math.nan)
    with_it = _steps(optimizer, [GRADIENTS[0], bad, GRADIENTS[1]], (4, 3))
    assert torch.equal(with_it, _steps(optimizer, GRADIENTS[:2], (4, 3)))


def test_muon_is_for_matrices_of_blocks_and_adamw_for_all_else() -> None:
    model = _blocks()
    muon, adamw = build_optimizers(model, TrainingOptions(optimizer="muon"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon, by_adamw = (
        sorted(names[id(p)] for group in optimizer.param_groups for p in group["params"]) for optimizer in (muon, adamw)
    )
    assert by_muon == ["block.0.weight"]
    assert by_adamw == sorted(set(names.values()) - {"block.0.weight"})


def test_groups_have_their_own_rates_and_decay() -> None:
    model = _blocks()
    groups: list[Any] = [
        {"pattern": "embed.*", "learning_rate_factor": 0.1},
        {"pattern": "*.weight", "weight_decay": 0.5},
        {"pattern": "embed.weight", "learning_rate_factor": 7.0},
    ]
    options = TrainingOptions.model_validate({"parameter_groups": groups, "weight_decay": 0.2})
    [optimizer] = build_optimizers(model, options)
    OptimizerStep(model, [optimizer], _scaler(is_enabled=False), None).set_learning_rate(0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert found == {
        "embed.weight": (pytest.approx(0.001), 0.2),
        "block.0.weight": (0.01, 0.5),
        "block.1.weight": (0.01, 0.5),
        "head.weight": (0.01, 0.5),
        "block.0.bias": (0.01, 0.0),
        "block.1.bias": (0.01, 0.0),
        "head.bias": (0.01, 0.0),
    }


def test_patterns_that_fit_nothing_are_refused_with_names_that_exist() -> None:
    options = TrainingOptions.model_validate({"parameter_groups": [{"pattern": "nothing.*"}]})
    with pytest.raises(InvalidInput, match=r"parameter_groups: 'nothing\.\*' fits no parameter.*embed\.weight"):
        build_optimizers(_blocks(), options)
    with pytest.raises(InvalidInput, match=r"freeze: 'nothing' fits no parameter.*embed\.weight"):
        freeze(_blocks(), ["embed.*", "nothing"])
    with pytest.raises(InvalidInput, match="leaves no parameter"):
        freeze(_blocks(), ["*"])


def test_frozen_parameters_are_in_no_group() -> None:
    model = _blocks()
    freeze(model, ["embed.*", "block.[0-9].bias"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"embed.weight", "block.0.bias", "block.1.bias"}
    [optimizer] = build_optimizers(model, TrainingOptions())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


def test_an_optimizer_that_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match="needs a GPU"):
        build_optimizers(_blocks(), TrainingOptions(optimizer="adamw_8bit"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InvalidInput, match="bitsandbytes, which is not installed"):
        build_optimizers(_blocks(), TrainingOptions(optimizer="adamw_8bit"))
