"""Counts of jobs by queue and state: they are what counting finds, whatever changed the jobs."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from sqlalchemy import delete, func, select, text, update
from sqlalchemy.orm import Session

from apt_jobs.db import jobs, steering
from apt_jobs.db.engine import Database
from apt_jobs.db.job_counts import JobCount, fold_counts, job_counts, num_in_states
from apt_jobs.db.job_edits import edit_job
from apt_jobs.db.models import Job
from apt_jobs.db.queues import list_queues
from apt_jobs.db.upgrade import upgrade_database
from apt_jobs.errors import AptJobsError
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.jobs.states import JobState
from tests.integration.db.steps import LEASE_S, submit

QUEUES = ("a", "b", "c")
NUM_STEPS = 150  # of each of the threads


def counted(session: Session) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    query = select(Job.queue, Job.state, func.count()).group_by(Job.queue, Job.state)
    for queue, state, number in session.execute(query):
        found.setdefault(queue, {})[state] = number
    return found


def require_equal(database: Database) -> None:
    with database.read() as session:
        assert job_counts(session) == counted(session)


def one_step(database: Database, chance: random.Random) -> None:
    """Do one of all things that change the state or the queue of a job, or roll it back."""
    with database.read() as session:
        ids = list(session.scalars(select(Job.id)))
    job_id = chance.choice(ids) if ids else "job_none"
    queue = chance.choice(QUEUES)
    outcome = chance.choice([JobState.SUCCEEDED, JobState.FAILED, JobState.QUEUED])

    def claim_and_finish(session: Session) -> None:
        claimed = jobs.claim_next(session, queue, f"worker-{chance.random()}", LEASE_S)
        if claimed is not None and chance.random() < 0.7:
            jobs.finish(session, claimed.job.id, claimed.job.attempt, outcome)

    steps: list[Callable[[Session], object]] = [
        lambda session: jobs.insert_job(session, TrainSpec(kind="train", queue=queue)),
        lambda session: jobs.insert_job(session, TrainSpec(kind="train", queue=queue)),
        claim_and_finish,
        claim_and_finish,
        lambda session: steering.request_cancel(session, job_id),
        lambda session: steering.request_pause(session, job_id),
        lambda session: steering.request_resume(session, job_id),
        lambda session: steering.request_retry(session, job_id),
        lambda session: steering.delete_job(session, job_id),
        lambda session: edit_job(session, job_id, {"queue": queue}, lambda _: None),
        lambda session: session.execute(update(Job).values(priority=1)),  # nothing that is counted
        fold_counts,
    ]
    with suppress(AptJobsError, InterruptedError), database.write() as session:
        chance.choice(steps)(session)
        if chance.random() < 0.1:
            raise InterruptedError  # rolled back


def test_counts_are_what_counting_finds_after_random_transitions(database: Database) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")

    def run(number: int) -> None:
        chance = random.Random(seed + number)
        for _ in range(NUM_STEPS):
            one_step(database, chance)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, range(3)))
    require_equal(database)
    with database.write() as session:
        num_rows = fold_counts(session)
        assert num_rows > 0
    require_equal(database)
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(JobCount)) == sum(
            len(states) for states in counted(session).values()
        )
        assert num_in_states(session, [JobState.QUEUED]) == jobs.count_by_state(session)["queued"]


def test_queues_without_jobs_are_not_listed(database: Database) -> None:
    job_id = submit(database, queue="gone")
    with database.write() as session:
        assert [queue.name for queue in list_queues(session)] == ["gone"]
        steering.request_cancel(session, job_id)
        steering.delete_job(session, job_id)
        assert list_queues(session) == []


def test_lost_triggers_come_back_with_the_right_counts(database: Database) -> None:
    """As when a later migration rebuilds the table on SQLite."""
    submit(database, queue="before")
    where = "" if database.dialect == "sqlite" else " ON jobs"
    with database.write() as session:
        session.execute(text(f"DROP TRIGGER job_counts_of_insert{where}"))
    submit(database, queue="unseen")
    with database.write() as session:
        session.execute(delete(Job).where(Job.queue == "before"))
    upgrade_database(database)
    require_equal(database)
    submit(database, queue="after")
    require_equal(database)
    with database.read() as session:
        assert job_counts(session) == {"unseen": {"queued": 1}, "after": {"queued": 1}}
