"""Migrations: up, down and up again on both dialects; the models and the schema agree; starting together is safe."""

import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import inspect

from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import get_job, insert_job
from apt_jobs.db.models import Base
from apt_jobs.db.upgrade import downgrade_database, migration_config, upgrade_database
from apt_jobs.jobs.spec import TrainSpec


def test_the_schema_is_what_the_models_say(database: Database) -> None:
    with migration_config(database) as config:
        command.check(config)  # raises when autogenerate would write anything


def test_upgrading_twice_keeps_the_data(database: Database) -> None:
    with database.write() as session:
        job_id = insert_job(session, TrainSpec(kind="train")).id
    upgrade_database(database)
    with database.read() as session:
        assert get_job(session, job_id).state == "queued"


def test_down_and_up_again(database: Database) -> None:
    downgrade_database(database, "base")
    assert set(inspect(database.engine).get_table_names()) <= {"alembic_version"}
    upgrade_database(database)
    assert set(inspect(database.engine).get_table_names()) >= set(Base.metadata.tables)


@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_several_processes_may_migrate_at_once(dialect: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if dialect == "sqlite":
        url = f"sqlite:///{tmp_path / 'new.sqlite3'}"
    else:
        url = request.getfixturevalue("postgres_url")
        database = Database(url)
        downgrade_database(database, "base")
        database.dispose()
    program = (
        "import sys; from apt_jobs.db.engine import Database; from apt_jobs.db.upgrade import upgrade_database;"
        "upgrade_database(Database(sys.argv[1]))"
    )
    running = [subprocess.Popen([sys.executable, "-c", program, url], stderr=subprocess.PIPE) for _ in range(4)]
    errors = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [0] * 4, errors
    database = Database(url)
    assert set(inspect(database.engine).get_table_names()) >= set(Base.metadata.tables)
    database.dispose()
