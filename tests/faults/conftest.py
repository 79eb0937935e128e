"""The table of all campaigns at the end of a run."""

from collections.abc import Iterator

import pytest

from tests.faults.forked import Forker
from tests.faults.record import FULL, RESULTS, added_up, as_rows


@pytest.fixture(scope="session")
def forker() -> Iterator[Forker]:
    with Forker() as forker:
        yield forker


@pytest.fixture(params=["sqlite", "postgres"] if FULL else ["sqlite"])
def process_test_url(request: pytest.FixtureRequest) -> str:
    """For promises about processes; what the database does for them is tested on both dialects by cheaper means."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if RESULTS:
        terminalreporter.section("promises under faults")
        terminalreporter.line("\n".join(as_rows(added_up(RESULTS))))
