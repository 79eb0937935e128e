"""Columns of events: what comes back is, to the byte, the JSON that went in."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_jobs.errors import InvalidInput
from apt_jobs.events.codec import encode_payload, timestamp
from apt_jobs.events.columns import COLUMN_TYPES, decode_columns, encode_columns
from apt_jobs.events.kinds import GradientsRecorded, StoredEvent

AT = datetime(2026, 5, 6, 7, 8, 9, 10_999, UTC)


def stored(events: list[Any], first_seq: int = 1) -> list[StoredEvent]:
    return [
        StoredEvent("job_a", first_seq + 3 * number, 2, AT + timedelta(seconds=number), event)
        for number, event in enumerate(events)
    ]


@given(st.sampled_from(sorted(COLUMN_TYPES)), st.data())
def test_events_come_back_as_they_were(kind: str, data: st.DataObject) -> None:
    numbers = st.integers(-(2**40), 2**40)
    st.register_type_strategy(int, numbers)
    try:
        events = data.draw(st.lists(st.from_type(COLUMN_TYPES[kind]), min_size=1, max_size=8))
    finally:
        st.register_type_strategy(int, st.integers())
    given_events = stored(events)
    logged = decode_columns(kind, encode_columns(given_events)).logged(2)
    assert [event.payload for event in logged] == [encode_payload(event) for event in events]
    assert [(event.seq, event.attempt, event.kind) for event in logged] == [
        (event.seq, 2, kind) for event in given_events
    ]
    assert [timestamp(event.at) for event in logged] == [timestamp(event.at) for event in given_events]
    part = slice(1, 3)
    assert [event.payload for event in decode_columns(kind, encode_columns(given_events)).logged(2, part)] == [
        encode_payload(event) for event in events[part]
    ]


def test_norms_cost_four_bytes_each() -> None:
    norms = tuple(float(number) / 8 for number in range(150))
    events = [GradientsRecorded(step, norms, ()) for step in range(1, 257)]
    assert len(encode_columns(stored(events))) < 4.02 * 150 * 256


@pytest.mark.parametrize("body", [b"", b"\2", b"\1", b"\1\0\0\xff\xff\xff\xff", b"\1\x63\0\1\0\0\0"])
def test_other_bytes_are_refused(body: bytes) -> None:
    with pytest.raises(InvalidInput):
        decode_columns("gradient", body)
