"""Database URLs: what is refused, and that no message shows a password."""

import traceback
from pathlib import Path

import pytest

from apt_jobs.db.engine import Database
from apt_jobs.errors import InvalidInput


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "mysql://user:hunter2@host/name",
        "postgresql://user:hunter2@host:port/name",
        "nosuchdriver+x://user:hunter2@host/name",
        "sqlite://",
        "sqlite:///:memory:",
    ],
)
def test_a_url_that_cannot_serve_is_refused_with_a_remedy(url: str) -> None:
    with pytest.raises(InvalidInput, match="sqlite:///") as caught:
        Database(url)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value, limit=0))


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg2"])
def test_postgres_is_always_spoken_through_psycopg(scheme: str) -> None:
    database = Database(f"{scheme}://user:hunter2@host/name")
    assert repr(database) == "Database(postgresql+psycopg://user:***@host/name)"
    database.dispose()


def test_the_folder_of_a_sqlite_file_is_made(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/new/folder/x.sqlite3")
    database.ping()
    database.dispose()
    assert (tmp_path / "new" / "folder" / "x.sqlite3").exists()
