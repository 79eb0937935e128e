"""Incidents: many findings become few events, in order, each with its end."""

from datetime import UTC, datetime, timedelta

import pytest

from apt_jobs.diagnosis.incidents import Finding, IncidentLog, block_of
from apt_jobs.events.kinds import IncidentChanged

START = datetime(2026, 1, 1, tzinfo=UTC)
LAYER = "model.layers.2.mlp.weight"


def told(log: IncidentLog, step: int, *findings: Finding, num_layers: int = 40) -> list[IncidentChanged]:
    """Ten steps a second."""
    return list(log.step(step, START + timedelta(seconds=step / 10), findings, num_layers))


def test_an_incident_begins_is_updated_once_a_second_and_ends_when_it_was_quiet() -> None:
    log = IncidentLog(quiet_steps=20)
    events = [event for step in range(1, 26) for event in told(log, step, Finding("spike", (LAYER,), value=5.0))]
    assert [(event.phase, event.step) for event in events] == [("begun", 1), ("updated", 11), ("updated", 21)]
    events = [event for step in range(26, 60) for event in told(log, step)]
    assert [(event.phase, event.step, event.num_steps) for event in events] == [("ended", 25, 25)]
    assert (events[0].group, events[0].layers, events[0].began_step) == ("model.layers.2", (LAYER,), 1)


def test_layers_of_one_block_are_one_incident_and_blocks_are_apart() -> None:
    layers = (LAYER, "model.layers.2.attention.weight", "model.layers.3.mlp.weight")
    begun = told(IncidentLog(20), 1, Finding("spike", layers, value=9.0))
    assert [(event.group, event.num_layers, event.value) for event in begun] == [
        ("model.layers.2", 2, 9.0),
        ("model.layers.3", 1, None),
    ]
    assert [event.incident for event in begun] == [1, 2]


def test_a_quarter_of_all_layers_is_one_global_incident_which_takes_later_ones_in() -> None:
    log = IncidentLog(20)
    (begun,) = told(log, 1, Finding("spike", tuple(f"layers.{number}.weight" for number in range(11))))
    assert (begun.group, begun.num_layers) == ("all layers", 11)
    assert told(log, 2, Finding("spike", (LAYER,))) == []


def test_while_values_are_not_finite_nothing_else_begins() -> None:
    log = IncidentLog(quiet_steps=5)
    nan, spike = Finding("nan", (LAYER,), (1,), origin=LAYER), Finding("spike", (LAYER,))
    assert [event.anomaly for event in told(log, 1, spike, nan)] == ["nan"]
    assert told(log, 2, spike) == []
    assert [event.phase for event in told(log, 6)] == ["ended"]
    assert [event.anomaly for event in told(log, 7, spike)] == ["spike"]


def test_a_rank_is_an_incident_of_its_own() -> None:
    (begun,) = told(IncidentLog(20), 1, Finding("rank_outlier", (LAYER,), (3,)))
    assert (begun.group, begun.ranks) == ("rank 3", (3,))


def test_an_attempt_that_ends_ends_its_incidents() -> None:
    log = IncidentLog(20)
    told(log, 1, Finding("spike", (LAYER,)))
    assert [event.phase for event in log.end()] == ["ended"]
    assert list(log.end()) == []


def test_a_look_that_could_not_see_it_does_not_end_an_incident() -> None:
    log = IncidentLog(quiet_steps=1)
    told(log, 1, Finding("spike", (LAYER,)))
    assert list(log.step(10, START, [], 40, closes=False)) == []


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("model.layers.2.mlp.up_proj.weight", "model.layers.2"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("0.weight", "0.weight"),
        ("bias", "bias"),
    ],
)
def test_the_block_of_a_layer(layer: str, block: str) -> None:
    assert block_of(layer) in (block, block.partition(".")[0])
