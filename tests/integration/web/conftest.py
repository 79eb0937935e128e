"""A service on SQLite with a Valkey of its own that tests may hurt."""

from collections.abc import Callable, Iterator

import httpx
import pytest

from apt_jobs.settings import Settings
from tests.integration.faulty_valkey import Valkey
from tests.integration.web.served import Served


@pytest.fixture(params=["direct", "plain"])
def served(
    request: pytest.FixtureRequest, sqlite_url: str, valkey: Valkey, make_settings: Callable[..., Settings]
) -> Iterator[Served]:
    """The service under both ways to send."""
    service = Served(make_settings(database_url=sqlite_url, redis_url=valkey.url), direct=request.param == "direct")
    service.start()
    yield service
    service.stop()
    service.close()


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    """A client with an admin's key."""
    base = f"http://127.0.0.1:{served.settings.port}"
    with httpx.Client(base_url=base, headers=served.headers, trust_env=False, timeout=30) as client:
        yield client
