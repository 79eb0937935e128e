"""Identifiers are unique, sort by time and match their pattern."""

import time

import pytest

from apt_jobs.jobs import ids
from apt_jobs.jobs.spec import CHECKPOINT_ID_PATTERN, JOB_ID_PATTERN


def test_ids_match_their_patterns() -> None:
    assert JOB_ID_PATTERN.match(ids.new_job_id())
    assert CHECKPOINT_ID_PATTERN.match(ids.new_checkpoint_id())


def test_ids_are_unique() -> None:
    assert len({ids.new_job_id() for _ in range(10_000)}) == 10_000


def test_a_later_id_sorts_later(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for second in (1, 2_000_000_000, 4_000_000_000):
        monkeypatch.setattr(time, "time_ns", lambda second=second: second * 1_000_000_000)
        made.append(ids.new_job_id())
    assert made == sorted(made)
