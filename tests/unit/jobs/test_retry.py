"""The rules of trying again, as a table."""

import pytest

from apt_jobs.jobs.retry import Fault, FaultCounts, RetryRules, retry_rules, retry_wait_s, why_give_up
from apt_jobs.settings import Settings

RULES = RetryRules()


@pytest.mark.parametrize(
    ("counts", "fault", "max_attempts", "expected"),
    [
        (FaultCounts(1, 1, 0), Fault.JOB, 3, None),
        (FaultCounts(3, 1, 0), Fault.JOB, 3, "3 of at most 3 attempts ended by the job's own fault"),
        (FaultCounts(1, 1, 0), Fault.JOB, 1, "1 of at most 1 attempts"),
        (FaultCounts(3, 3, 0), Fault.JOB, 50, "3 in a row without a new checkpoint"),
        (FaultCounts(2, 2, 9), Fault.INFRASTRUCTURE, 1, None),
        (FaultCounts(0, 0, 10), Fault.INFRASTRUCTURE, 50, "10 infrastructure faults in a row"),
    ],
)
def test_a_job_is_given_up_by_its_own_counts(
    counts: FaultCounts, fault: Fault, max_attempts: int, expected: str | None
) -> None:
    reason = why_give_up(counts, fault, max_attempts, RULES)
    assert reason is None if expected is None else reason is not None and expected in reason


def test_each_fault_counts_only_as_what_it_is() -> None:
    counts = FaultCounts(0, 0, 0).plus(Fault.JOB).plus(Fault.INFRASTRUCTURE).plus(Fault.INFRASTRUCTURE)
    assert counts == FaultCounts(1, 1, 2)
    assert (retry_wait_s(counts, Fault.JOB, RULES), retry_wait_s(counts, Fault.INFRASTRUCTURE, RULES)) == (5.0, 10.0)


def test_the_rules_of_the_default_settings_are_the_default_rules() -> None:
    assert retry_rules(Settings()) == RULES
