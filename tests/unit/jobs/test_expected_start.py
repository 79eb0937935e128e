"""When waiting jobs start by what runs: as early as they fit, after those before them, or nobody knows."""

from math import inf

import pytest

from apt_jobs.jobs.expected_start import Plan, starts_in_s
from apt_jobs.jobs.needs import Needs
from apt_jobs.jobs.packing import Held, Offer

OFFER = Offer(cpus=4, memory_gb=8.0, max_jobs=16)
ONE, FOUR, MINUTE = Needs(), Needs(num_ranks=4), Needs(num_ranks=4, time_limit_s=60)


def holding(*ends_in_s: float) -> Plan:
    """A worker of four cores whose jobs hold one each."""
    return Plan(OFFER, [(end, Held(cpus=1)) for end in ends_in_s])


@pytest.mark.parametrize(
    ("plans", "jobs", "start_s"),
    [
        ([holding()], [ONE], 0.0),
        ([holding(9, 5, 7, 8)], [ONE], 5.0),
        ([holding(9, 5, 7, 8)], [ONE, ONE], 7.0),
        ([holding(9, 5, 7, 8)], [FOUR], 9.0),
        ([holding(9, 5, 7, 8)], [FOUR, ONE], None),  # nobody knows how long the first one runs
        ([holding(9, 5, 7, 8)], [MINUTE, ONE], 69.0),
        ([holding(9, 5, 7, 8)], [MINUTE, MINUTE, MINUTE], 129.0),
        ([holding(inf, inf, inf, 8)], [ONE], 8.0),
        ([holding(inf, inf, inf, 8)], [FOUR], None),
        ([holding(inf, inf, inf, 8)], [FOUR, ONE], 8.0),  # who has no start holds up nobody
        ([holding(9, 9, 9, 9), holding(4, 4, 4, 4)], [FOUR], 4.0),
        ([holding(9, 9, 9, 9), holding(4, 4, 4, 4)], [FOUR, FOUR], 9.0),
        ([holding(9, 9)], [FOUR, ONE], 0.0),  # it fits beside what runs
        ([holding(0.0, 0.0, 0.0, 0.0)], [ONE], 0.0),
        ([], [ONE], None),
        ([holding()], [Needs(num_ranks=99)], None),
    ],
)
def test_each_starts_as_early_as_it_fits(plans: list[Plan], jobs: list[Needs], start_s: float | None) -> None:
    assert starts_in_s(plans, jobs) == start_s
