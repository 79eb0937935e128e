"""The codec: every event survives it, NaN included, and rubbish is refused by name."""

import math
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_jobs.errors import InvalidInput
from apt_jobs.events import codec
from apt_jobs.events.kinds import EVENT_TYPES, AnomaliesFound, Event, GradientsRecorded, LayerAnomaly, StoredEvent

st.register_type_strategy(int, st.integers(-(2**63), 2**63 - 1))  # counts and sizes are 64 bits wide
ANY_EVENT: st.SearchStrategy[Event] = st.one_of([st.from_type(event_type) for event_type in EVENT_TYPES])
MOMENT = datetime(2026, 3, 29, 1, 30, 0, 123_000, tzinfo=UTC)


def same(left: Any, right: Any) -> bool:
    """Equality in which NaN equals NaN and an int may come back as the float it was declared as."""
    if isinstance(left, float) and isinstance(right, int | float):
        return left == right or (math.isnan(left) and math.isnan(right))
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if is_dataclass(left):
        return type(left) is type(right) and all(
            same(getattr(left, field.name), getattr(right, field.name)) for field in fields(left)
        )
    return bool(left == right)


def has_free_form(event: Event) -> bool:
    """`model_config` values are untyped JSON: a NaN in them comes back as the word."""
    return event.kind == "started"


@given(ANY_EVENT.filter(lambda event: not has_free_form(event)))
def test_every_event_survives_the_database(event: Event) -> None:
    assert same(codec.decode_payload(event.kind, codec.encode_payload(event)), event)


@given(ANY_EVENT.filter(lambda event: not has_free_form(event)))
def test_every_event_survives_the_spool(event: Event) -> None:
    line = codec.encode_spooled(MOMENT, event)
    assert line.count(b"\n") == 1
    at, decoded = codec.decode_spooled(line)
    assert at == MOMENT
    assert same(decoded, event)


@given(ANY_EVENT)
def test_every_event_is_plain_json_for_browsers(event: Event) -> None:
    encoded = codec.encode_stored(StoredEvent("job_a", 7, 2, MOMENT, event))
    decoded = orjson.loads(encoded)
    assert decoded == {
        "seq": 7,
        "kind": event.kind,
        "attempt": 2,
        "at": "2026-03-29T01:30:00.123Z",
        **codec.payload_of(event),
    }


def test_names_of_kinds_are_unique() -> None:
    assert len({event_type.kind for event_type in EVENT_TYPES}) == len(EVENT_TYPES)


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")])
def test_a_broken_number_travels_as_a_word(value: float, word: str) -> None:
    event = AnomaliesFound(3, (LayerAnomaly("a", "nan", value),))
    payload = codec.encode_payload(event)
    assert f'"norm":"{word}"'.encode() in payload
    decoded = codec.decode_payload("anomaly", payload)
    assert isinstance(decoded, AnomaliesFound)
    assert same(decoded.layers[0].norm, value)


def test_times_are_utc_whatever_zone_they_came_in() -> None:
    assert codec.timestamp(MOMENT.astimezone(timezone(timedelta(hours=9)))) == "2026-03-29T01:30:00.123Z"


def test_an_event_without_fields_has_no_comma_too_many() -> None:
    assert orjson.loads(codec.splice_stored(1, "x", 1, MOMENT, b"{}"))["seq"] == 1


def test_a_frame_says_where_it_begins_and_how_long_it_is() -> None:
    event = GradientsRecorded(1, (0.5,), ())
    frame = codec.encode_frame(4, [codec.encode_stored(StoredEvent("j", seq, 1, MOMENT, event)) for seq in (4, 5)])
    decoded = orjson.loads(frame)
    assert (decoded["first_seq"], decoded["count"]) == (4, 2)
    assert [item["seq"] for item in decoded["events"]] == [4, 5]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"not json",
        b"[]",
        b"3",
        b"{}",
        b'{"at":"yesterday","kind":"log","payload":{}}',
        b'{"at":5,"kind":"log","payload":{}}',
        b'{"at":"2026-01-01T00:00:00Z","kind":"log","payload":{"level":"loud"}}',
        b'{"at":"2026-01-01T00:00:00Z","kind":"nonsense","payload":{}}',
        b'{"at":"2026-01-01T00:00:00Z","kind":["log"],"payload":{}}',
        b"x" * (codec.MAX_EVENT_BYTES + 1),
    ],
)
def test_a_line_that_is_no_event_is_refused(line: bytes) -> None:
    with pytest.raises(InvalidInput):
        codec.decode_spooled(line)
