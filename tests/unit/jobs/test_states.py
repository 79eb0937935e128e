"""The transition table: what it allows, refuses and must never allow."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_jobs.errors import TransitionRefused
from apt_jobs.jobs.states import OWNED_STATES, TERMINAL_STATES, TRANSITIONS, JobState, require_transition, sources_of

STATES = st.sampled_from(list(JobState))


def test_every_state_has_a_row() -> None:
    assert set(TRANSITIONS) == set(JobState)


@given(STATES, STATES)
def test_sources_are_the_inverse_of_the_table(source: JobState, target: JobState) -> None:
    assert (source in sources_of(target)) == (target in TRANSITIONS[source])


@given(STATES, STATES)
def test_a_change_outside_the_table_is_refused_by_name(source: JobState, target: JobState) -> None:
    if target in TRANSITIONS[source]:
        require_transition(source, target)
        return
    with pytest.raises(TransitionRefused, match=f"{source} cannot become {target}"):
        require_transition(source, target)


@given(STATES)
def test_no_state_follows_itself(state: JobState) -> None:
    assert state not in TRANSITIONS[state]


@given(st.lists(STATES, max_size=30))
def test_only_a_claim_makes_a_job_run(path: list[JobState]) -> None:
    state = JobState.QUEUED
    for target in path:
        if target in TRANSITIONS[state]:
            assert target is not JobState.RUNNING or state is JobState.QUEUED
            state = target


def test_a_finished_job_runs_again_only_by_way_of_the_queue() -> None:
    for state in TERMINAL_STATES:
        assert TRANSITIONS[state] <= {JobState.QUEUED}


def test_success_is_final() -> None:
    assert not TRANSITIONS[JobState.SUCCEEDED]


def test_every_state_is_reachable_from_the_queue() -> None:
    reached = {JobState.QUEUED}
    while more := {target for state in reached for target in TRANSITIONS[state]} - reached:
        reached |= more
    assert reached == set(JobState)


def test_a_job_that_an_attempt_owns_is_not_finished() -> None:
    assert not OWNED_STATES & TERMINAL_STATES
