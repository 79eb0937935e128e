"""A service for the clients, one for all tests of a module: its jobs are made by the tests, which are its workers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from apt_jobs.settings import Settings
from tests.integration.web.served import Served

Serve = Callable[..., Any]


@pytest.fixture(scope="module")
def serve(
    tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path, valkey_server_url: str
) -> Callable[..., Any]:
    """Start a service in a fresh folder; `settings` are fields, the rest are options of uvicorn."""

    @contextmanager
    def start(settings: dict[str, Any] | None = None, **server_options: Any) -> Iterator[Served]:
        folder = tmp_path_factory.mktemp("served")
        (folder / "apt_jobs.sqlite3").write_bytes(sqlite_template.read_bytes())
        fields = {"data_dir": folder, "redis_url": SecretStr(valkey_server_url), **(settings or {})}
        service = Served(Settings(**fields), direct=not server_options, **server_options)
        service.start()
        try:
            yield service
        finally:
            service.stop()
            service.close()

    return start


@pytest.fixture(scope="module")
def served(serve: Serve) -> Iterator[Served]:
    with serve() as service:
        yield service
