"""What `apt-jobs sweep` asks for."""

from typing import Any

import pytest

from apt_jobs.commands.sweeps import _parameter, _request
from apt_jobs.errors import InvalidInput


@pytest.mark.parametrize(
    ("text", "parameter"),
    [
        ("training.learning_rate=1e-3,3e-3", {"values": [1e-3, 3e-3]}),
        ("training.batch_size=2", {"values": [2]}),
        ("training.optimizer=adamw,lion", {"values": ["adamw", "lion"]}),
        ("training.grad_clip_norm=null,1.0", {"values": [None, 1.0]}),
        ('argv=["a","b"],["c"]', {"values": [["a", "b"], ["c"]]}),
        ("arguments.x=a=b,1", {"values": ["a=b", 1]}),
        ("training.learning_rate=1e-4..0.1:log", {"min": 1e-4, "max": 0.1, "scale": "log"}),
        ("training.batch_size=1..8", {"min": 1, "max": 8}),
    ],
)
def test_set_names_values_or_a_range(text: str, parameter: dict[str, Any]) -> None:
    assert _parameter(text) == (text.partition("=")[0], parameter)


@pytest.mark.parametrize("text", ["", "training.learning_rate", "=1,2", "training.learning_rate="])
def test_set_without_a_field_or_a_value_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="FIELD=VALUE"):
        _parameter(text)


def test_a_file_is_a_sweep_or_a_job_of_one() -> None:
    varied = {"a": {"values": [1]}}
    assert _request(None, ["a=1"]) == {"spec": {"kind": "train"}, "parameters": varied}
    assert _request({"kind": "train", "name": "x"}, ["a=1"])["spec"] == {"kind": "train", "name": "x"}
    both = _request({"spec": {"kind": "train"}, "parameters": {"b": {"values": [2]}}, "seed": 3}, ["a=1"])
    assert both == {"spec": {"kind": "train"}, "parameters": {"b": {"values": [2]}, **varied}, "seed": 3}
    with pytest.raises(InvalidInput, match="nothing to vary"):
        _request(None, [])
    with pytest.raises(InvalidInput, match="twice"):
        _request(None, ["a=1", "a=2"])
    with pytest.raises(InvalidInput, match="expected an object"):
        _request({"parameters": [1]}, ["a=1"])
