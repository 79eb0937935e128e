"""A Valkey of a test's own, which it may hurt."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.faulty_valkey import Valkey


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    server = Valkey(tmp_path)
    server.start()
    yield server
    server.kill()
