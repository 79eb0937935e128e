"""The states of a job and the one table of transitions between them.

queued -> running -> succeeded | failed | cancelled | dead
running -> queued (worker lost, drained, or retry); running -> pausing -> paused -> queued; queued -> paused | cancelled
failed | cancelled | dead -> queued (a user retries it)
"""

from enum import StrEnum

from apt_jobs.errors import TransitionRefused


class JobState(StrEnum):
    QUEUED = "queued"  # waits for a worker, or for its `not_before_at`
    RUNNING = "running"  # one attempt holds the lease
    PAUSING = "pausing"  # the attempt was asked to save and stop
    PAUSED = "paused"  # saved; waits for someone to resume it
    SUCCEEDED = "succeeded"  # done, with its result
    FAILED = "failed"  # the job's own fault: it said why
    CANCELLED = "cancelled"  # somebody asked for it
    DEAD = "dead"  # given up after attempts that made no progress


TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.PAUSED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset(
        {
            JobState.SUCCEEDED,
            JobState.FAILED,
            JobState.CANCELLED,
            JobState.DEAD,
            JobState.QUEUED,
            JobState.PAUSING,
        }
    ),
    JobState.PAUSING: frozenset(
        {
            JobState.PAUSED,
            JobState.SUCCEEDED,
            JobState.FAILED,
            JobState.CANCELLED,
            JobState.DEAD,
            JobState.QUEUED,
        }
    ),
    JobState.PAUSED: frozenset({JobState.QUEUED, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset({JobState.QUEUED}),  # retry asked for by a user
    JobState.CANCELLED: frozenset({JobState.QUEUED}),
    JobState.DEAD: frozenset({JobState.QUEUED}),
}

TERMINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.DEAD})
OWNED_STATES = frozenset({JobState.RUNNING, JobState.PAUSING})  # an attempt holds a lease


def sources_of(target: JobState) -> frozenset[JobState]:
    """Return all states from which `target` may be entered."""
    return frozenset(source for source, targets in TRANSITIONS.items() if target in targets)


def require_transition(source: JobState, target: JobState) -> None:
    """Return if the table allows the change.

    Raises:
        TransitionRefused: it does not.
    """
    if target not in TRANSITIONS[source]:
        allowed = ", ".join(sorted(TRANSITIONS[source])) or "nothing: it is final"
        raise TransitionRefused(f"a job that is {source} cannot become {target}; it can become {allowed}")
