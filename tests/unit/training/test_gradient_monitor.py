"""The gradient monitor against norms computed the slow way, in float64."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from apt_jobs.errors import InvalidInput
from apt_jobs.events.kinds import AnomaliesFound, GradientsRecorded, LayersNamed
from apt_jobs.events.spool import SpoolReader, SpoolWriter
from apt_jobs.training.gradient_monitor import GradientMonitor


def model_with_gradients(scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    model(torch.randn(7, 6)).square().sum().mul(scale).backward()
    return model


def slow_norms(model: nn.Module) -> dict[str, float]:
    return {
        name: math.sqrt(sum(value**2 for value in parameter.grad.double().flatten().tolist()))
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_norms_agree_with_float64() -> None:
    model = model_with_gradients()
    monitor = GradientMonitor(model)
    total = monitor.step(1)
    expected = slow_norms(model)
    recorded = monitor.export_for_webui()["gradient_timeline"][0]["layers"]
    for name, norm in expected.items():
        assert recorded[name]["norm"] == pytest.approx(norm, rel=1e-6)
    assert total.item() == pytest.approx(math.sqrt(sum(norm**2 for norm in expected.values())), rel=1e-6)
    assert monitor.sync_gradients_distributed() == pytest.approx(expected, rel=1e-6)


def test_a_loss_scale_is_taken_out() -> None:
    monitor = GradientMonitor(model := model_with_gradients(scale=1024.0))
    plain = slow_norms(model_with_gradients())
    monitor.step(1, scale=1024.0)
    assert monitor.sync_gradients_distributed() == pytest.approx(plain, rel=1e-5)
    assert slow_norms(model)["0.weight"] > 1000 * plain["0.weight"]


@pytest.mark.parametrize(
    ("value", "kind"), [(math.nan, "nan"), (math.inf, "inf"), (1e4, "exploding"), (1e-9, "vanishing")]
)
def test_each_anomaly_is_named_and_nothing_else(value: float, kind: str) -> None:
    model = model_with_gradients()
    monitor = GradientMonitor(model)
    bias = model.get_parameter("2.bias")
    bias.grad = torch.zeros_like(bias)
    bias.grad[0] = value
    monitor.step(5)
    exported = monitor.export_for_webui()
    assert (
        exported["anomaly_summary"]
        == {kind: 1}
        == {name: count for name, count in monitor.aggregate_anomalies_distributed().items() if count}
    )
    layers = exported["gradient_timeline"][0]["layers"]
    assert [name for name, layer in layers.items() if layer["is_anomaly"]] == ["2.bias"]
    json.dumps(exported, allow_nan=False)


def test_unused_and_frozen_layers_are_no_anomaly() -> None:
    model = model_with_gradients()
    model.get_parameter("0.bias").requires_grad_(False)
    model.get_parameter("2.bias").grad = None
    monitor = GradientMonitor(model)
    monitor.step(1)
    exported = monitor.export_for_webui()
    assert "0.bias" not in exported["layer_statistics"]
    assert exported["gradient_timeline"][0]["layers"]["2.bias"] == {"norm": 0.0, "is_anomaly": False}
    assert exported["anomaly_summary"] == {}


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no trainable parameter"):
        GradientMonitor(nn.ReLU())


def test_statistics_go_on_after_a_restart() -> None:
    whole, first, second = (GradientMonitor(model_with_gradients()) for _ in range(3))
    for step in range(1, 5):
        whole.step(step)
    first.step(1)
    first.step(2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.step(3)
    second.step(4)
    assert second.export_for_webui()["layer_statistics"] == whole.export_for_webui()["layer_statistics"]
    assert second.export_for_webui()["total_steps"] == 4


def test_the_spool_gets_names_once_and_one_event_a_step(tmp_path: Path) -> None:
    model = model_with_gradients()
    with SpoolWriter(tmp_path / "rank-0.spool") as spool:
        monitor = GradientMonitor(model, spool, exploding_above=1e-3, vanishing_below=0.0)
        monitor.step(1)
        monitor.step(2)
    events = [event for _, event in SpoolReader(tmp_path / "rank-0.spool").read()]
    assert [type(event) for event in events] == [
        LayersNamed,
        *(GradientsRecorded, AnomaliesFound, GradientsRecorded, AnomaliesFound),
    ]
    assert isinstance(events[2], AnomaliesFound)
    assert {layer.layer for layer in events[2].layers} == set(slow_norms(model))
