"""What goes over a wire, encoded once for all who watch a job the same way: blocks of contiguous events.

A block is a whole WebSocket frame (RFC 6455, section 5.2), header included, so that sending it is one write of bytes
that all sockets share. Between the live wire and a block nothing is parsed, unless the view asks for less than all.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from typing import Any

import orjson

from apt_jobs.events.binary import encode_binary
from apt_jobs.events.codec import FRAME_BYTES, frames_of, runs
from apt_jobs.events.conflation import Conflation

_TEXT, _BINARY = 0x81, 0x82  # final frame of a text or binary message
_AT, _EVENTS = b'"at":"', b'"events":['


class Form(StrEnum):
    """How events are written."""

    JSON = "json"  # WebSocket text frames
    BINARY = "binary"  # WebSocket binary frames, `events/binary.py`
    SSE = "sse"  # lines of `text/event-stream`


@dataclass(frozen=True, slots=True)
class View:
    """How watchers want to see a job. Those who want the same share every block."""

    form: Form = Form.JSON
    kinds: frozenset[str] = frozenset()  # of events; none: all
    max_rate: float | None = None  # most frames a second; what repeats meanwhile is folded
    names_job: bool = False  # the frames of a socket with several jobs say whose they are

    @property
    def is_whole(self) -> bool:
        """Whether frames of the live wire can go on as they came."""
        return self.form is Form.JSON and not self.kinds and self.max_rate is None


@dataclass(frozen=True, slots=True)
class Block:
    """Events `first_seq` to `last_seq` as one frame. Without a frame: none of them is in the view."""

    first_seq: int
    last_seq: int
    frame: bytes
    payload_at: int  # offset of the payload in `frame`
    is_text: bool = True

    @property
    def payload(self) -> bytes:
        """What another server puts into a frame of its own."""
        return self.frame[self.payload_at :]


@dataclass(frozen=True)
class Batch:
    """Contiguous events as they came: one frame of `codec.encode_frame`."""

    first_seq: int
    last_seq: int
    raw: bytes

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """Parsed once, and only for views that need it."""
        events: list[dict[str, Any]] = orjson.loads(self.raw)["events"]
        return events

    @property
    def first_at(self) -> datetime:
        """When its first event was made. Nothing but its head is parsed."""
        begin = self.raw.index(_AT) + len(_AT)
        return datetime.fromisoformat(self.raw[begin : self.raw.index(b'"', begin)].decode())

    @property
    def body(self) -> bytes:
        """The events as JSON, separated by commas."""
        return self.raw[self.raw.index(_EVENTS) + len(_EVENTS) : -2]


def batch_of(raw: bytes) -> Batch:
    """Read a frame of the live wire. `encode_frame` writes the extent first, so the events need not be parsed."""
    envelope = orjson.loads(raw[: raw.index(b",", raw.index(b'"count"'))] + b"}")
    first_seq = int(envelope["first_seq"])
    return Batch(first_seq, first_seq + int(envelope["count"]) - 1, raw)


def batches_of(first_seq: int, encoded: Iterable[bytes]) -> Iterator[Batch]:
    """Single encoded events from `first_seq` on, as batches of at most `FRAME_BYTES`."""
    return map(batch_of, frames_of(first_seq, encoded))


def blocks_of(view: View, job_id: str, batches: Sequence[Batch]) -> list[Block]:
    """Return contiguous batches as blocks of at most `FRAME_BYTES`, or of one batch."""
    return [_merged(view, job_id, run) for run in runs(batches, lambda batch: len(batch.raw), FRAME_BYTES)]


def framed(payload: bytes, *, is_text: bool = True) -> tuple[bytes, int]:
    """Return a frame as a server sends it (unmasked), and where in it the payload begins."""
    opcode, length = _TEXT if is_text else _BINARY, len(payload)
    if length < 126:
        header = struct.pack("!BB", opcode, length)
    elif length < 1 << 16:
        header = struct.pack("!BBH", opcode, 126, length)
    else:
        header = struct.pack("!BBQ", opcode, 127, length)
    return header + payload, len(header)


def note(view: View, payload: dict[str, Any]) -> Block:
    """Return a message that is no event: it has no place in the sequence."""
    text = orjson.dumps(payload)
    if view.form is Form.SSE:
        return Block(0, 0, b"event: note\ndata: %b\n\n" % text, 0)
    return Block(0, 0, *framed(text))


def end_block(view: View, job_id: str, state: str) -> Block:
    """Return the message that says that a job has ended and that all its events were sent."""
    owner = {"job_id": job_id} if view.names_job else {}
    text = orjson.dumps({**owner, "kind": "end", "state": state})
    if view.form is Form.SSE:
        return Block(0, 0, b"event: end\ndata: %b\n\n" % text, 0)
    return Block(0, 0, *framed(text))


def block_of(view: View, job_id: str, first_seq: int, last_seq: int, events: list[dict[str, Any]]) -> Block:
    """Return events of a view, already chosen, as one block."""
    if not events:
        return Block(first_seq, last_seq, b"", 0)
    if view.form is Form.SSE:
        return Block(first_seq, last_seq, b"".join(map(_sse, events)), 0)
    if view.form is Form.BINARY:
        message = encode_binary(first_seq, last_seq, events, job_id if view.names_job else None)
        return Block(first_seq, last_seq, *framed(message, is_text=False), is_text=False)
    owner = {"job_id": job_id} if view.names_job else {}
    frame = {**owner, "first_seq": first_seq, "count": last_seq - first_seq + 1, "events": events}
    return Block(first_seq, last_seq, *framed(orjson.dumps(frame)))


def chosen(view: View, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Return the events of a view, not yet folded."""
    return [event for batch in batches for event in batch.events if not view.kinds or event["kind"] in view.kinds]


def _sse(event: dict[str, Any]) -> bytes:
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (event["seq"], event["kind"].encode(), orjson.dumps(event))


def _merged(view: View, job_id: str, batches: Sequence[Batch]) -> Block:
    first_seq, last_seq = batches[0].first_seq, batches[-1].last_seq
    if not view.is_whole:
        events = chosen(view, batches)
        if view.max_rate is not None:
            conflation = Conflation()
            for event in events:
                conflation.add(event)
            events = conflation.pop()
        return block_of(view, job_id, first_seq, last_seq, events)
    if len(batches) == 1 and not view.names_job:
        return Block(first_seq, last_seq, *framed(batches[0].raw))
    owner = b'"job_id":%b,' % orjson.dumps(job_id) if view.names_job else b""
    body = b",".join(batch.body for batch in batches)
    count = last_seq - first_seq + 1
    payload = b'{%b"first_seq":%d,"count":%d,"events":[%b]}' % (owner, first_seq, count, body)
    return Block(first_seq, last_seq, *framed(payload))
