"""Merge patches as RFC 7396 has them, and the assignments that make one."""

from typing import Any

import pytest

from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.merge_patch import merge_patch, patch_of


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [  # RFC 7396, appendix A
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_a_patch_is_merged(target: Any, patch: Any, result: Any) -> None:
    before = repr(target)
    assert merge_patch(target, patch) == result
    assert repr(target) == before


def test_assignments_are_a_patch_of_json_or_text() -> None:
    words = ["training.max_steps=10", "training.lora.r=4", "name=a b", 'argv=["x"]', "base_model=null", "env.A=x=y"]
    assert patch_of(words) == {
        "training": {"max_steps": 10, "lora": {"r": 4}},
        "name": "a b",
        "argv": ["x"],
        "base_model": None,
        "env": {"A": "x=y"},
    }


@pytest.mark.parametrize("words", [["a"], ["=1"], ["a..b=1"], [".a=1"], ["a=1", "a.b=2"], ["a=null", "a.b=2"]])
def test_what_is_no_assignment_is_refused(words: list[str]) -> None:
    with pytest.raises(InvalidInput, match="--set"):
        patch_of(words)
