"""Policies: which incidents they answer, how often, and what the ranks are told."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apt_jobs.diagnosis.policies import Policies
from apt_jobs.events.kinds import IncidentChanged
from apt_jobs.jobs.spec import AnomalyPolicy

SPIKE = IncidentChanged(
    incident=1,
    phase="updated",
    anomaly="spike",
    group="model.layers.2",
    began_step=40,
    step=42,
    num_steps=3,
    layers=("model.layers.2.mlp.weight",),
    num_layers=1,
    ranks=(1,),
    origin=None,
    value=9.0,
    expected_low=0.1,
    expected_high=1.0,
    message="too much",
)


def policies(path: Path, **fields: Any) -> Policies:
    return Policies([AnomalyPolicy(**{"kinds": ["spike"], "action": "cut_lr", **fields})], path)


def test_an_incident_is_answered_once_and_the_ranks_are_told(tmp_path: Path) -> None:
    path = tmp_path / "orders.json"
    answering = policies(path, max_times=2, factor=0.25)
    (ordered,) = answering.respond(42, [SPIKE])
    assert (ordered.phase, ordered.action, ordered.incident, ordered.step) == ("ordered", "cut_lr", 1, 42)
    assert ordered.reason == "spike since step 40 in model.layers.2 on rank 1: too much"
    assert list(answering.respond(43, [SPIKE])) == []
    assert len(list(answering.respond(44, [replace(SPIKE, incident=number) for number in (2, 3)]))) == 1
    orders = json.loads(path.read_text())
    assert [(order["incident"], order["factor"]) for order in orders] == [(1, 0.25), (2, 0.25)]
    assert orders[0]["began_step"] == 40


@pytest.mark.parametrize(
    ("fields", "answers"),
    [
        ({"kinds": ["nan", "inf"]}, 0),
        ({"layers": "model.layers.*"}, 1),
        ({"layers": "lm_head.*"}, 0),
        ({"patience_steps": 3}, 1),
        ({"patience_steps": 4}, 0),
    ],
)
def test_a_policy_answers_what_it_names(tmp_path: Path, fields: dict[str, Any], answers: int) -> None:
    assert len(list(policies(tmp_path / "orders.json", **fields).respond(42, [SPIKE]))) == answers


@pytest.mark.parametrize("action", ["warn", "pause", "cancel"])
def test_what_concerns_the_job_is_no_order_for_the_ranks(tmp_path: Path, action: str) -> None:
    path = tmp_path / "orders.json"
    assert len(list(policies(path, action=action).respond(42, [SPIKE]))) == 1
    assert not path.exists()
