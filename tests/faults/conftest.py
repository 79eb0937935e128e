"""The table of all campaigns at the end of a run."""

import pytest

from tests.faults.record import RESULTS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not RESULTS:
        return
    terminalreporter.section("promises under faults")
    terminalreporter.line("promise  trials  faults  violations  slowest recovery  what (seed)")
    for one in sorted(RESULTS, key=lambda result: result.promise):
        terminalreporter.line(
            f"{one.promise:>7}{one.trials:>8}{one.faults:>8}{len(one.violations):>12}"
            f"{one.slowest_recovery_s:>16.1f} s  {one.what} ({one.seed})"
        )
