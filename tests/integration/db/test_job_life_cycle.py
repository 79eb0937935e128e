"""The life cycle on real databases: one owner at a time, fenced writes, refused transitions, nothing lost."""

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import text, update
from sqlalchemy.exc import IntegrityError

from apt_jobs.db import events as event_log
from apt_jobs.db import jobs, steering
from apt_jobs.db.clock import now_plus
from apt_jobs.db.engine import Database
from apt_jobs.db.listing import list_jobs
from apt_jobs.db.models import Job
from apt_jobs.db.queues import Queue, list_queues
from apt_jobs.db.transitions import change_state, locked_job
from apt_jobs.errors import Conflict, Fenced, NotFound, TransitionRefused, Unavailable
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.jobs.states import OWNED_STATES, TERMINAL_STATES, TRANSITIONS, JobState
from tests.integration.db.steps import (
    LEASE_S,
    claim,
    due_now,
    expire_lease,
    job_of,
    running,
    state_of,
    states_in_log,
    submit,
)


def test_a_new_job_waits_and_its_first_event_says_so(database: Database) -> None:
    job_id = submit(database, name="night run", labels={"team": "nlp"})
    with database.read() as session:
        job = jobs.get_job(session, job_id)
        (event,) = event_log.events_after(session, job_id, 0, 10)
    assert (job.state, job.attempt, job.last_seq, job.labels) == ("queued", 0, 1, {"team": "nlp"})
    assert (event.seq, event.kind) == (1, "state")


def test_an_unknown_job_is_not_found(database: Database) -> None:
    with database.read() as session, pytest.raises(NotFound, match="job_nothing"):
        jobs.get_job(session, "job_nothing")
    for act in (steering.request_cancel, steering.delete_job):
        with pytest.raises(NotFound, match="job_nothing"), database.write() as session:
            act(session, "job_nothing")


def test_the_highest_priority_is_claimed_first_then_the_oldest(database: Database) -> None:
    first, second = submit(database), submit(database)
    urgent = submit(database, priority=5)
    submit(database, queue="other", priority=9)
    with database.read() as session:
        assert [jobs.queue_position(session, jobs.get_job(session, job)) for job in (urgent, first, second)] == [
            1,
            2,
            3,
        ]
    assert [claim(database).id for _ in range(3)] == [urgent, first, second]
    with database.write() as session:
        assert jobs.claim_next(session, "train", "worker-a", LEASE_S) is None
        assert jobs.queue_position(session, jobs.get_job(session, first)) is None


def test_of_many_claimers_one_wins(database: Database) -> None:
    wanted = {submit(database) for _ in range(20)}
    start = threading.Barrier(8)

    def take(number: int) -> list[str]:
        taken: list[str] = []
        start.wait()
        while True:
            with database.write() as session:
                claimed = jobs.claim_next(session, "train", f"worker-{number}", LEASE_S)
            if claimed is None:
                return taken
            taken.append(claimed.job.id)

    with ThreadPoolExecutor(8) as pool:
        taken = [job_id for part in pool.map(take, range(8)) for job_id in part]
    assert sorted(taken) == sorted(wanted)


def test_only_the_current_attempt_may_write(database: Database) -> None:
    job_id = submit(database)
    old = claim(database)
    expire_lease(database, job_id)
    with database.write() as session:
        jobs.reap_expired(session, 0)
        due_now(session, job_id)
    new = claim(database)
    assert (old.attempt, new.attempt) == (1, 2)
    writes: list[Callable[[Any], object]] = [
        lambda session: jobs.heartbeat(session, job_id, old.attempt, LEASE_S),
        lambda session: jobs.finish(session, job_id, old.attempt, JobState.SUCCEEDED),
        lambda session: event_log.append_events(session, job_id, old.attempt, [], LEASE_S),
    ]
    for write in writes:
        with pytest.raises(Fenced), database.write() as session:
            write(session)
    with database.write() as session:
        assert jobs.heartbeat(session, job_id, new.attempt, LEASE_S) == jobs.StopRequests(cancel=False, pause=False)


def test_an_attempt_whose_lease_ended_is_fenced_before_anyone_reaps(database: Database) -> None:
    job_id = submit(database)
    job = claim(database)
    expire_lease(database, job_id)
    with pytest.raises(Fenced), database.write() as session:
        jobs.heartbeat(session, job_id, job.attempt, LEASE_S)


def test_finishing_records_state_attempt_and_event_together(database: Database) -> None:
    job_id = submit(database)
    job = claim(database)
    with database.write() as session:
        (event,) = jobs.finish(session, job_id, job.attempt, JobState.SUCCEEDED, result={"step": 5})
    assert event.seq == 3
    with database.read() as session:
        ended = jobs.get_job(session, job_id)
        (attempt,) = jobs.list_attempts(session, job_id)
    assert (ended.state, ended.result, ended.lease_until) == ("succeeded", {"step": 5}, None)
    assert ended.finished_at is not None
    assert (attempt.outcome, attempt.worker) == ("succeeded", "worker-a")
    assert states_in_log(database, job_id) == ["queued", "running", "succeeded"]
    with pytest.raises(Fenced), database.write() as session:
        jobs.finish(session, job_id, job.attempt, JobState.FAILED)


