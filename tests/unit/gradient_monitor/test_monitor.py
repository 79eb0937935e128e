"""The gradient monitor against norms computed the slow way, in float64."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from apt_jobs.errors import InvalidInput
from apt_jobs.events.current_spool import spool_of_job
from apt_jobs.events.kinds import (
    AnomaliesFound,
    GradientsRecorded,
    LayersNamed,
    RankGradientsRecorded,
    StepTrained,
    UpdatesMeasured,
)
from apt_jobs.events.spool import SpoolReader, SpoolWriter
from apt_jobs.gradient_monitor.monitor import GradientMonitor


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
        monitor = GradientMonitor(model, spool=spool, exploding_above=1e-3, vanishing_below=0.0)
        monitor.step(1)
        monitor.step(2)
    events = [event for _, event in SpoolReader(tmp_path / "rank-0.spool").read()]
    assert [type(event) for event in events] == [
        LayersNamed,
        *(GradientsRecorded, AnomaliesFound, RankGradientsRecorded),
        *(GradientsRecorded, AnomaliesFound, RankGradientsRecorded, UpdatesMeasured),
    ]
    assert isinstance(events[2], AnomaliesFound)
    assert {layer.layer for layer in events[2].layers} == set(slow_norms(model))


def events_of(path: Path) -> list[Any]:
    return [event for _, event in SpoolReader(path).read()]


def test_losses_and_rates_are_told_for_a_loop_that_has_no_words_of_its_own(tmp_path: Path) -> None:
    model = model_with_gradients()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    with SpoolWriter(tmp_path / "rank-0.spool") as spool, spool_of_job(spool), GradientMonitor(model, optimizer) as it:
        it.step(loss=torch.tensor(3.0), num_samples=7)
        it.step(loss=2.5)
    metrics = [event for event in events_of(tmp_path / "rank-0.spool") if isinstance(event, StepTrained)]
    assert [(event.step, event.train_loss, event.learning_rate) for event in metrics] == [
        (1, 3.0, 0.25),
        (2, 2.5, 0.25),
    ]
    assert metrics[0].grad_norm == pytest.approx(math.hypot(*slow_norms(model).values()), rel=1e-6)
    ranks = [event for event in events_of(tmp_path / "rank-0.spool") if isinstance(event, RankGradientsRecorded)]
    assert [(event.rank, event.loss, event.num_samples, event.norms) for event in ranks] == [
        (0, 3.0, 7, ()),
        (0, 2.5, 1, ()),
    ]


def test_the_update_of_a_step_is_measured_against_the_weights(tmp_path: Path) -> None:
    model = model_with_gradients()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}
    with SpoolWriter(tmp_path / "rank-0.spool") as spool:
        monitor = GradientMonitor(model, spool=spool)
        monitor.step(1)
        optimizer.step()
        monitor.step(2)
    (measured,) = (event for event in events_of(tmp_path / "rank-0.spool") if isinstance(event, UpdatesMeasured))
    assert measured.step == 1
    for index, (name, parameter) in enumerate(model.named_parameters()):
        after = parameter.detach().double()
        assert measured.weight_norms[index] == pytest.approx(after.norm().item(), rel=1e-6)
        expected = (after - before[name]).norm().item() / after.norm().item()
        assert measured.update_ratios[index] == pytest.approx(expected, rel=1e-5)


def test_a_layer_that_is_unfrozen_later_is_watched_from_then_on(tmp_path: Path) -> None:
    model = model_with_gradients()
    model.get_parameter("0.bias").requires_grad_(False)
    with SpoolWriter(tmp_path / "rank-0.spool") as spool:
        monitor = GradientMonitor(model, spool=spool)
        monitor.step(9)
        model.get_parameter("0.bias").requires_grad_(True)
        monitor.step(10)
    named = [event.names for event in events_of(tmp_path / "rank-0.spool") if isinstance(event, LayersNamed)]
    assert named == [("0.weight", "2.weight", "2.bias"), ("0.weight", "2.weight", "2.bias", "0.bias")]
    statistics = monitor.export_for_webui()["layer_statistics"]
    assert [statistics[name]["total_steps"] for name in named[1]] == [2, 2, 2, 1]


def test_only_every_so_many_steps_are_recorded() -> None:
    monitor = GradientMonitor(model_with_gradients(), every_steps=3)
    totals = [monitor.step(step).item() for step in range(1, 10)]
    assert len(set(totals)) == 1
    assert [record["step"] for record in monitor.export_for_webui()["gradient_timeline"]] == [3, 6, 9]


def test_sparse_empty_and_shared_layers_are_measured_like_any_other() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    linear = nn.Linear(4, 4, bias=False)
    model = nn.Module()
    model.embedding, model.linear, model.again = embedding, linear, linear
    model.empty = nn.Parameter(torch.empty(0, 3))
    loss = linear(linear(embedding(torch.tensor([1, 2, 1, 1])))).square().sum() + model.empty.sum()
    loss.backward()
    monitor = GradientMonitor(model)
    monitor.step()
    assert embedding.weight.grad is not None
    assert linear.weight.grad is not None
    assert monitor.sync_gradients_distributed() == pytest.approx(
        {
            "empty": 0.0,
            "embedding.weight": embedding.weight.grad.to_dense().double().norm().item(),
            "linear.weight": linear.weight.grad.double().norm().item(),
        },
        rel=1e-6,
    )
    assert monitor.export_for_webui()["anomaly_summary"] == {}


def test_outside_of_a_job_a_folder_of_its_own_is_written(tmp_path: Path) -> None:
    for _ in range(2):
        GradientMonitor(model_with_gradients(), runs_dir=tmp_path / "runs").step()
    GradientMonitor(model_with_gradients(), runs_dir=None).step()
    spools = sorted(path.relative_to(tmp_path).parts for path in tmp_path.rglob("*.spool"))
    assert [(parts[0], parts[2]) for parts in spools] == [("runs", "rank-0.spool")] * 2
    assert spools[0][1] != spools[1][1]


def test_a_run_that_cannot_be_written_trains_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(RuntimeWarning, match="this run is not recorded in .*file"):
        monitor = GradientMonitor(model_with_gradients(), runs_dir=tmp_path / "file")
    assert monitor.step().item() > 0.0
    assert monitor.export_for_webui()["total_steps"] == 1


def test_ten_thousand_broken_layers_with_long_names_fit_into_their_events(tmp_path: Path) -> None:
    model = nn.Module()
    for number in range(10_000):
        parameter = nn.Parameter(torch.ones(1))
        parameter.grad = torch.full((1,), math.nan)
        model.register_parameter(f"transformer_blocks_{number}_feed_forward_expert_down_projection_weight", parameter)
    with SpoolWriter(tmp_path / "rank-0.spool") as spool:
        monitor = GradientMonitor(model, spool=spool)
        monitor.step()
    assert monitor.export_for_webui()["anomaly_summary"] == {"nan": 10_000}
    reader, found = SpoolReader(tmp_path / "rank-0.spool"), []
    while events := [event for _, event in reader.read()]:
        found += events
    assert [event.kind for event in found] == ["layers", "gradient", "anomaly", "rank_gradient"]
    (gradients,) = (event for event in found if isinstance(event, GradientsRecorded))
    assert len(gradients.anomalous) == 10_000


def test_ten_thousand_layers_are_watched(tmp_path: Path) -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(10_000)])
    sum(parameter.sum() for parameter in model).backward()
    with SpoolWriter(tmp_path / "rank-0.spool") as spool:
        monitor = GradientMonitor(model, spool=spool)
        assert monitor.step().item() == pytest.approx(math.sqrt(20_000), rel=1e-5)
    recorded = [event for event in events_of(tmp_path / "rank-0.spool") if isinstance(event, GradientsRecorded)]
    assert recorded[0].norms == pytest.approx([math.sqrt(2)] * 10_000)
