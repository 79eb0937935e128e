"""What users ask of jobs, on both dialects: pause, resume, retry, in every state, twice, and against each other."""

import pytest

from apt_jobs.db import jobs, steering
from apt_jobs.db.engine import Database
from apt_jobs.errors import Conflict, NotFound
from apt_jobs.jobs.spec import GenerateSpec
from apt_jobs.jobs.states import TERMINAL_STATES, JobState
from tests.integration.db.steps import (
    LEASE_S,
    claim,
    expire_lease,
    job_of,
    lose_worker,
    running,
    saved,
    state_of,
    states_in_log,
    store,
    submit,
)


def pause(database: Database, job_id: str) -> str:
    with database.write() as session:
        return steering.request_pause(session, job_id)[0].state


def resume(database: Database, job_id: str) -> str:
    with database.write() as session:
        return steering.request_resume(session, job_id)[0].state


def retry(database: Database, job_id: str) -> str:
    with database.write() as session:
        return steering.request_retry(session, job_id)[0].state


def cancel(database: Database, job_id: str) -> str:
    with database.write() as session:
        return steering.request_cancel(session, job_id)[0].state


def finish(database: Database, job_id: str, outcome: JobState) -> str:
    with database.write() as session:
        jobs.finish(session, job_id, jobs.get_job(session, job_id).attempt, outcome, reason="a test")
    return state_of(database, job_id)


def in_state(database: Database, state: JobState) -> str:
    """A job that came to a state the way real ones do."""
    job_id = submit(database)
    if state is JobState.QUEUED:
        return job_id
    with database.write() as session:
        assert jobs.claim(session, job_id, "worker-a", LEASE_S)
    if state in (JobState.PAUSING, JobState.PAUSED):
        pause(database, job_id)
    if state not in (JobState.RUNNING, JobState.PAUSING):
        if state is JobState.CANCELLED:
            cancel(database, job_id)
        finish(database, job_id, state)
    return job_id


def test_a_waiting_job_is_paused_at_once_and_claimed_by_nobody(database: Database) -> None:
    job_id = submit(database)
    assert [pause(database, job_id), pause(database, job_id)] == ["paused", "paused"]
    with database.write() as session:
        assert jobs.claim_next(session, "train", "worker-a", LEASE_S) is None
    assert [resume(database, job_id), resume(database, job_id)] == ["queued", "queued"]
    assert claim(database).id == job_id
    assert states_in_log(database, job_id) == ["queued", "paused", "queued", "running"]


def test_a_running_training_keeps_its_lease_until_it_has_saved(database: Database) -> None:
    job = running(database)
    assert [pause(database, job.id), pause(database, job.id)] == ["pausing", "pausing"]
    with database.write() as session:
        assert jobs.heartbeat(session, job.id, job.attempt, LEASE_S) == jobs.StopRequests(cancel=False, pause=True)
    assert store(database, job, saved("a", step=7)).stop_requests.pause
    assert finish(database, job.id, JobState.PAUSED) == "paused"
    assert job_of(database, job.id).lease_until is None
    assert resume(database, job.id) == "queued"
    assert claim(database).attempt == 2


def test_a_pausing_job_may_end_before_it_pauses(database: Database) -> None:
    job_id = in_state(database, JobState.PAUSING)
    assert finish(database, job_id, JobState.SUCCEEDED) == "succeeded"


def test_a_pausing_job_that_is_handed_back_or_lost_is_paused(database: Database) -> None:
    drained = in_state(database, JobState.PAUSING)
    assert finish(database, drained, JobState.QUEUED) == "paused"
    lost = in_state(database, JobState.PAUSING)
    expire_lease(database, lost)
    with database.write() as session:
        assert jobs.reap_expired(session, 0)
    assert state_of(database, lost) == "paused"


def test_cancel_wins_over_pause(database: Database) -> None:
    job_id = in_state(database, JobState.PAUSING)
    assert cancel(database, job_id) == "pausing"
    assert finish(database, job_id, JobState.PAUSED) == "cancelled"
    job_id = in_state(database, JobState.RUNNING)
    cancel(database, job_id)
    with pytest.raises(Conflict, match="is being cancelled"):
        pause(database, job_id)
    job_id = in_state(database, JobState.PAUSED)
    assert cancel(database, job_id) == "cancelled"


def test_a_generation_is_not_paused_in_the_middle(database: Database) -> None:
    with database.write() as session:
        job_id = jobs.insert_job(session, GenerateSpec(kind="generate", texts=["a"])).id
    claim(database, "generate")
    with pytest.raises(Conflict, match="cannot stop in the middle"):
        pause(database, job_id)


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED, JobState.DEAD])
def test_a_retried_job_has_all_its_attempts_again(database: Database, state: JobState) -> None:
    job_id = in_state(database, state)
    assert [retry(database, job_id), retry(database, job_id)] == ["queued", "queued"]
    job = job_of(database, job_id)
    assert (job.finished_at, job.cancel_requested_at, job.error, job.num_job_faults) == (None, None, None, 0)
    assert claim(database).attempt == 2
    assert finish(database, job_id, JobState.SUCCEEDED) == "succeeded"


def test_a_dead_job_that_is_retried_may_break_again(database: Database) -> None:
    job_id = submit(database, max_attempts=1)
    for number in (1, 2):
        claim(database)
        with database.write() as session:
            jobs.finish_faulted(session, job_id, number, "a rank died")
        assert state_of(database, job_id) == "dead"
        retry(database, job_id)


@pytest.mark.parametrize("state", list(JobState))
def test_every_request_in_every_state_is_done_or_refused_in_words(database: Database, state: JobState) -> None:
    allowed = {
        pause: {JobState.QUEUED, JobState.RUNNING, JobState.PAUSING, JobState.PAUSED},
        resume: {JobState.QUEUED, JobState.PAUSED},
        retry: {JobState.QUEUED, JobState.FAILED, JobState.CANCELLED, JobState.DEAD},
        cancel: set(JobState) - TERMINAL_STATES | {JobState.CANCELLED},
    }
    for request, states in allowed.items():
        job_id = in_state(database, state)
        if state in states:
            request(database, job_id)
            continue
        with pytest.raises(Conflict, match=f"is {state}"):
            request(database, job_id)
        assert state_of(database, job_id) == state


def test_requests_for_an_unknown_job_are_not_found(database: Database) -> None:
    for request in (pause, resume, retry, cancel):
        with pytest.raises(NotFound, match="job_nothing"):
            request(database, "job_nothing")


def test_a_lost_attempt_and_a_retry_count_apart(database: Database) -> None:
    job = running(database)
    lose_worker(database, job.id)
    claim(database)
    finish(database, job.id, JobState.FAILED)
    retry(database, job.id)
    assert job_of(database, job.id).num_job_faults == 0
    assert claim(database).attempt == 3
