"""Connections to the database: SQLite or Postgres by URL, one way to write and one to read.

SQLite runs in WAL mode and every write transaction begins IMMEDIATE: a deferred one that turns into a writer fails with
"database is locked", however long it is willing to wait.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

from apt_jobs.errors import InvalidInput, OutOfSpace, Unavailable

BUSY_TIMEOUT_S = 10  # how long a SQLite writer waits for another one
CONNECT_TIMEOUT_S = 5
POOL_SIZE = 10
_DISK_FULL_WORDS = ("database or disk is full", "No space left on device", "could not extend file")


class Database:
    """One pool of connections. Thread-safe; do not share across a fork."""

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise InvalidInput(f"database URL begins with {parsed.drivername!r}; use sqlite:/// or postgresql://")
        if parsed.get_backend_name() == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        self.dialect = parsed.get_backend_name()
        self.url = parsed  # its text form hides the password
        self._engine = _sqlite_engine(url) if self.dialect == "sqlite" else _postgres_engine(parsed)
        self._writing = self._engine.execution_options(apt_jobs_write=True)

    def __repr__(self) -> str:
        return f"Database({self.url})"

    @property
    def engine(self) -> Engine:
        """For migrations and tests."""
        return self._engine

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session in one transaction, committed at the end, rolled back on an error.

        Raises:
            Unavailable: the database does not answer, or stayed locked.
            OutOfSpace: the disk is full.
        """
        with _named_errors(), Session(self._writing, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session for reading a consistent snapshot. What is written in it is rolled back.

        Raises:
            Unavailable: the database does not answer.
        """
        with _named_errors(), Session(self._engine, expire_on_commit=False) as session:
            yield session

    def ping(self) -> None:
        """Return if the database answers.

        Raises:
            Unavailable: it does not.
        """
        with self.read() as session:
            session.execute(text("SELECT 1"))

    def dispose(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def _sqlite_engine(url: str) -> Engine:
    file = make_url(url).database
    if not file or file == ":memory:":
        raise InvalidInput("SQLite needs a file: several processes share the database")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, pool_size=POOL_SIZE, max_overflow=POOL_SIZE, connect_args={"timeout": BUSY_TIMEOUT_S})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(dbapi_connection: Any, _record: object) -> None:
    dbapi_connection.isolation_level = None  # no BEGIN of the driver's own: `_begin_sqlite` says which kind
    cursor = dbapi_connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # a 202 is durable
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get("apt_jobs_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _postgres_engine(url: Any) -> Engine:
    return create_engine(
        url,
        pool_size=POOL_SIZE,
        max_overflow=POOL_SIZE,
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "options": "-c statement_timeout=30000 -c lock_timeout=10000",
        },
    )


@contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except DBAPIError as exc:
        reason = str(exc.orig)
        if any(word in reason for word in _DISK_FULL_WORDS):
            raise OutOfSpace(
                f"the database cannot grow: {reason.strip()}; free disk space, nothing was changed"
            ) from exc
        if exc.connection_invalidated or isinstance(exc, OperationalError):
            raise Unavailable(f"the database does not answer: {reason.strip()}") from exc
        raise
