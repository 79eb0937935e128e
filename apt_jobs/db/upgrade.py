"""Migrations, run in-process. Several processes may start at once: one migrates, the others wait."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text

from apt_jobs.db.engine import Database, named_errors
from apt_jobs.db.job_counts import install_job_counts
from apt_jobs.db.series.migrate import move_old_series
from apt_jobs.errors import Unavailable

logger = logging.getLogger(__name__)

_LOCK_KEY = 0x6170745F6A6F6273  # "apt_jobs": Postgres advisory lock of all that migrate
_INSTALLED = "apt_jobs_migrations"  # where the wheel puts the folder `migrations`


def upgrade_database(database: Database, revision: str = "head") -> None:
    """Bring the schema to `revision`, and old histories to its form. Returns when they are there, whoever did it.

    Raises:
        Unavailable: the scripts are missing, the database does not answer or is newer than this version.
    """
    with _known_revisions(), migration_config(database) as config:
        command.upgrade(config, revision)
        if revision == "head":
            install_job_counts(config.attributes["connection"])
    if revision == "head":
        move_old_series(database)


def downgrade_database(database: Database, revision: str) -> None:
    """Take the schema back to `revision` ("base": nothing).

    Raises:
        Unavailable: as `upgrade_database`.
    """
    with _known_revisions(), migration_config(database) as config:
        command.downgrade(config, revision)


def newest_revision() -> str | None:
    """Return the schema that this version needs."""
    config = Config()
    config.set_main_option("script_location", str(_scripts()).replace("%", "%%"))
    return ScriptDirectory.from_config(config).get_current_head()


def current_revision(database: Database) -> str | None:
    """Return the schema that the database has; None: it has none."""
    with named_errors(), database.engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def require_current_schema(database: Database) -> None:
    """Return if the schema is the one of this version.

    Raises:
        Unavailable: it is older, newer or not there; the message says what to do.
    """
    wanted, found = newest_revision(), current_revision(database)
    if found != wanted:
        raise Unavailable(
            f"the database has schema {found or 'none'}, and this version of apt-jobs needs {wanted}: run "
            "`apt-jobs migrate` with the newer of the two versions, and install it everywhere"
        )


@contextmanager
def migration_config(database: Database) -> Iterator[Config]:
    """Alembic's configuration with a connection that no other process migrates on. All or nothing is committed."""
    config = Config()
    config.set_main_option("script_location", str(_scripts()).replace("%", "%%"))
    with named_errors(), _only_one(database), migrating(database) as connection:
        config.attributes["connection"] = connection
        yield config


@contextmanager
def _known_revisions() -> Iterator[None]:
    try:
        yield
    except CommandError as exc:
        raise Unavailable(
            f"{exc}: the database was migrated by another version of apt-jobs; install that one, nothing was changed"
        ) from exc


def _scripts() -> Path:
    root = Path(__file__).resolve().parents[2]
    checkout = root / "migrations"
    if (checkout / "env.py").is_file() and (root / "pyproject.toml").is_file():  # not somebody's in site-packages
        return checkout
    spec = find_spec(_INSTALLED)
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    raise Unavailable(f"the migration scripts are missing: neither {checkout} nor the package {_INSTALLED} is there")


@contextmanager
def _only_one(database: Database) -> Iterator[None]:
    if database.dialect == "postgresql":
        with database.engine.connect() as connection:
            connection.execute(
                text("SET lock_timeout = 0; SET statement_timeout = 0; SET idle_in_transaction_session_timeout = 0")
            )
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _LOCK_KEY})
            try:
                yield
            finally:
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _LOCK_KEY})
                connection.invalidate()  # its timeouts are not those of the pool
        return
    with Path(f"{database.url.database}.migrating").open("a") as lock:  # the lock ends with its process
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def migrating(database: Database) -> Iterator[Connection]:
    """Provide a connection in a transaction. On SQLite foreign keys are off, as rebuilt tables delete children."""
    with database.engine.connect().execution_options(apt_jobs_write=True) as connection:
        if database.dialect == "sqlite":
            raw = connection.connection.dbapi_connection
            assert raw is not None
            raw.execute("PRAGMA foreign_keys=OFF")
            try:
                with connection.begin():
                    yield connection
                    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
                    if broken:
                        raise Unavailable(f"the migration would break {len(broken)} references; nothing was changed")
            finally:
                connection.rollback()
                raw.execute("PRAGMA foreign_keys=ON")
            return
        with connection.begin():
            connection.execute(text("SET LOCAL statement_timeout = 0"))  # a big table takes its time
            yield connection
