"""The one codec between events and JSON: for the spool, the database, the wire and the browser.

JSON has no NaN and no Infinity, and a monitor must not hide them: such floats travel as the strings "NaN", "Infinity"
and "-Infinity" and come back as floats.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError

from apt_jobs.errors import InvalidInput
from apt_jobs.events.kinds import EVENT_TYPES, Event, StoredEvent

FRAME_BYTES = 64 << 10  # larger writes to sockets measured slower
MAX_EVENT_BYTES = 1 << 20  # 10,000 layers fit; a longer line is refused, not stored

Item = TypeVar("Item")
NonFinite = Literal["NaN", "Infinity", "-Infinity"]  # floats that JSON does not have, by name
Number = float | NonFinite


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """An event of the log with its payload as JSON, however the database keeps it."""

    seq: int
    kind: str
    attempt: int
    step: int | None
    at: datetime
    payload: bytes


_ADAPTERS: dict[str, TypeAdapter[Event]] = {cls.kind: TypeAdapter(cls) for cls in EVENT_TYPES}


def finite_or_name(value: float) -> Number:
    """Return `value`, or the string that stands for it in JSON when it is not finite."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def payload_of(event: Event) -> dict[str, Any]:
    """Return the event's fields as JSON-serialisable values, without `kind`."""
    return {field.name: _plain(getattr(event, field.name)) for field in fields(event)}


def encode_payload(event: Event) -> bytes:
    """Encode the event's fields as JSON: what the database stores."""
    return orjson.dumps(payload_of(event))


def decode_payload(kind: str, payload: bytes) -> Event:
    """Decode what `encode_payload` returned.

    Raises:
        InvalidInput: the kind is unknown or the payload does not have its form.
    """
    adapter = _ADAPTERS.get(kind)
    if adapter is None:
        raise InvalidInput(f"unknown event kind {kind!r}; known: {', '.join(sorted(_ADAPTERS))}")
    try:
        return adapter.validate_json(payload)
    except ValidationError as exc:
        raise InvalidInput(f"a {kind!r} event does not have the form of its type: {exc}") from exc


def encode_stored(event: StoredEvent) -> bytes:
    """Encode one event as browsers and REST clients see it: `seq`, `kind`, `attempt`, `at`, then its fields."""
    return splice_stored(event.seq, event.event.kind, event.attempt, event.at, encode_payload(event.event))


def splice_stored(seq: int, kind: str, attempt: int, at: datetime, payload: bytes) -> bytes:
    """Do as `encode_stored` with a payload that is JSON already: nothing is parsed between database and browser."""
    head = orjson.dumps({"seq": seq, "kind": kind, "attempt": attempt, "at": timestamp(at)})
    return head if payload == b"{}" else head[:-1] + b"," + payload[1:]


def encode_frame(first_seq: int, encoded: Iterable[bytes]) -> bytes:
    """Encode a run of contiguous events as one wire frame: `{"first_seq", "count", "events": [...]}`."""
    events = list(encoded)
    return b'{"first_seq":%d,"count":%d,"events":[%b]}' % (first_seq, len(events), b",".join(events))


def frames_of(first_seq: int, encoded: Iterable[bytes]) -> Iterator[bytes]:
    """Encode contiguous events as frames of at most `FRAME_BYTES` (or one event): nobody has to cut them later."""
    for run in runs(encoded, len, FRAME_BYTES):
        yield encode_frame(first_seq, run)
        first_seq += len(run)


def runs(items: Iterable[Item], size_of: Callable[[Item], int], max_size: int) -> Iterator[list[Item]]:
    """Group neighbours while their sizes sum up to at most `max_size`; a larger item stays alone."""
    run: list[Item] = []
    total = 0
    for item in items:
        size = size_of(item)
        if run and total + size > max_size:
            yield run
            run, total = [], 0
        run.append(item)
        total += size
    if run:
        yield run


def encode_spooled(at: datetime, event: Event) -> bytes:
    """Encode one spool line, newline included."""
    record = {"at": timestamp(at), "kind": event.kind, "payload": payload_of(event)}
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def decode_spooled(line: bytes) -> tuple[datetime, Event]:
    """Decode what `encode_spooled` returned.

    Raises:
        InvalidInput: the line is not a spool record.
    """
    if len(line) > MAX_EVENT_BYTES:
        raise InvalidInput(f"a spool line has {len(line):,} bytes; at most {MAX_EVENT_BYTES:,}")
    try:
        record = orjson.loads(line)
        at = datetime.fromisoformat(record["at"])
        return at, decode_payload(record["kind"], orjson.dumps(record["payload"]))
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as exc:
        raise InvalidInput(f"not a spool line: {line[:200]!r}") from exc


def timestamp(at: datetime) -> str:
    """Format an instant by RFC 3339, in UTC with milliseconds."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return finite_or_name(value)
    if isinstance(value, tuple | list):
        if set(map(type, value)) == {float} and all(map(math.isfinite, value)):
            return list(value)  # the norms of a step: ten times faster than one by one
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value
