"""A service on SQLite with a Valkey of its own that tests may hurt."""

from collections.abc import Callable, Iterator

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
