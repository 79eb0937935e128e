"""Everyone who can watch a job: each in a thread, each comes back with the last `seq` it has, each notes what it heard.

They look at every event: one that is not the next is a violation, whatever was killed meanwhile.
"""

import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx
import orjson
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from apt_jobs.client.client import Client
from apt_jobs.events.binary import SUBPROTOCOL, decode_binary

LAST = "the last event"  # message of the log event that ends a job's stream
COME_BACK_S = 0.1
SILENCE_S = 20.0  # heartbeats come after 5 s: a stream that says nothing for so long is broken
LAZY_PAUSE_S = 0.3


class Watcher(threading.Thread):
    """Watches `jobs` of the service at `port` from their first event to `LAST`."""

    def __init__(self, port: int, key: str, jobs: Sequence[str]) -> None:
        super().__init__(name=type(self).__name__, daemon=True)
        self.port, self.key = port, key
        self.headers = {"authorization": f"Bearer {key}"}
        self.heard: dict[str, list[str]] = {job_id: [] for job_id in jobs}  # the event `seq` is at `seq - 1`
        self.violations: list[str] = []
        self.num_connections = 0

    @property
    def is_over(self) -> bool:
        return bool(self.violations) or all(heard and heard[-1] == LAST for heard in self.heard.values())

    def run(self) -> None:
        while not self.is_over:
            self.num_connections += 1
            try:
                self.watch()
            except (OSError, WebSocketException, httpx.HTTPError):
                time.sleep(COME_BACK_S)

    def watch(self) -> None:
        """Read until the connection breaks, or all is over."""
        raise NotImplementedError

    def take(self, job_id: str, frame: dict[str, Any]) -> None:
        """A frame of a WebSocket: its extent has to be that of its events."""
        events = frame.get("events")
        if events is None:
            return
        first_seq, count = len(self.heard[job_id]) + 1, len(events)
        if (frame["first_seq"], frame["count"]) != (first_seq, count):
            self.violate(f"{first_seq} should follow, came {frame['first_seq']} with {frame['count']} of {count}")
        for event in events:
            self.take_event(job_id, event)

    def take_event(self, job_id: str, event: dict[str, Any]) -> None:
        heard = self.heard[job_id]
        if event["seq"] != len(heard) + 1:
            self.violate(f"{len(heard) + 1} should follow, came {event['seq']}")
        heard.append(event.get("message", event["kind"]))

    def violate(self, what: str) -> None:
        self.violations.append(f"{self.name}: {what}")
        raise ConnectionError(what)

    def connection(self, path: str, **options: Any) -> ClientConnection:
        url = f"ws://127.0.0.1:{self.port}{path}"
        options = {"additional_headers": self.headers, "max_size": None, "compression": None, "proxy": None, **options}
        connection: ClientConnection = connect(url, **options)
        return connection


class JsonSocket(Watcher):
    """`/ws/jobs/{id}`, JSON frames."""

    pause_s = 0.0
    options: dict[str, Any] = {}

    def watch(self) -> None:
        [(job_id, heard)] = self.heard.items()
        with self.connection(f"/ws/jobs/{job_id}?after={len(heard)}", **self.options) as connection:
            while not self.is_over:
                message = connection.recv(SILENCE_S)
                self.take(job_id, decode_binary(message) if isinstance(message, bytes) else orjson.loads(message))
                time.sleep(self.pause_s)


class BinarySocket(JsonSocket):
    """`/ws/jobs/{id}`, binary frames."""

    options = {"subprotocols": [Subprotocol(SUBPROTOCOL)]}


class LazySocket(JsonSocket):
    """A client slower than the events: what it has not taken stays with the service."""

    pause_s = LAZY_PAUSE_S
    options = {"max_queue": 1}


class JobsSocket(Watcher):
    """`/ws/jobs`, all the jobs over one socket."""

    def watch(self) -> None:
        with self.connection("/ws/jobs") as connection:
            for job_id, heard in self.heard.items():
                connection.send(orjson.dumps({"subscribe": job_id, "after": len(heard)}).decode())
            while not self.is_over:
                frame = orjson.loads(connection.recv(SILENCE_S))
                if "error" in frame:
                    raise ConnectionError(frame["error"])
                self.take(frame["job_id"], frame)


class EventSource(Watcher):
    """Server-sent events with `Last-Event-ID`, as a browser's EventSource."""

    def watch(self) -> None:
        [(job_id, heard)] = self.heard.items()
        url = f"http://127.0.0.1:{self.port}/api/jobs/{job_id}/events"
        headers = {**self.headers, "accept": "text/event-stream"}
        if heard:
            headers["last-event-id"] = str(len(heard))
        with httpx.stream("GET", url, headers=headers, timeout=SILENCE_S, trust_env=False) as response:
            response.raise_for_status()
            last_id = 0
            for line in response.iter_lines():
                name, _, value = line.partition(": ")
                if name == "id":
                    last_id = int(value)
                elif name == "data" and last_id:
                    event = orjson.loads(value)
                    if event["seq"] != last_id:
                        self.violate(f"the id is {last_id}, the event {event['seq']}")
                    self.take_event(job_id, event)
                    last_id = 0
                if self.is_over:
                    return


class PythonClient(Watcher):
    """The client's iterator, which comes back by itself."""

    def watch(self) -> None:
        [(job_id, heard)] = self.heard.items()
        with Client(f"http://127.0.0.1:{self.port}", self.key) as client:
            self.num_connections = 2  # it counts none of its own: it has to come through without our help
            for event in client.events(job_id, after=len(heard)):
                self.take_event(job_id, event)
                if self.is_over:
                    return
