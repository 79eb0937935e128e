"""The one doubling wait."""

import pytest

from apt_jobs.backoff import Backoff


def test_waits_double_from_the_first_to_the_maximum() -> None:
    backoff = Backoff(5.0, 300.0)
    assert [backoff.wait_s(number) for number in range(1, 9)] == [5, 10, 20, 40, 80, 160, 300, 300]


@pytest.mark.parametrize(("number", "wait_s"), [(-1, 5.0), (0, 5.0), (1_000, 300.0), (10**12, 300.0)])
def test_any_number_of_failures_has_a_bounded_wait(number: int, wait_s: float) -> None:
    assert Backoff(5.0, 300.0).wait_s(number) == wait_s
