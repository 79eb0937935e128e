"""One stack for all acceptance tests of a run."""

import signal
from collections.abc import Generator, Iterator

import pytest

from apt_jobs.client.client import Client
from tests.acceptance.stack import DEADLINE_S, Stack, has_both_workers, until


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A job that hangs leaves no trace in its test: what the stack knows of it is told."""
    report = yield
    if report.when == "call" and report.failed and isinstance(stack := item.funcargs.get("stack"), Stack):
        report.sections.append(("the stack", stack.story()))
    return report


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("stack"))
    until(lambda: (stack.data_dir / "local.json").exists() or stack.process.poll() is not None)
    assert stack.process.poll() is None, stack.process.communicate()
    with stack.client() as client:
        until(lambda: has_both_workers(client))
    yield stack
    stack.process.send_signal(signal.SIGINT)
    _, errors = stack.process.communicate(timeout=DEADLINE_S)
    assert "/readyz" not in errors  # of the many looks whether all is up, none is shown
    assert stack.pids() == []


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    with stack.client() as client:
        yield client
