"""A web process to attack: its address, its keys (good and bad), its log, and sockets that speak raw HTTP to it."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
from pydantic import SecretStr
from starlette.routing import Route

from apt_jobs.db.access import Role, create_key, create_login_token, revoke_key
from apt_jobs.db.engine import Database
from apt_jobs.db.upgrade import upgrade_database
from apt_jobs.settings import Settings
from apt_jobs.web.app import ROUTES
from tests.conftest import some_port

START_DEADLINE_S = 120.0
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")


@dataclass(frozen=True)
class AttackedWeb:
    """A running process and what is known about it."""

    settings: Settings
    database: Database
    keys: dict[Role, str]
    dead_keys: dict[str, str]
    log_file: Path
    process: "subprocess.Popen[bytes]"

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.settings.port}"

    def client(self, key: str | None) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key is not None else {}
        return httpx.Client(base_url=f"http://{self.host}", headers=headers, timeout=30, trust_env=False)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.settings.port), timeout=30)

    def raw(self, request: bytes) -> bytes:
        """Send bytes; what comes back until the peer ends the connection."""
        with self.connect() as connection:
            connection.sendall(request)
            return read_to_end(connection)

    def request_head(self, method: str, target: str, headers: Mapping[str, str] | None = None) -> bytes:
        """The head of a request of an admin that closes the connection after its answer."""
        fields = {"host": self.host, "authorization": f"Bearer {self.keys[Role.ADMIN]}", "connection": "close"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in {**fields, **(headers or {})}.items())
        return f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode("utf-8", "surrogateescape")

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def login_token(self) -> str:
        with self.database.write() as session:
            return create_login_token(session, Role.ADMIN, 600.0)

    def serves(self) -> bool:
        with self.client(self.keys[Role.VIEWER]) as client:
            return client.get("/readyz").status_code == client.get("/api/jobs").status_code == 200


@contextmanager
def attacked_web(folder: Path, redis_url: str, **variables: str) -> Iterator[AttackedWeb]:
    """Start `apt-jobs web` in a fresh folder; `variables` are further settings."""
    settings = Settings(data_dir=folder / "data", port=some_port(), redis_url=SecretStr(redis_url))
    database = Database(settings.database)
    upgrade_database(database)
    keys, dead_keys = _make_keys(database)
    environment = {
        **os.environ,
        "APT_JOBS_DATA_DIR": str(settings.root),
        "APT_JOBS_REDIS_URL": redis_url,
        "APT_JOBS_PORT": str(settings.port),
        "APT_JOBS_REQUEST_TIMEOUT_S": "2",
        "APT_JOBS_LOG_LEVEL": "DEBUG",
        **variables,
    }
    log_file = folder / "web.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "apt_jobs", "web"], env=environment, stdout=log, stderr=log)
    try:
        web = AttackedWeb(settings, database, keys, dead_keys, log_file, process)
        _wait_until_up(web)
        yield web
    finally:
        process.terminate()
        process.wait(START_DEADLINE_S)
        database.dispose()


def routes() -> list[tuple[str, frozenset[str]]]:
    """Each path of the route table, with something for its parameters, and the methods that it serves."""
    served: dict[str, frozenset[str]] = {}
    for route in ROUTES:
        if isinstance(route, Route):
            path = re.sub(r"\{(\w+)(:\w+)?\}", r"some_\1", route.path)
            served[path] = served.get(path, frozenset()) | frozenset(route.methods or ())
    return sorted(served.items())


def read_to_end(connection: socket.socket) -> bytes:
    """All that comes until the peer ends the connection, which it has to within the socket's timeout."""
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:  # it closed with bytes of ours unread
        pass
    return b"".join(parts)


def status_of(answer: bytes) -> int:
    """The status of a raw answer; 0: there was none."""
    found = re.match(rb"HTTP/1\.1 (\d{3})", answer)
    return int(found[1]) if found else 0


def _make_keys(database: Database) -> tuple[dict[Role, str], dict[str, str]]:
    with database.write() as session:
        keys = {role: create_key(session, f"test {role}", role) for role in Role}
        revoked = create_key(session, "revoked", Role.ADMIN)
        expired = create_key(session, "expired", Role.ADMIN, datetime.now(UTC) - timedelta(seconds=1))
    with database.write() as session:
        revoke_key(session, revoked.split("_")[1])
    admin = keys[Role.ADMIN]
    dead = {
        "revoked": revoked,
        "expired": expired,
        "wrong secret": admin[:-1] + ("0" if admin[-1] != "0" else "1"),
        "another's id": f"apt_{keys[Role.VIEWER].split('_')[1]}_{admin.split('_')[2]}",
        "garbage": "garbage",
        "no secret": admin.rpartition("_")[0],
        "longer": admin + "0",
        "upper case": "apt_" + admin.removeprefix("apt_").upper(),
        "prefix": "apt_",
    }
    return keys, dead


def _wait_until_up(web: AttackedWeb) -> None:
    """Not until it is ready, which it never is without a broker."""
    deadline = time.monotonic() + START_DEADLINE_S
    while True:
        try:
            httpx.get(f"http://{web.host}/healthz", trust_env=False).raise_for_status()
            return
        except httpx.HTTPError:
            assert time.monotonic() < deadline, web.log()
            assert web.process.poll() is None, web.log()
            time.sleep(0.05)