def test_a_transition_outside_the_table_is_refused_and_changes_nothing(database: Database) -> None:
    job_id = submit(database)
    job = claim(database)
    with pytest.raises(TransitionRefused, match="running cannot become paused"), database.write() as session:
        jobs.finish(session, job_id, job.attempt, JobState.PAUSED)
    assert states_in_log(database, job_id) == ["queued", "running"]


@pytest.mark.parametrize("statement", ["state = 'flying'", "state = 'queued'", "lease_until = NULL", "attempt = -1"])
def test_the_database_refuses_rows_that_make_no_sense(database: Database, statement: str) -> None:
    submit(database)
    claim(database)
    with pytest.raises(IntegrityError), database.write() as session:
        session.execute(text(f"UPDATE jobs SET {statement}"))


def test_cancel_of_a_waiting_job_is_immediate_and_idempotent(database: Database) -> None:
    job_id = submit(database)
    with database.write() as session:
        job, events = steering.request_cancel(session, job_id, "changed my mind")
        again, none = steering.request_cancel(session, job_id)
    assert (job.state, again.state, len(events), none) == ("cancelled", "cancelled", 1, [])
    with database.write() as session:
        assert jobs.claim(session, job_id, "worker-a", LEASE_S) is None


def test_cancel_of_a_running_job_is_told_to_its_owner(database: Database) -> None:
    job_id = submit(database)
    job = claim(database)
    with database.write() as session:
        running, events = steering.request_cancel(session, job_id)
    assert (running.state, events) == ("running", [])
    with database.write() as session:
        assert jobs.heartbeat(session, job_id, job.attempt, LEASE_S).cancel
        assert event_log.append_events(session, job_id, job.attempt, [], LEASE_S).stop_requests.cancel


def test_a_cancelled_job_whose_worker_died_ends_as_cancelled(database: Database) -> None:
    job_id = submit(database)
    claim(database)
    with database.write() as session:
        steering.request_cancel(session, job_id)
    expire_lease(database, job_id)
    with database.write() as session:
        jobs.reap_expired(session, 0)
    assert state_of(database, job_id) == "cancelled"


@pytest.mark.parametrize("outcome", sorted(TERMINAL_STATES - {JobState.CANCELLED}))
def test_what_ended_otherwise_cannot_be_cancelled(database: Database, outcome: JobState) -> None:
    job_id = submit(database)
    job = claim(database)
    with database.write() as session:
        jobs.finish(session, job_id, job.attempt, outcome)
    with pytest.raises(Conflict, match=outcome), database.write() as session:
        steering.request_cancel(session, job_id)


def test_one_import_key_makes_one_job_however_often_and_at_once_it_is_used(database: Database) -> None:
    start = threading.Barrier(8)

    def post(_: int) -> str:
        start.wait()
        with database.write() as session:
            spec = TrainSpec(kind="train")
            return jobs.insert_job(session, spec, import_key="import:1").id

    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(post, range(8)))
    assert len(ids) == 1
    with database.read() as session:
        assert len(list_jobs(session)[0]) == 1


def test_a_full_queue_refuses_with_its_numbers(database: Database) -> None:
    submit(database)
    with pytest.raises(Unavailable, match="at most 1"), database.write() as session:
        jobs.insert_job(session, TrainSpec(kind="train"), max_queued_jobs=1)


def test_lists_are_filtered_and_paged(database: Database) -> None:
    ids = [submit(database, name=f"run {number}", labels={"n": str(number % 2)}) for number in range(5)]
    with database.read() as session:
        page, more = list_jobs(session, limit=2)
        assert ([job.id for job in page], more) == ([ids[4], ids[3]], True)
        page, more = list_jobs(session, limit=5, after=ids[3])
        assert ([job.id for job in page], more) == ([ids[2], ids[1], ids[0]], False)
        assert {job.id for job in list_jobs(session, label=("n", "1"))[0]} == {ids[1], ids[3]}
        assert [job.id for job in list_jobs(session, text="RUN 3")[0]] == [ids[3]]
        assert list_jobs(session, text="%")[0] == []
        assert list_jobs(session, states=["running"])[0] == []
        assert list_jobs(session, kinds=["generate"])[0] == []
        assert list_jobs(session, queue="other")[0] == []
        assert jobs.count_by_state(session)["queued"] == 5
        assert list_queues(session) == [Queue("train", queued=5, running=0, max_running=None, is_paused=False)]


def test_only_an_ended_job_is_deleted_and_its_log_goes_with_it(database: Database) -> None:
    job_id = submit(database)
    with pytest.raises(Conflict, match="cancel it first"), database.write() as session:
        steering.delete_job(session, job_id)
    with database.write() as session:
        steering.request_cancel(session, job_id)
        steering.delete_job(session, job_id)
    with database.read() as session:
        assert event_log.events_after(session, job_id, 0, 10) == []
        assert list_jobs(session) == ([], False)


