"""Which days count for which job, and policies that are no policies."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from apt_jobs.retention_policy import RetentionPolicy
from apt_jobs.settings import Settings


def test_the_longest_days_of_its_labels_count_for_a_job() -> None:
    policy = RetentionPolicy(days=90, label_days={"run=smoke": 7, "team=a": 30, "keep=yes": 0})
    assert policy.days_of({}) == 90
    assert policy.days_of({"run": "other"}) == 90
    assert policy.days_of({"run": "smoke"}) == 7
    assert policy.days_of({"run": "smoke", "team": "a"}) == 30
    assert policy.days_of({"run": "smoke", "keep": "yes"}) == math.inf
    assert policy.least_days == 7


def test_only_rules_about_jobs_remove_jobs() -> None:
    assert not RetentionPolicy(checkpoint_days=1, run_days=1, log_days=1, label_days={"keep=yes": 0}).removes_jobs
    for rule in ({"days": 1}, {"max_jobs": 0}, {"max_bytes": 0}, {"label_days": {"a=b": 1}}):
        assert RetentionPolicy.model_validate(rule).removes_jobs
    assert RetentionPolicy().least_days == math.inf


@pytest.mark.parametrize(
    "given",
    [
        {"days": 0},
        {"days": -1},
        {"days": math.inf},
        {"days": math.nan},
        {"days": "90"},
        {"days": 1e9},
        {"day": 90},
        {"max_jobs": -1},
        {"max_jobs": 1.5},
        {"max_bytes": -1},
        {"label_days": {"smoke": 7}},
        {"label_days": {"=smoke": 7}},
        {"label_days": {"run=smoke": -7}},
        {"label_days": {"run=smoke": math.nan}},
    ],
)
def test_what_is_no_policy_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RetentionPolicy.model_validate(given)


def test_the_setting_is_a_json_object(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().retention is None
    monkeypatch.setenv("APT_JOBS_RETENTION", '{"days": 90, "label_days": {"run=smoke": 7}}')
    assert Settings().retention == RetentionPolicy(days=90, label_days={"run=smoke": 7})
    monkeypatch.setenv("APT_JOBS_RETENTION", '{"days": 0}')
    with pytest.raises(ValidationError):
        Settings()
