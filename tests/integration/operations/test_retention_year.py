"""Two months of jobs in simulation: what is kept stays the same size. `benchmarks/year.py` has the full year."""

from pathlib import Path

from pydantic import SecretStr

from apt_jobs.db.engine import Database
from apt_jobs.settings import Settings
from benchmarks.year import simulate

JOBS_A_DAY, NUM_DAYS, KEPT_DAYS = 40, 24, 6


def test_rows_and_files_stay_as_many_as_the_days_that_are_kept(tmp_path: Path, database: Database) -> None:
    settings = Settings(data_dir=tmp_path / "data", database_url=SecretStr("sqlite:///unused"))
    days = list(simulate(database, settings, JOBS_A_DAY, NUM_DAYS, KEPT_DAYS, look_every=8))
    assert [day.num_jobs for day in days] == [KEPT_DAYS * JOBS_A_DAY] * 3
    assert len({day.file_bytes for day in days}) == 1
    if database.dialect == "sqlite":  # Postgres takes back pages when it vacuums
        assert days[-1].database_bytes <= 1.2 * days[0].database_bytes
