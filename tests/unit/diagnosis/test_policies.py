"""Policies: which incidents they answer, how often, and what the ranks are told."""

from dataclasses import replace
from typing import Any

import pytest

from apt_jobs.diagnosis.policies import Policies
from apt_jobs.events.kinds import IncidentChanged
from apt_jobs.jobs.monitor_options import AnomalyPolicy

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


def policies(**fields: Any) -> Policies:
    return Policies([AnomalyPolicy(**{"kinds": ["spike"], "action": "cut_lr", **fields})])


def test_an_incident_is_answered_once_with_commands_to_the_ranks() -> None:
    answering = policies(max_times=2, factor=0.25)
    (ordered,) = answering.respond(42, [SPIKE])
    assert (ordered.phase, ordered.action, ordered.incident, ordered.step) == ("ordered", "cut_lr", 1, 42)
    assert ordered.reason == "spike since step 40 in model.layers.2 on rank 1: too much"
    assert list(answering.respond(43, [SPIKE])) == []
    assert len(list(answering.respond(44, [replace(SPIKE, incident=number) for number in (2, 3)]))) == 1
    commands = answering.commands
    assert [(command.incident, command.factor) for command in commands] == [(1, 0.25), (2, 0.25)]
    assert commands[0].began_step == 40


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
def test_a_policy_answers_what_it_names(fields: dict[str, Any], answers: int) -> None:
    assert len(list(policies(**fields).respond(42, [SPIKE]))) == answers


@pytest.mark.parametrize("action", ["warn", "pause", "cancel"])
def test_what_concerns_the_job_is_no_command_to_the_ranks(action: str) -> None:
    answering = policies(action=action)
    assert len(list(answering.respond(42, [SPIKE]))) == 1
    assert answering.commands == []
