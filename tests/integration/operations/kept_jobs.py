"""Jobs that ended some days ago, with checkpoints, run folders and files, as retention finds them."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import update

from apt_jobs.artifacts.runs import run_dir
from apt_jobs.db.clock import now_plus
from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import claim, finish, insert_job
from apt_jobs.db.models import Job
from apt_jobs.events.kinds import CheckpointSaved, Event, LineLogged
from apt_jobs.jobs.ids import new_checkpoint_id
from apt_jobs.jobs.spec import parse_spec
from apt_jobs.jobs.states import JobState
from apt_jobs.settings import Settings
from tests.integration.db.steps import LEASE_S, store

SIZE_BYTES = 1_000  # of each checkpoint, as its row says


def kept_job(
    database: Database,
    settings: Settings,
    *,
    days: float | None,
    losses: Mapping[int, float | None] | None = None,
    state: JobState = JobState.SUCCEEDED,
    **fields: Any,
) -> str:
    """Return the id of a job with a checkpoint at each step of `losses`; it ended `days` ago, or goes on (None)."""
    with database.write() as session:
        job_id = insert_job(session, parse_spec({"kind": "train", **fields})).id
        assert claim(session, job_id, "worker", LEASE_S) is not None
    run_dir(settings, job_id, 1).mkdir(parents=True)
    (run_dir(settings, job_id, 1) / "stdout.log").write_text("a line")
    events: list[Event] = [LineLogged("info", "rank 0", "a line"), LineLogged("warning", "rank 0", "a warning")]
    losses = losses or {}
    best = min((loss for loss in losses.values() if loss is not None), default=None)
    for step, loss in losses.items():
        folder = settings.checkpoints_dir / job_id / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
        is_best = loss is not None and loss == best
        name = f"{job_id}/step-{step}"
        events.append(CheckpointSaved(new_checkpoint_id(), name, step, 0, loss, None, SIZE_BYTES, is_best))
    store(database, Job(id=job_id, attempt=1), *events)
    if days is not None:
        with database.write() as session:
            finish(session, job_id, 1, state)
        ended(database, job_id, days)
    return job_id


def ended(database: Database, job_id: str, days: float) -> None:
    """Let a job that has ended have done so `days` ago."""
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(finished_at=now_plus(-days * 86_400.0)))
