"""What a claimed job waits for that another scheduler has not started."""

from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import claim, insert_job
from apt_jobs.db.workers import record_worker
from apt_jobs.jobs.packing import Held, Offer, RoomReport
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.operations.waiting import waiting_of, waiting_of_page

WORDS = "starting: pending in Slurm as job 7, reason: Resources"


def test_a_claimed_job_says_what_its_worker_noted(database: Database) -> None:
    with database.write() as session:
        jobs = [insert_job(session, TrainSpec(kind="train")) for _ in range(3)]
        pending, started, _ = (job.id for job in jobs)
        for job_id in (pending, started):
            claim(session, job_id, "slurm", 60.0)
        held = ((pending, Held(waiting_for=WORDS)), (started, Held()))
        report = RoomReport(8, 8.0, Offer().max_jobs, 4, 2, held)
        record_worker(
            session,
            name="slurm",
            kind="train",
            queues=["train"],
            hostname="h",
            pid=1,
            version="1",
            gpus=[],
            current_job_id=pending,
            room=report.as_document(),
        )
    with database.read() as session:
        alone = {job.id: waiting_of(session, session.merge(job), 60.0) for job in jobs}
        page = waiting_of_page(session, [session.merge(job) for job in jobs], 60.0)
        claimed_only = waiting_of_page(session, [session.merge(job) for job in jobs[:2]], 60.0)
    found = alone[pending]
    assert found is not None
    assert (found.reason, found.position) == (WORDS, None) == (page[pending].reason, page[pending].position)
    assert alone[started] is None
    assert set(page) == {pending, jobs[2].id}
    assert set(claimed_only) == {pending}
