"""A web process with a key of every kind, for tests that attack it. It runs no job: there is no worker."""

from collections.abc import Iterator

import pytest

from tests.security.attacked import AttackedWeb, attacked_web


@pytest.fixture(scope="session")
def web(valkey_server_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttackedWeb]:
    """One process for all modules that leave it as they found it."""
    with attacked_web(tmp_path_factory.mktemp("attacked"), valkey_server_url) as started:
        yield started
        assert started.process.poll() is None, started.log()
