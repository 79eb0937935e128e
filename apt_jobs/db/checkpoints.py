"""The registry of checkpoints. A row is the commit point: a folder without one does not count."""

from sqlalchemy import and_, delete, exists, or_, select
from sqlalchemy.orm import Session

from apt_jobs.db.models import Checkpoint, Job
from apt_jobs.errors import NotFound
from apt_jobs.jobs.states import TERMINAL_STATES, JobState


def list_checkpoints(
    session: Session, *, job_id: str | None = None, after: str | None = None, limit: int = 100
) -> tuple[list[Checkpoint], bool]:
    """Return jobs, the newest first; `after` is the last id seen. Returns the page and whether there is more."""
    query = select(Checkpoint).order_by(Checkpoint.id.desc()).limit(limit + 1)
    if job_id is not None:
        query = query.where(Checkpoint.job_id == job_id)
    if after is not None:
        query = query.where(Checkpoint.id < after)
    rows = list(session.scalars(query))
    return rows[:limit], len(rows) > limit


def get_checkpoint(session: Session, checkpoint_id: str) -> Checkpoint:
    """Return one row.

    Raises:
        NotFound: there is no such checkpoint.
    """
    checkpoint = session.get(Checkpoint, checkpoint_id, populate_existing=True)
    if checkpoint is None:
        raise NotFound(f"no checkpoint {checkpoint_id!r}")
    return checkpoint


def hold_checkpoint(session: Session, checkpoint_id: str) -> None:
    """Keep a checkpoint from being deleted until this transaction, which names it in a new row, has ended."""
    held = select(Checkpoint.id).where(Checkpoint.id == checkpoint_id)
    session.execute(held.with_for_update(read=True, key_share=True)).all()


def newest_checkpoint(session: Session) -> Checkpoint | None:
    """Return the checkpoint that was registered last, of any job."""
    return session.scalar(select(Checkpoint).order_by(Checkpoint.created_at.desc(), Checkpoint.id.desc()).limit(1))


def newest_of_job(session: Session, job_id: str) -> Checkpoint | None:
    """Return the checkpoint to resume a job from: its furthest step."""
    query = select(Checkpoint).where(Checkpoint.job_id == job_id)
    return session.scalar(query.order_by(Checkpoint.step.desc(), Checkpoint.attempt.desc()).limit(1))


def best_of_job(session: Session, job_id: str) -> Checkpoint | None:
    """Return the checkpoint marked best; when that one was deleted, the lowest validation loss of the others."""
    order = (Checkpoint.is_best.desc(), Checkpoint.val_loss.asc().nulls_last(), Checkpoint.step.desc())
    return session.scalar(select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(*order).limit(1))


def needed_by(session: Session, job_id: str) -> tuple[str, str] | None:
    """Return another job that needs a checkpoint of this one, and its state; None: there is none.

    It needs it while it has not ended, or as the base of an adapter that it has saved.
    """
    of_this = select(Checkpoint.id).where(Checkpoint.job_id == job_id)
    named = or_(Job.spec["base_model"].as_string().in_(of_this), Job.spec["model"].as_string().in_(of_this))
    by_job = Job.spec["model"].as_string().startswith(job_id, autoescape=True)  # as `job_...@best`
    has_adapter = and_(
        Job.spec["training"]["lora"]["r"].as_string().is_not(None), exists().where(Checkpoint.job_id == Job.id)
    )
    lives = and_(Job.state.not_in(TERMINAL_STATES), or_(named, by_job))
    query = select(Job.id, Job.state).where(Job.id != job_id, or_(lives, and_(has_adapter, named))).limit(1)
    row = session.execute(query).one_or_none()
    return None if row is None else (row.id, row.state)


def model_of_job(session: Session, job_id: str) -> Checkpoint | None:
    """Return the checkpoint that the id of a job names: its furthest, or its best if it ended and asked for that."""
    job = session.get(Job, job_id)
    if job is not None and job.state == JobState.SUCCEEDED and wants_best(job):
        return best_of_job(session, job_id)
    return newest_of_job(session, job_id)


def wants_best(job: Job) -> bool:
    """Return whether the best checkpoint of a job is its model when it has ended."""
    return bool(job.spec.get("training", {}).get("load_best_model_at_end"))


def checkpoint_at_step(session: Session, job_id: str, step: int) -> Checkpoint | None:
    """Return the checkpoint that the last attempt saved at a step."""
    query = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.step == step)
    return session.scalar(query.order_by(Checkpoint.attempt.desc()).limit(1))


def delete_checkpoint_row(session: Session, checkpoint_id: str) -> Checkpoint:
    """Remove the row and return it: a part of `artifacts/checkpoints.py`'s deletion.

    Raises:
        NotFound: there is no such checkpoint.
    """
    checkpoint = get_checkpoint(session, checkpoint_id)
    session.execute(
        delete(Checkpoint).where(Checkpoint.id == checkpoint_id).execution_options(synchronize_session=False)
    )
    return checkpoint
