"""A real Celery worker whose jobs are cheap: it claims, beats and writes as a supervisor does, without any torch.

It never stops by itself when its lease is lost, so that only the database's fence stands between it and the history.
With APT_JOBS_TEST_NO_FENCE=1 that is removed, too: then the judge has to find what it wrote. With
APT_JOBS_TEST_LACKS set to a reason it hands back every job, as a machine without GPUs would. With
APT_JOBS_TEST_DIES_ON_WAKE_UP=1 it ends as soon as it was woken or saw a due job, before it claims any.
"""

import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import update
from sqlalchemy.orm import Session

from apt_jobs.db import jobs
from apt_jobs.db.events import append_events
from apt_jobs.db.hand_backs import hand_back
from apt_jobs.db.jobs import Claimed, StopRequests
from apt_jobs.db.models import Job
from apt_jobs.errors import Fenced, OutOfSpace, Unavailable
from apt_jobs.events.kinds import CheckpointSaved, StepTrained
from apt_jobs.jobs.ids import new_checkpoint_id
from apt_jobs.jobs.retry import retry_rules
from apt_jobs.jobs.states import JobState
from apt_jobs.logs import configure_logging
from apt_jobs.settings import Settings
from apt_jobs.supervision.lease import LeaseKeeper
from apt_jobs.workers.consumer import Consumer

STEP_S = 0.05


def serve(consumer: Consumer, claimed: Claimed) -> None:
    job, settings = claimed.job, consumer.settings
    with LeaseKeeper(
        consumer.database, job.id, job.attempt, lease_s=settings.lease_s, heartbeat_s=settings.heartbeat_s
    ):
        for step in range(int(job.labels["steps"])):
            event = StepTrained(step + 1, 0, float(job.labels.get("loss", "1")), 0.1, 1.0, 1000 * STEP_S, 1.0)
            checkpoint_id = new_checkpoint_id()
            saved = CheckpointSaved(checkpoint_id, f"{job.id}/{checkpoint_id}", step + 1, 0, None, None, 1, False)
            while (asked := stored(consumer, job, [event, saved])) is None:
                time.sleep(STEP_S)
            if asked.cancel:
                end(consumer, job, JobState.CANCELLED)
                return
            time.sleep(STEP_S)
        end(consumer, job, JobState.SUCCEEDED)


def stored(consumer: Consumer, job: Job, events: list[Any]) -> StopRequests | None:
    """Store events; None: the database has to be asked again. Raises `Fenced` when the job is another's."""
    now = datetime.now(UTC)
    timed = [(now, event) for event in events]
    try:
        with consumer.database.write() as session:
            return append_events(session, job.id, job.attempt, timed, consumer.settings.lease_s).stop_requests
    except (Unavailable, OutOfSpace):
        return None


def end(consumer: Consumer, job: Job, outcome: JobState) -> None:
    while not finished(consumer, job, outcome):
        time.sleep(STEP_S)


def finished(consumer: Consumer, job: Job, outcome: JobState) -> bool:
    try:
        with consumer.database.write() as session:
            jobs.finish(session, job.id, job.attempt, outcome)
    except Unavailable:
        return False
    return True


def owned_by_anybody(session: Session, job_id: str, attempt: int, **values: Any) -> Job:
    """`transitions.owned_job` without its conditions."""
    changed = session.scalars(
        update(Job)
        .where(Job.id == job_id)
        .values(**(values or {"lease_until": Job.lease_until}))
        .returning(Job)
        .execution_options(synchronize_session=False, populate_existing=True)
    ).one()
    session.expunge(changed)  # a copy that carries the writer's own attempt
    changed.attempt = attempt
    return changed


def die(_consumer: Consumer) -> None:
    os._exit(1)


def work(name: str, *queues: str) -> None:
    """Until killed."""
    if os.environ.get("APT_JOBS_TEST_DIES_ON_WAKE_UP") == "1":
        Consumer._serve_due = die  # type: ignore[method-assign, assignment]  # breaks the class under test
    if os.environ.get("APT_JOBS_TEST_NO_FENCE") == "1":
        jobs.owned_job = owned_by_anybody  # type: ignore[attr-defined]  # breaks the module under test
    settings = Settings()
    configure_logging("WARNING")
    lacks = os.environ.get("APT_JOBS_TEST_LACKS")

    def carry(group: Sequence[Claimed]) -> None:
        [claimed] = group
        consumer.publisher.publish(claimed.job.id, [claimed.event])
        try:
            if lacks is not None:
                with consumer.database.write() as session:
                    hand_back(session, claimed.job.id, claimed.job.attempt, lacks, retry_rules(settings))
                return
            serve(consumer, claimed)
        except Fenced:
            return

    consumer = Consumer(
        settings,
        name=name,
        kind="train",
        queues=queues or ("train",),
        concurrency=1,
        serve=carry,
        on_drain=lambda: None,
        describe_gpus=lambda: [],
    )
    consumer.run()
