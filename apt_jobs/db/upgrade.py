"""Migrations, run in-process. Several processes may start at once: one migrates, the others wait."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text

from apt_jobs.db.engine import Database
from apt_jobs.errors import Unavailable

logger = logging.getLogger(__name__)

_LOCK_KEY = 0x6170745F6A6F6273  # "apt_jobs": Postgres advisory lock of all that migrate
_INSTALLED = "apt_jobs_migrations"  # where the wheel puts the folder `migrations`


def upgrade_database(database: Database, revision: str = "head") -> None:
    """Bring the schema to `revision`. Returns when it is there, whoever did it.

    Raises:
        Unavailable: the scripts are missing or the database does not answer.
    """
    config = alembic_config()
    with _only_one(database), _migrating(database) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def downgrade_database(database: Database, revision: str) -> None:
    """Take the schema back to `revision` ("base": nothing)."""
    config = alembic_config()
    with _only_one(database), _migrating(database) as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, revision)


def alembic_config() -> Config:
    """Alembic's configuration, wherever the scripts are: a checkout or an installed wheel."""
    config = Config()
    config.set_main_option("script_location", str(_scripts()).replace("%", "%%"))
    return config


def _scripts() -> Path:
    checkout = Path(__file__).resolve().parents[2] / "migrations"
    if (checkout / "env.py").is_file():
        return checkout
    spec = find_spec(_INSTALLED)
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    raise Unavailable(f"the migration scripts are missing: neither {checkout} nor the package {_INSTALLED} is there")


@contextmanager
def _only_one(database: Database) -> Iterator[None]:
    if database.dialect == "postgresql":
        with database.engine.connect() as connection:
            connection.execute(text("SET lock_timeout = 0; SET statement_timeout = 0"))
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _LOCK_KEY})
            try:
                yield
            finally:
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _LOCK_KEY})
                connection.invalidate()  # its timeouts are not those of the pool
        return
    with Path(f"{database.url.database}.migrating").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _migrating(database: Database) -> Iterator[Connection]:
    """A connection in a transaction. On SQLite foreign keys are off, else rebuilding a table deletes its children."""
    with database.engine.connect() as connection:
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
            yield connection
