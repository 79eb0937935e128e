"""Connections to the database: SQLite or Postgres by URL, one way to write and one to read.

SQLite runs in WAL mode and every write transaction begins IMMEDIATE: a deferred one that turns into a writer fails with
"database is locked", however long it is willing to wait.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from apt_jobs.db.documents import encode_document
from apt_jobs.directories import named_os_errors
from apt_jobs.errors import InvalidInput, OutOfSpace, Unavailable

BUSY_TIMEOUT_S = 10  # how long a SQLite writer waits for another one
CONNECT_TIMEOUT_S = 5
POOL_SIZE = 10
POOL_TIMEOUT_S = 10
SILENT_SERVER_TIMEOUT_S = 15  # a Postgres that vanished without a word: shorter than any lease
_DISK_FULL_WORDS = ("database or disk is full", "No space left on device", "could not extend file")


class Database:
    """One pool of connections. Thread-safe; do not share across a fork."""

    def __init__(self, url: str) -> None:
        self.url = _parse(url)  # its text form hides the password
        self.dialect = self.url.get_backend_name()
        if self.dialect == "sqlite":
            self._engine = _sqlite_engine(self.url)
            self._reading = self._engine
        else:
            self._engine = _postgres_engine(self.url)
            self._reading = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._writing = self._engine.execution_options(apt_jobs_write=True)

    def __repr__(self) -> str:
        return f"Database({self.url})"

    @property
    def engine(self) -> Engine:
        """For migrations and tests."""
        return self._engine

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Provide a session in one transaction, committed at the end, rolled back on an error.

        Raises:
            Unavailable: the database does not answer, or stayed locked.
            OutOfSpace: the disk is full.
            InvalidInput: a value cannot be stored, such as a text with a NUL character on Postgres.
        """
        with named_errors(), Session(self._writing, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Provide a session for reading one consistent snapshot. What is written in it is lost; Postgres refuses it.

        Raises:
            Unavailable: the database does not answer.
            InvalidInput: a value cannot be compared, such as a number beyond 64 bits.
        """
        with named_errors(), Session(self._reading, expire_on_commit=False) as session:
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


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, ValueError):  # not chained and not shown: the text may hold a password
        raise InvalidInput(
            "the database URL cannot be read; write sqlite:////absolute/path or postgresql://user:password@host:5432/name"
        ) from None
    if backend not in ("sqlite", "postgresql", "postgres"):
        raise InvalidInput(f"the database URL begins with {parsed.drivername!r}; use sqlite:/// or postgresql://")
    if backend != "sqlite":
        return parsed.set(drivername="postgresql+psycopg")
    if not parsed.database or parsed.database == ":memory:":
        raise InvalidInput("SQLite needs a file, since several processes share it: sqlite:////absolute/path")
    return parsed.set(drivername="sqlite+pysqlite")


def _sqlite_engine(url: URL) -> Engine:
    assert url.database is not None  # `_parse` asks for it
    folder = Path(url.database).parent
    with named_os_errors(f"the database cannot be kept in {str(folder)!r}"):
        folder.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        url,
        pool_size=POOL_SIZE,
        max_overflow=POOL_SIZE,
        pool_timeout=POOL_TIMEOUT_S,
        json_serializer=encode_document,
        hide_parameters=True,
        connect_args={"timeout": BUSY_TIMEOUT_S},
    )
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


def _postgres_engine(url: URL) -> Engine:
    return create_engine(
        url,
        pool_size=POOL_SIZE,
        max_overflow=POOL_SIZE,
        pool_timeout=POOL_TIMEOUT_S,
        pool_pre_ping=True,
        json_serializer=encode_document,
        hide_parameters=True,  # an error's text goes to logs; texts and hashes do not
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "keepalives_idle": CONNECT_TIMEOUT_S,
            "keepalives_interval": CONNECT_TIMEOUT_S,
            "keepalives_count": 2,
            "tcp_user_timeout": SILENT_SERVER_TIMEOUT_S * 1000,
            # A client that stands still within a transaction would keep its row from the reaper: the server ends it.
            "options": "-c statement_timeout=30000 -c lock_timeout=10000"
            f" -c idle_in_transaction_session_timeout={SILENT_SERVER_TIMEOUT_S * 1000}",
        },
    )


@contextmanager
def named_errors() -> Iterator[None]:
    """Turn the driver's errors on which a caller can act into those of this package.

    Raises:
        Unavailable, OutOfSpace, InvalidInput: see `Database.write`.
    """
    try:
        yield
    except PoolTimeout as exc:
        raise Unavailable(f"all {2 * POOL_SIZE} connections to the database are busy; try again later") from exc
    except (UnicodeEncodeError, OverflowError) as exc:  # the drivers let these two through as they are
        raise InvalidInput(f"the database cannot hold a value: {exc}") from exc
    except DBAPIError as exc:
        reason = str(exc.orig).strip()
        if any(words in reason for words in _DISK_FULL_WORDS):
            raise OutOfSpace(f"the database cannot grow: {reason}; free disk space, nothing was changed") from exc
        if _is_about_schema(exc, reason):
            raise Unavailable(f"the schema is not the one of this version ({reason}); run `apt-jobs migrate`") from exc
        if exc.connection_invalidated or isinstance(exc, OperationalError):
            raise Unavailable(f"the database does not answer: {reason}") from exc
        if isinstance(exc, DataError):
            raise InvalidInput(f"the database cannot hold a value: {reason}") from exc
        raise


def _is_about_schema(exc: DBAPIError, reason: str) -> bool:
    if isinstance(exc, ProgrammingError):  # Postgres; a missing database is an OperationalError
        return "does not exist" in reason
    return reason.startswith(("no such table", "no such column", "table ")) and isinstance(exc, OperationalError)
