"""Bodies decoded together say what they say one by one."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_jobs.db.series.summaries import Summary
from apt_jobs.errors import InvalidInput
from apt_jobs.events.many_columns import unpack_many

NAMES = list(Summary.__slots__)
FLOATS = st.one_of(st.floats(width=32), st.floats(), st.sampled_from([0.0, math.nan, math.inf, 1.5]))


@st.composite
def summaries(draw: st.DrawFn) -> Summary:
    number = draw(st.integers(1, 6))
    steps = np.cumsum(np.array(draw(st.lists(st.integers(1, 3), min_size=number, max_size=number))))
    values = np.array(draw(st.lists(FLOATS, min_size=2 * number, max_size=2 * number)), np.float64).reshape(-1, 2)
    return Summary.of_steps(steps, steps * 1000, values, np.zeros(values.shape, bool))


@given(st.lists(summaries(), max_size=12))
def test_many_at_once_equal_one_by_one(parts: list[Summary]) -> None:
    bodies = [part.encode(precise=True) for part in parts]
    arrays, counts = unpack_many(bodies, len(NAMES), range(len(NAMES)))
    decoded = [Summary.decode(body) for body in bodies]
    assert counts.tolist() == [part.num_buckets for part in decoded]
    for name, joined in zip(NAMES, arrays, strict=True):
        expected = np.concatenate([np.zeros(0), *(getattr(part, name).ravel() for part in decoded)])
        np.testing.assert_array_equal(joined, expected)


@pytest.mark.parametrize("body", [b"", b"\x02", b"\x01\x00", b"\x01\x00\x00\xff\xff\xff\x7f", b"\x01\x99" * 30])
def test_a_body_that_is_none_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidInput):
        unpack_many([body], 2, [0])
