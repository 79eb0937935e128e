"""The binary form says exactly what the JSON form says."""

from datetime import UTC, datetime
from typing import Any

import orjson
import pytest

from apt_jobs.errors import InvalidInput
from apt_jobs.events.binary import decode_binary, encode_binary
from apt_jobs.events.codec import encode_stored
from apt_jobs.events.kinds import Event, GradientsRecorded, LineLogged, StoredEvent

FRAME = bytes.fromhex(  # the same bytes are read in apt_jobs/web/ui/src/api/frames.test.ts
    "01000000030000000500000000000000070000000000000003000000050000006a6f625f6100000002000000340000000500"
    "000000000000000000000001000000e0f298cab779420300000002000000030002000000003f0000c07f0000807f01000200"
    "010000001b0000007b22736571223a362c226b696e64223a2266696e6973686564227d00"
)


def as_json(seq: int, event: Event) -> dict[str, Any]:
    at = datetime(2026, 1, 2, 3, 4, 5, 678_000, UTC)
    decoded: dict[str, Any] = orjson.loads(encode_stored(StoredEvent("job_a", seq, 3, at, event)))
    return decoded


@pytest.mark.parametrize("job_id", [None, "job_a"])
def test_events_come_back_as_they_were(job_id: str | None) -> None:
    events = [
        as_json(5, GradientsRecorded(1 << 40, (0.5, float("nan"), float("inf"), float("-inf")), (1, 2, 3))),
        as_json(6, LineLogged("info", "rank 0", "hello")),
        as_json(7, GradientsRecorded(2, (), ())),
        as_json(8, GradientsRecorded(3, (0.25, 1.0, 2.0), (2,), 7)),
    ]
    frame = decode_binary(encode_binary(5, 9, events, job_id))
    assert frame.pop("job_id", None) == job_id
    assert frame == {"first_seq": 5, "count": 5, "events": events}


def test_a_gradient_event_costs_four_bytes_a_layer_and_little_more() -> None:
    event = as_json(5, GradientsRecorded(1, tuple(0.1 * number for number in range(150)), ()))
    assert len(encode_binary(5, 5, [event], None)) == 24 + 8 + 36 + 150 * 4


def test_what_no_float32_holds_is_infinite() -> None:
    event = as_json(5, GradientsRecorded(1, (1e300, -1e300), ()))
    assert decode_binary(encode_binary(5, 5, [event], None))["events"][0]["norms"] == ["Infinity", "-Infinity"]


@pytest.mark.parametrize("length", [0, 10, 23, 30, 60])
def test_a_broken_message_is_refused(length: int) -> None:
    event = as_json(5, GradientsRecorded(1, (0.5, 1.0), ()))
    with pytest.raises(InvalidInput):
        decode_binary(encode_binary(5, 5, [event], "job_a")[:length])


def test_another_version_is_refused() -> None:
    with pytest.raises(InvalidInput, match="version 9"):
        decode_binary(b"\x09" + bytes(23))


def test_the_layout_is_the_one_that_browsers_read() -> None:
    gradient = {"seq": 5, "kind": "gradient", "attempt": 3, "at": "2026-01-02T03:04:05.678Z", "step": 1 << 40}
    events = [
        {**gradient, "num_rollbacks": 2, "norms": [0.5, "NaN", "Infinity"], "anomalous": [1, 2]},
        {"seq": 6, "kind": "finished"},
    ]
    assert encode_binary(5, 7, events, "job_a") == FRAME
