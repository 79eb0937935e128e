"""How a job's events are followed to its end: what both clients share, without I/O.

One log, two streams (WebSocket, server-sent events) and pages of REST; a `Follower` is the place in the log and knows
when the job is over. The service says so with an `end`. Where that does not come (it ended before the client came, an
older service, a proxy in between) a state that ends a job, or a silence, makes the client look at the job itself.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlencode

import orjson
from websockets.exceptions import ConnectionClosed

from apt_jobs.client.answers import ENDED, JobAnswer
from apt_jobs.client.calls import segment
from apt_jobs.errors import AptJobsError, Denied, InvalidInput, NotFound, Unavailable
from apt_jobs.events.binary import decode_binary

SILENCE_S = 10.0  # without an event, after which the job is looked at
MAX_FAILURES = 60  # in a row without an event
MAX_FRAME_BYTES = 64 << 20
END_KIND = "end"
_ERROR_OF_CODE: dict[int, type[AptJobsError]] = {4400: InvalidInput, 4401: Denied, 4403: Denied, 4404: NotFound}

Event = dict[str, Any]
ReadEvent = Callable[[str, str], Event | None]  # from kind and data of a server-sent event; None: it says nothing new


class Follower:
    """A place in the log of one job."""

    def __init__(
        self,
        job_id: str,
        after: int = 0,
        kinds: Sequence[str] = (),
        timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job_id = job_id
        self.kinds = tuple(kinds)
        self.cursor = after  # last `seq` that was seen
        self.is_over = False
        self.uses_sse = False  # the service or a proxy refused the WebSocket
        self._segment = segment(job_id, "job")
        self._end_seq: int | None = None  # last `seq` of a job that has ended
        self._may_have_ended = False
        self._num_failures = 0
        self._clock = clock
        self._last_sign_at = clock()
        self._deadline = None if timeout_s is None else clock() + timeout_s

    @property
    def socket_path(self) -> str:
        """Where the WebSocket goes on from here."""
        return f"/ws/jobs/{self._segment}?{urlencode(self._query(), doseq=True)}"

    @property
    def stream_path(self) -> str:
        """Where the server-sent events go on from here."""
        return f"/api/jobs/{self._segment}/events?{urlencode(self._query(), doseq=True)}"

    @property
    def wait_s(self) -> float:
        """How long to wait for the next message."""
        if self._deadline is None:
            return SILENCE_S
        return max(0.01, min(SILENCE_S, self._deadline - self._clock()))

    @property
    def is_due_for_a_look(self) -> bool:
        """Whether the job itself has to be looked at: it may have ended, or nothing came for long."""
        has_read_all = self._end_seq is not None and self.cursor >= self._end_seq
        return self._may_have_ended or has_read_all or self.is_silent

    @property
    def is_silent(self) -> bool:
        """Whether no event came for long."""
        return self._clock() - self._last_sign_at >= SILENCE_S

    @property
    def is_expired(self) -> bool:
        """Whether the time that the caller gave is over."""
        return self._deadline is not None and self._clock() >= self._deadline

    def receive_message(self, message: str | bytes) -> list[Event]:
        """Read one message of the WebSocket; the events in it that are new.

        Raises:
            InvalidInput: it is none of ours.
        """
        frame = decode_binary(message) if isinstance(message, bytes) else _object(message)
        if frame.get("kind") == END_KIND:
            self.is_over = True
            return []
        if isinstance(job := frame.get("job"), dict):  # the greeting
            self._note_end(JobAnswer(job))
        if "events" not in frame:
            return []
        events = self._new(frame["events"])
        self.cursor = max(self.cursor, int(frame["first_seq"]) + int(frame["count"]) - 1)
        return events

    def receive_sse(self, kind: str, data: str) -> list[Event]:
        """Read one server-sent event."""
        if kind == END_KIND:
            self.is_over = True
            return []
        event = _object(data) if kind != "note" and data else {}
        return self._new([event]) if "seq" in event else []

    def receive_job(self, job: JobAnswer) -> bool:
        """Note how the job stands; whether what is left of its log has to be read page by page."""
        was_silent = self.is_silent
        self._may_have_ended = False
        self._last_sign_at = self._clock()
        self._note_end(job)
        if self._end_seq is None:
            return False
        if self.cursor >= self._end_seq:
            self.is_over = True
        return was_silent and not self.is_over

    def receive_page(self, events: Sequence[Event], has_more: bool) -> list[Event]:
        """Read one page of the log of a job that has ended."""
        new = self._new(events)
        if not (has_more and events):
            self.is_over = True
        return new

    def note_failure(self, url: str, error: Exception) -> int:
        """Count a connection that broke; how many did in a row.

        Raises:
            Unavailable: too many did.
        """
        self._num_failures += 1
        if self._num_failures > MAX_FAILURES:
            raise Unavailable(f"{url} cannot be reached: {error or type(error).__name__}") from error
        return self._num_failures

    def _query(self) -> dict[str, Any]:
        return {"after": self.cursor, **({"kind": list(self.kinds)} if self.kinds else {})}

    def _new(self, events: Sequence[Event]) -> list[Event]:
        """Return the events that were not seen before; the place moves to the last of them."""
        new = [event for event in events if event["seq"] > self.cursor]
        if new:
            self.cursor = int(new[-1]["seq"])
            self._num_failures = 0
            self._last_sign_at = self._clock()
            self._may_have_ended |= any(event["kind"] == "state" and event["state"] in ENDED for event in new)
        return new

    def _note_end(self, job: JobAnswer) -> None:
        self._end_seq = job.last_seq if job.is_ended else None


def closed_error(closed: ConnectionClosed, job_id: str) -> AptJobsError | None:
    """Return the error that a close code stands for; None if coming back may help."""
    code = closed.rcvd.code if closed.rcvd else 0
    kind = _ERROR_OF_CODE.get(code)
    if kind is None or closed.rcvd is None:
        return None
    texts = {4401: "the API key is not valid", 4404: f"no job {job_id!r}"}
    return kind(texts.get(code) or closed.rcvd.reason or f"the WebSocket was closed with {code}")


class SseDecoder:
    """Server-sent events from bytes as they come. Lines end with a line feed, with or without a carriage return."""

    def __init__(self) -> None:
        self._rest = b""
        self._kind = "message"
        self._data: list[str] = []

    def feed(self, part: bytes) -> list[tuple[str, str]]:
        """Add bytes; the events (kind, data) that are complete now.

        Raises:
            InvalidInput: an event is longer than any of ours.
        """
        lines = (self._rest + part).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > MAX_FRAME_BYTES:
            raise InvalidInput(f"a server-sent event has more than {MAX_FRAME_BYTES:,} bytes")
        events = []
        for line in lines:
            if text := line.removesuffix(b"\r").decode("utf-8", "replace"):
                self._take(text)
            elif self._data:
                events.append((self._kind, "\n".join(self._data)))
                self._kind, self._data = "message", []
            else:
                self._kind = "message"
        return events

    def _take(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._kind = value
        elif name == "data":
            self._data.append(value)


def generated_event(kind: str, data: str) -> dict[str, Any]:
    """Return an event of a stream of generated text: its `kind` is `delta`, `restarted` or `end`.

    Raises:
        Unavailable, InvalidInput: it is an error.
    """
    event = _object(data)
    if kind in ("error", "denied"):
        status, detail = event.get("status"), str(event.get("detail", "the stream ended with an error"))
        if kind == "denied":
            raise Denied(detail)
        raise (InvalidInput if status == 422 else Unavailable)(detail)
    return {"kind": kind, **event}


class ChatReader:
    """The chunks of a chat as events: `delta` with text, then `end` with `finish_reason` and `usage`."""

    def __init__(self) -> None:
        self._end: dict[str, Any] = {"kind": "end", "finish_reason": None, "usage": None}

    def read(self, _kind: str, data: str) -> dict[str, Any] | None:
        """Return the event of a chunk; None: it says nothing new.

        Raises:
            Unavailable: it is an error.
        """
        if data == "[DONE]":
            return self._end
        chunk = _object(data)
        if isinstance(error := chunk.get("error"), dict):
            raise Unavailable(str(error.get("message", "the stream ended with an error")))
        if isinstance(usage := chunk.get("usage"), dict):
            self._end["usage"] = usage
        for choice in chunk.get("choices") or ():
            self._end["finish_reason"] = choice.get("finish_reason") or self._end["finish_reason"]
            if text := (choice.get("delta") or {}).get("content"):
                return {"kind": "delta", "text": str(text)}
        return None


def _object(text: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text)
    except (json.JSONDecodeError, ValueError) as exc:
        raise InvalidInput(f"the stream sent what is no JSON: {text[:100]!r}") from exc
    if not isinstance(value, dict):
        raise InvalidInput(f"the stream sent {text[:100]!r}, which is no object")
    return value
