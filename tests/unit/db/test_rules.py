"""Small rules of the database layer that need no database."""

import itertools
import math
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_jobs.db.access import Role
from apt_jobs.db.histories import LayerStatistics, thinned
from apt_jobs.db.transitions import RETRY_PAUSE_MAX_S, retry_pause_s


@given(st.lists(st.integers(), max_size=300), st.integers(1, 50))
def test_thinning_keeps_order_ends_and_bound(items: list[int], most: int) -> None:
    numbered = list(enumerate(items))
    kept = thinned(numbered, most)
    assert len(kept) == min(len(items), most)
    assert kept == sorted(set(kept))
    if kept:
        assert kept[-1] == numbered[-1]
        assert most == 1 or kept[0] == numbered[0]


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.lists(st.sampled_from([math.nan, math.inf, -math.inf]))
)
def test_running_statistics_are_those_of_the_finite_values(finite: list[float], broken: list[float]) -> None:
    statistics = LayerStatistics()
    for good, bad in itertools.zip_longest(finite, broken):
        if good is not None:
            statistics.add(good, is_anomaly=False)
        if bad is not None:
            statistics.add(bad, is_anomaly=True)
    assert statistics.export() == {
        "mean": pytest.approx(fmean(finite), rel=1e-9, abs=1e-9),
        "std": pytest.approx(pstdev(finite), rel=1e-6, abs=1e-6),
        "min": min(finite),
        "max": max(finite),
        "total_steps": len(finite) + len(broken),
        "anomaly_count": len(broken),
    }


def test_the_pause_between_attempts_doubles_up_to_a_bound() -> None:
    assert [retry_pause_s(number) for number in (0, 1, 2, 3)] == [5.0, 5.0, 10.0, 20.0]
    assert retry_pause_s(10_000) == RETRY_PAUSE_MAX_S


def test_a_role_includes_those_before_it() -> None:
    included = [(role, other) for role in Role for other in Role if role.includes(other)]
    assert included == [
        (Role.VIEWER, Role.VIEWER),
        (Role.SUBMITTER, Role.VIEWER),
        (Role.SUBMITTER, Role.SUBMITTER),
        (Role.ADMIN, Role.VIEWER),
        (Role.ADMIN, Role.SUBMITTER),
        (Role.ADMIN, Role.ADMIN),
    ]
