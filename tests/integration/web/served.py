"""A web process in a thread of the test, and clients that check what they receive."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
import orjson
import pytest
import uvicorn
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from apt_jobs.db.access import Role, create_key
from apt_jobs.db.engine import Database
from apt_jobs.db.events import append_events
from apt_jobs.db.jobs import claim, insert_job
from apt_jobs.events.kinds import Event, LineLogged
from apt_jobs.events.live import LivePublisher
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.settings import Settings
from apt_jobs.web.app import create_app
from apt_jobs.web.server.websocket_protocol import DirectWebSocketProtocol
from tests.conftest import some_port

DEADLINE_S = 120.0
LEASE_S = 3600.0


class Served:
    """A service without workers. `direct`: as `apt-jobs web` runs it; else with the server's own protocol.

    `server_options` are further ones of uvicorn, as certificates.
    """

    def __init__(self, settings: Settings, *, direct: bool, **server_options: Any) -> None:
        self.settings = settings.model_copy(update={"port": some_port()})
        self._direct, self._server_options = direct, server_options
        self.database = Database(self.settings.database)
        self.publisher = LivePublisher(self.settings.redis)
        with self.database.write() as session:
            self.key = create_key(session, "test", Role.ADMIN)
        self.headers = {"authorization": f"Bearer {self.key}"}

    def start(self) -> None:
        options = {"ws": DirectWebSocketProtocol if self._direct else "websockets-sansio", **self._server_options}
        config = uvicorn.Config(
            create_app(self.settings),
            port=self.settings.port,
            ws_max_size=1 << 16,
            ws_per_message_deflate=False,
            log_config=None,
            timeout_graceful_shutdown=1,
            **options,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        until(lambda: self._server.started)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def connections(self) -> list[Any]:
        """uvicorn's protocols of the open connections."""
        return list(self._server.server_state.connections)

    def unsent_bytes(self) -> list[int]:
        """What each open connection holds in memory for a client that is slower."""
        return [protocol.transport.get_write_buffer_size() for protocol in self.connections()]

    def close(self) -> None:
        self.publisher.close()
        self.database.dispose()

    def rest_client(self) -> httpx.Client:
        """A client with an admin's key, to be closed by the test."""
        return httpx.Client(
            base_url=f"http://127.0.0.1:{self.settings.port}", headers=self.headers, timeout=DEADLINE_S, trust_env=False
        )

    def new_job(self) -> str:
        """A job that the test owns."""
        with self.database.write() as session:
            job_id = insert_job(session, TrainSpec(kind="train")).id
            claim(session, job_id, "test", LEASE_S)
        return job_id

    def say(self, job_id: str, *events: Event) -> int:
        """Store events as the relay does, then publish them; the last `seq`."""
        now = datetime.now(UTC)
        with self.database.write() as session:
            stored = append_events(session, job_id, 1, [(now, event) for event in events], LEASE_S).stored
        self.publisher.publish(job_id, stored)
        return stored[-1].seq

    def say_lines(self, job_id: str, count: int, width: int = 40) -> int:
        return self.say(job_id, *(LineLogged("info", "rank 0", f"{number} " + "x" * width) for number in range(count)))

    @contextmanager
    def connected(self, path: str, **options: Any) -> Iterator[ClientConnection]:
        url = f"ws://127.0.0.1:{self.settings.port}{path}"
        options = {"additional_headers": self.headers, "max_size": None, "compression": None, "proxy": None, **options}
        with connect(url, **options) as connection:
            yield connection


def until(what: Any, deadline_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + deadline_s
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


class Listener:
    """The sequence as one client saw it; it fails at a gap or a double."""

    def __init__(self, after: int = 0) -> None:
        self.seq = after
        self.messages: list[str] = []

    def receive(self, connection: ClientConnection, last_seq: int) -> None:
        """Receive until `last_seq`."""
        deadline = time.monotonic() + DEADLINE_S
        while self.seq < last_seq:
            self.take(orjson.loads(connection.recv(timeout=deadline - time.monotonic())))

    def take(self, frame: dict[str, Any]) -> None:
        if "events" not in frame:
            return
        assert frame["first_seq"] == self.seq + 1, f"after {self.seq} came {frame['first_seq']}"
        assert [event["seq"] for event in frame["events"]] == list(range(self.seq + 1, self.seq + frame["count"] + 1))
        self.seq += frame["count"]
        self.messages += [event.get("message", event["kind"]) for event in frame["events"]]


def closed_with(connection: ClientConnection) -> int | None:
    """The close code, whatever else came before."""
    with pytest.raises(ConnectionClosed) as caught:
        Listener().receive(connection, 1 << 60)
    return caught.value.rcvd.code if caught.value.rcvd else None