def test_a_heartbeat_moves_the_end_of_the_lease(database: Database) -> None:
    submit(database)
    job = claim(database, lease_s=5)
    with database.write() as session:
        jobs.heartbeat(session, job.id, job.attempt, 600)
    before, after = job.lease_until, job_of(database, job.id).lease_until
    assert before is not None
    assert after is not None
    assert 590 <= (after - before).total_seconds() <= 660


@pytest.mark.parametrize("outcome", [JobState.QUEUED, JobState.CANCELLED])
def test_a_cancelled_job_is_never_handed_back_and_keeps_the_users_reason(database: Database, outcome: JobState) -> None:
    job = running(database)
    with database.write() as session:
        steering.request_cancel(session, job.id, "wrong data set")
        steering.request_cancel(session, job.id, "once more")
    with database.write() as session:
        jobs.finish(session, job.id, job.attempt, outcome, reason="the worker was drained")
    ended = job_of(database, job.id)
    assert (ended.state, ended.reason) == ("cancelled", "wrong data set")


def test_a_job_that_succeeds_before_it_can_be_stopped_has_succeeded(database: Database) -> None:
    job = running(database)
    with database.write() as session:
        steering.request_cancel(session, job.id)
        jobs.finish(session, job.id, job.attempt, JobState.SUCCEEDED)
    ended = job_of(database, job.id)
    assert (ended.state, ended.reason) == ("succeeded", None)


def test_what_a_broken_or_odd_program_says_can_be_stored(database: Database) -> None:
    job = running(database)
    odd = "a\0b \ud800 中文"
    with database.write() as session:
        error = {"message": odd, "traceback": None, "rank": 0}
        result = {"outputs": [odd], "train_loss": float("nan")}
        jobs.finish(session, job.id, 1, JobState.FAILED, reason=odd, error=error, result=result)
    ended = job_of(database, job.id)
    assert ended.reason == "a?b ? 中文"
    assert ended.error == {"message": "a\0b ? 中文", "traceback": None, "rank": 0}
    assert ended.result == {"outputs": ["a\0b ? 中文"], "train_loss": "NaN"}
    assert states_in_log(database, job.id) == ["queued", "running", "failed"]


def test_each_transition_outside_the_table_is_refused_by_the_row_too(database: Database) -> None:
    job_id = submit(database)
    for source in JobState:
        lease = now_plus(60) if source in OWNED_STATES else None
        with database.write() as session:
            session.execute(update(Job).values(state=source, lease_until=lease))
        for target in set(JobState) - TRANSITIONS[source] - OWNED_STATES:
            with (
                pytest.raises(TransitionRefused, match=f"{source} cannot become {target}"),
                database.write() as session,
            ):
                change_state(session, locked_job(session, job_id), target, None)
        assert state_of(database, job_id) == source


def test_a_change_made_from_an_outdated_row_is_refused(database: Database) -> None:
    job = running(database)
    with database.write() as session:
        jobs.finish(session, job.id, 1, JobState.SUCCEEDED)
    with pytest.raises(TransitionRefused, match="changed meanwhile"), database.write() as session:
        change_state(session, job, JobState.FAILED, None)
    assert states_in_log(database, job.id) == ["queued", "running", "succeeded"]


CLAIMER = """
import sys
from apt_jobs.db import jobs
from apt_jobs.db.engine import Database
from apt_jobs.jobs.states import JobState
database, worker = Database(sys.argv[1]), sys.argv[2]
sys.stdin.read()
while True:
    with database.write() as session:
        claimed = jobs.claim_next(session, "train", worker, 60)
    if claimed is None:
        break
    with database.write() as session:
        jobs.heartbeat(session, claimed.job.id, claimed.job.attempt, 60)
        jobs.finish(session, claimed.job.id, claimed.job.attempt, JobState.SUCCEEDED, result={"worker": worker})
    print(claimed.job.id)
"""


def test_of_many_processes_one_runs_each_job(database: Database, database_url: str) -> None:
    wanted = {submit(database) for _ in range(40)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMER, database_url, f"process-{number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    answers = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, answers
    assert sorted("".join(out for out, _ in answers).split()) == sorted(wanted)
    with database.read() as session:
        assert jobs.count_by_state(session)["succeeded"] == 40


def test_a_job_without_a_key_is_stored_each_time(database: Database) -> None:
    assert submit(database) != submit(database)


def test_the_row_that_insert_returns_is_the_row_that_is_stored(database: Database) -> None:
    with database.write() as session:
        job = jobs.insert_job(session, TrainSpec(kind="train"), import_key="k")
    stored = job_of(database, job.id)
    columns = Job.__table__.columns.keys()
    assert {name: getattr(job, name) for name in columns} == {name: getattr(stored, name) for name in columns}


def test_a_label_with_dots_and_quotes_is_found(database: Database) -> None:
    job_id = submit(database, labels={"team.nlp": "a'b"})
    with database.read() as session:
        assert [job.id for job in list_jobs(session, label=("team.nlp", "a'b"))[0]] == [job_id]
        assert list_jobs(session, label=('te"am', "a"))[0] == []
