"""The grid of a comparison against the plainest way to fill it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_jobs.db.series.align import grid_over, means_on
from apt_jobs.web.comparison_answers import short_numbers

VALUES = st.lists(
    st.tuples(
        st.integers(0, 2),  # job
        st.one_of(st.integers(1, 60).map(float), st.just(math.nan)),  # place
        st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)),
        st.integers(0, 20),  # steps that it stands for
    ),
    min_size=1,
    max_size=40,
)


@given(VALUES, st.integers(1, 30), st.booleans())
def test_each_point_has_the_mean_of_what_lies_in_it(
    rows: list[tuple[int, float, float, int]], max_points: int, is_whole: bool
) -> None:
    known = [place for _, place, _, _ in rows if place == place] or [1.0]
    grid = grid_over(min(known), max(known), max_points, is_whole=is_whole)
    jobs, places, values, weights = (np.array(column) for column in zip(*rows, strict=True))
    means, counts = means_on(grid, 3, jobs, places, values, weights)
    ends = grid.places()
    assert len(ends) <= max_points
    assert ends[-1] == max(known)
    begins = [-math.inf, *ends[:-1].tolist()]
    for job in range(3):
        for point, (begin, end) in enumerate(zip(begins, ends.tolist(), strict=True)):
            inside = [
                (value, weight) for own, place, value, weight in rows if own == job and begin < place <= end and weight
            ]
            if not is_whole and any(math.isclose(place, edge) for _, place, _, _ in rows for edge in ends[:-1]):
                continue  # on the edge of two points that rounding moved
            assert counts[job, point] == sum(weight for _, weight in inside)
            if inside:
                expected = sum(value * weight for value, weight in inside) / sum(weight for _, weight in inside)
                assert means[job, point] == pytest.approx(expected, rel=1e-9, abs=1e-6, nan_ok=True)


def test_numbers_are_cut_to_the_digits_that_somebody_sees() -> None:
    values = np.array([0.0, 123_456.789, -0.000123456789, 1e300, 5e-324, math.nan, math.inf, 1e-310])
    assert short_numbers(values).tolist()[:4] == [0.0, 123_460.0, -0.00012346, 1e300]
    assert np.isfinite(short_numbers(values)).tolist() == np.isfinite(values).tolist()
