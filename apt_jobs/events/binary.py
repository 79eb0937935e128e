"""Encode frames in binary: gradient norms as float32 arrays that a browser draws without parsing.

docs/explanation/streams.md has the layout.

Little-endian; everything begins at a multiple of four bytes. A gradient event of 150 layers is 668 bytes instead of
3,200. Norms are float32 where they are measured, so nothing is lost; NaN and the infinities are themselves.
"""

import struct
from array import array
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import orjson

from apt_jobs.errors import InvalidInput
from apt_jobs.events.codec import finite_or_name, timestamp

SUBPROTOCOL = "apt-jobs.binary.v1"
VERSION = 1
_HEADER = struct.Struct("<BxxxIQQ")  # version, number of records, first_seq, last_seq
_RECORD = struct.Struct("<BxxxI")  # type, bytes of the body without padding
_GRADIENT = struct.Struct("<QQdIIHH")  # seq, step, at (Unix ms), attempt, num_rollbacks, norms, anomalous layers
_JSON, _GRADIENTS, _JOB = 1, 2, 3  # types of records
_MOST = 1 << 16  # norms of one event
_GRADIENT_FIELDS = frozenset({"seq", "kind", "attempt", "at", "step", "num_rollbacks", "norms", "anomalous"})


def encode_binary(first_seq: int, last_seq: int, events: Iterable[dict[str, Any]], job_id: str | None) -> bytes:
    """Encode events in their JSON form as one binary message, with their job if `job_id` is given."""
    records = [] if job_id is None else [_record(_JOB, job_id.encode())]
    records += map(_encoded, events)
    return _HEADER.pack(VERSION, len(records), first_seq, last_seq) + b"".join(records)


def decode_binary(message: bytes) -> dict[str, Any]:
    """Decode what `encode_binary` returned, to the frame as JSON would have given it.

    Raises:
        InvalidInput: the message does not have this form.
    """
    try:
        version, num_records, first_seq, last_seq = _HEADER.unpack_from(message)
        if version != VERSION:
            raise InvalidInput(f"a binary frame of version {version}; this program reads version {VERSION}")
        frame: dict[str, Any] = {"first_seq": first_seq, "count": last_seq - first_seq + 1, "events": []}
        for kind, body in _records(message, num_records):
            if kind == _JOB:
                frame["job_id"] = body.decode()
            else:
                frame["events"].append(orjson.loads(body) if kind == _JSON else _gradient(body))
    except (struct.error, ValueError) as exc:
        raise InvalidInput(f"not a binary frame: {message[:40]!r}") from exc
    return frame


def _record(kind: int, body: bytes) -> bytes:
    return _RECORD.pack(kind, len(body)) + body + bytes(-len(body) % 4)


def _encoded(event: dict[str, Any]) -> bytes:
    if event["kind"] != "gradient" or event.keys() != _GRADIENT_FIELDS or len(event["norms"]) >= _MOST:
        return _record(_JSON, orjson.dumps(event))
    norms, anomalous = event["norms"], event["anomalous"]
    at_ms = datetime.fromisoformat(event["at"]).timestamp() * 1000.0
    place = event["seq"], event["step"], at_ms, event["attempt"], event["num_rollbacks"]
    fixed = _GRADIENT.pack(*place, len(norms), len(anomalous))
    return _record(_GRADIENTS, fixed + _floats(norms) + struct.pack(f"<{len(anomalous)}H", *anomalous))


def _floats(values: list[Any]) -> bytes:
    try:
        return struct.pack(f"<{len(values)}f", *values)
    except (struct.error, OverflowError):  # names of what is not finite, or larger than any float32
        return array("f", [_as_float32(float(value)) for value in values]).tobytes()


def _as_float32(value: float) -> float:
    return value if abs(value) <= 3.4028234e38 or value != value else float("inf") * (1 if value > 0 else -1)


def _records(message: bytes, num_records: int) -> Iterator[tuple[int, bytes]]:
    at = _HEADER.size
    for _ in range(num_records):
        kind, length = _RECORD.unpack_from(message, at)
        at += _RECORD.size
        if at + length > len(message):
            raise ValueError("a record ends after its frame")
        yield kind, message[at : at + length]
        at += length + -length % 4


def _gradient(body: bytes) -> dict[str, Any]:
    seq, step, at_ms, attempt, num_rollbacks, num_norms, num_anomalous = _GRADIENT.unpack_from(body)
    return {
        "seq": seq,
        "kind": "gradient",
        "attempt": attempt,
        "at": timestamp(datetime.fromtimestamp(at_ms / 1000.0, UTC)),
        "step": step,
        "norms": [finite_or_name(norm) for norm in struct.unpack_from(f"<{num_norms}f", body, _GRADIENT.size)],
        "num_rollbacks": num_rollbacks,
        "anomalous": list(struct.unpack_from(f"<{num_anomalous}H", body, _GRADIENT.size + 4 * num_norms)),
    }
