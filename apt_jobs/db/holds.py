"""Why a queued job may not be claimed yet, as bits of `jobs.holds`: a claim asks for 0, which its index knows."""

SWEEP = 1  # the sweep's `max_running` jobs run already
PARENTS = 2  # a job that it comes after has not ended
