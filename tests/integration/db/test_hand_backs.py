"""What a worker lacks fails no job: it is handed back, kept off that worker, and the worker stops in time."""

from typing import Any

import pytest
from sqlalchemy import update

from apt_jobs.backoff import Backoff
from apt_jobs.db import jobs, steering
from apt_jobs.db.clock import now_plus
from apt_jobs.db.engine import Database
from apt_jobs.db.hand_backs import forgive_worker, hand_back, hand_backs_of
from apt_jobs.db.models import HandBack, WorkerRow
from apt_jobs.db.workers import pause_of, record_worker
from apt_jobs.errors import Fenced
from apt_jobs.jobs.retry import RetryRules
from apt_jobs.jobs.states import JobState
from tests.integration.db.steps import LEASE_S, job_of, state_of, submit

WORKER: dict[str, Any] = {"kind": "train", "queues": ["train"], "hostname": "here", "version": "1", "gpus": []}


def record(database: Database, name: str, pid: int = 1) -> None:
    with database.write() as session:
        record_worker(session, **WORKER, name=name, pid=pid, current_job_id=None)


def take(database: Database, worker: str) -> jobs.Claimed | None:
    with database.write() as session:
        return jobs.claim_next(session, "train", worker, LEASE_S)


def give_back(database: Database, worker: str, reason: str = "no disk", rules: RetryRules | None = None) -> str:
    claimed = take(database, worker)
    assert claimed is not None
    with database.write() as session:
        hand_back(session, claimed.job.id, claimed.job.attempt, reason, rules)
    return claimed.job.id


def let_time_pass(database: Database) -> None:
    with database.write() as session:
        session.execute(update(HandBack).values(until_at=now_plus(-1)))
        session.execute(update(WorkerRow).values(paused_until_at=now_plus(-1)))


def test_a_job_that_was_handed_back_waits_for_another_worker_and_counts_no_fault(database: Database) -> None:
    record(database, "bad")
    job_id = submit(database, max_attempts=1)
    assert give_back(database, "bad", "no GPU") == job_id
    job = job_of(database, job_id)
    assert (job.state, job.reason) == ("queued", "handed back by bad: no GPU")
    assert (job.num_job_faults, job.num_infrastructure_faults, job.error) == (0, 0, None)
    assert take(database, "bad") is None
    claimed = take(database, "good")
    assert claimed is not None
    assert claimed.job.id == job_id


def test_other_jobs_of_the_queue_are_still_given_to_the_worker(database: Database) -> None:
    first, second = submit(database), submit(database)
    assert give_back(database, "a") == first
    claimed = take(database, "a")
    assert claimed is not None
    assert claimed.job.id == second


def test_a_job_is_kept_off_longer_each_time_up_to_a_bound(database: Database) -> None:
    submit(database)
    rules = RetryRules(hand_back=Backoff(30.0, 100.0), max_hand_backs=100)
    waits = []
    for _ in range(4):
        job_id = give_back(database, "a", rules=rules)
        with database.read() as session:
            row = session.get(HandBack, (job_id, "a"))
            assert row is not None
            waits.append(round((row.until_at - session.scalars(now_plus(0).select()).one()).total_seconds(), -1))
        let_time_pass(database)
    assert waits == [30.0, 60.0, 100.0, 100.0]


def test_a_worker_that_hands_back_three_in_a_row_stops_and_says_why_then_tries_again(database: Database) -> None:
    record(database, "bad")
    for _ in range(5):
        submit(database)
    for number in range(3):
        give_back(database, "bad", f"no disk {number}")
    with database.read() as session:
        assert pause_of(session, "bad") == "handed back 3 jobs in a row; the last one: no disk 2"
    assert take(database, "bad") is None
    assert take(database, "good") is not None
    let_time_pass(database)
    with database.read() as session:
        assert pause_of(session, "bad") is None
    give_back(database, "bad", "no disk 3")  # one is enough now
    with database.read() as session:
        assert pause_of(session, "bad") == "handed back 4 jobs in a row; the last one: no disk 3"


@pytest.mark.parametrize("outcome", [JobState.SUCCEEDED, JobState.FAILED, JobState.QUEUED])
def test_an_attempt_that_gets_further_begins_the_row_again(database: Database, outcome: JobState) -> None:
    record(database, "a")
    for _ in range(5):
        submit(database)
    for _ in range(2):
        give_back(database, "a")
    claimed = take(database, "a")
    assert claimed is not None
    with database.write() as session:
        jobs.finish(session, claimed.job.id, claimed.job.attempt, outcome)
        assert hand_backs_of(session, [claimed.job.id]) == {}
    for _ in range(2):
        give_back(database, "a")
    with database.read() as session:
        assert pause_of(session, "a") is None


def test_jobs_that_nobody_can_run_do_not_starve_the_others(database: Database) -> None:
    """A worker that tries again after its pause takes first what it has not handed back yet."""
    record(database, "a")
    bad = [submit(database, priority=50) for _ in range(3)]
    assert [give_back(database, "a") for _ in range(3)] == bad
    good = submit(database)
    let_time_pass(database)
    claimed = take(database, "a")
    assert claimed is not None
    assert claimed.job.id == good


def test_a_worker_that_somebody_resumes_is_offered_everything_at_once(database: Database) -> None:
    record(database, "a")
    submit(database)
    give_back(database, "a", rules=RetryRules(max_hand_backs=1))
    assert take(database, "a") is None
    with database.write() as session:
        forgive_worker(session, "a")
        assert pause_of(session, "a") is None
    assert take(database, "a") is not None


def test_a_worker_that_was_started_again_is_not_paused(database: Database) -> None:
    record(database, "a")
    submit(database)
    give_back(database, "a", rules=RetryRules(max_hand_backs=1))
    record(database, "a", pid=2)
    with database.read() as session:
        assert pause_of(session, "a") is None


def test_a_cancelled_job_that_is_handed_back_is_cancelled(database: Database) -> None:
    job_id = submit(database)
    claimed = take(database, "a")
    assert claimed is not None
    with database.write() as session:
        steering.request_cancel(session, job_id)
        hand_back(session, job_id, claimed.job.attempt, "no disk")
    assert state_of(database, job_id) == "cancelled"


def test_only_the_owner_hands_a_job_back(database: Database) -> None:
    job_id = submit(database)
    take(database, "a")
    with pytest.raises(Fenced), database.write() as session:
        hand_back(session, job_id, 7, "no disk")
    assert state_of(database, job_id) == "running"


def test_a_reason_of_any_origin_is_kept(database: Database) -> None:
    submit(database)
    job_id = give_back(database, "a", "\0" + "x" * 5_000 + "\ud800")
    with database.read() as session:
        assert hand_backs_of(session, [job_id])[job_id]["a"].startswith("?xxx")


def test_a_worker_claims_only_jobs_of_its_kind(database: Database) -> None:
    job_id = submit(database)
    with database.write() as session:
        assert jobs.claim_next(session, "train", "a", LEASE_S, "generate") is None
        claimed = jobs.claim_next(session, "train", "a", LEASE_S, "train")
    assert claimed is not None
    assert claimed.job.id == job_id
