"""In which settings specs of jobs differ."""

from typing import Any

import pytest

from apt_jobs.jobs.setting_paths import MAX_CHARS, MAX_SETTINGS, differing_settings


@pytest.mark.parametrize(
    ("specs", "differing"),
    [
        ([], {}),
        ([{"a": 1}], {}),
        ([{"a": 1, "name": "x"}, {"a": 1.0, "name": "y"}], {}),
        ([{"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}}], {"a.b": [1, 3]}),
        ([{"a": {"b": {"c": 1}}}, {"a": {}}, {}], {"a.b.c": [1, None, None]}),
        ([{"a": None}, {"a": {"b": 1}}], {"a.b": [None, 1]}),
        ([{"a": "x"}, {"a": {"b": 1}}], {"a.b": [None, 1], "a": ["x", None]}),
        ([{"a": [1, 2]}, {"a": [1, {"b": 2}]}], {"a": ["[1,2]", '[1,{"b":2}]']}),
        ([{"a": None}, {"a": False}], {"a": [None, False]}),
    ],
)
def test_only_what_differs_is_shown_by_path(specs: list[dict[str, Any]], differing: dict[str, list[Any]]) -> None:
    assert differing_settings(specs) == (differing, 0)


def test_long_values_are_cut_and_many_settings_counted() -> None:
    shown, num_left_out = differing_settings([{str(number): "x" * 1_000 for number in range(300)}, {}])
    assert (len(shown), num_left_out) == (MAX_SETTINGS, 300 - MAX_SETTINGS)
    assert len(shown["0"][0]) == MAX_CHARS
