"""The admin key that `apt-jobs up` makes for the command line ends with it: at its stop, or at the next start."""

from collections.abc import Callable
from contextlib import ExitStack

import pytest

from apt_jobs.db.access import Role, authenticate_key, create_key, list_keys
from apt_jobs.db.engine import Database
from apt_jobs.errors import Denied
from apt_jobs.settings import Settings
from apt_jobs.workers.embedded import _write_access


def _is_valid(database: Database, key: str) -> bool:
    try:
        with database.read() as session:
            authenticate_key(session, key)
    except Denied:
        return False
    return True


def test_the_key_of_up_ends_with_its_stop(sqlite_database: Database, make_settings: Callable[..., Settings]) -> None:
    settings = make_settings()
    settings.root.mkdir(parents=True)
    with ExitStack() as stack:
        key = _write_access(settings, sqlite_database, stack).api_key
        assert _is_valid(sqlite_database, key)
    assert not _is_valid(sqlite_database, key)
    assert not (settings.root / "local.json").exists()


def test_what_a_killed_start_left_ends_at_the_next(
    sqlite_database: Database, make_settings: Callable[..., Settings]
) -> None:
    settings = make_settings()
    settings.root.mkdir(parents=True)
    with sqlite_database.write() as session:
        older = create_key(session, "apt-jobs up", Role.ADMIN)  # as versions before made them
        mine = create_key(session, "my own", Role.ADMIN)
    killed = [_write_access(settings, sqlite_database, ExitStack()).api_key for _ in range(3)]
    with ExitStack() as stack:
        key = _write_access(settings, sqlite_database, stack).api_key
        assert [_is_valid(sqlite_database, one) for one in (older, *killed, mine, key)] == [False] * 4 + [True] * 2
        with sqlite_database.read() as session:
            assert sum(row.revoked_at is None for row in list_keys(session)) == 2


def test_another_place_on_the_same_database_keeps_its_key(
    database: Database, make_settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with ExitStack() as stack:
        here = make_settings(database_url=database.url.render_as_string(hide_password=False))
        there = here.model_copy(update={"data_dir": tmp_path_factory.mktemp("there")})
        here.root.mkdir(parents=True)
        keys = [_write_access(settings, database, stack).api_key for settings in (here, there)]
        assert [_is_valid(database, key) for key in keys] == [True, True]
