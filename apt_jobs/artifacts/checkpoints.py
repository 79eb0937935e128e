"""Checkpoints: from a row to its folder, and their deletion. The row is the commit point, the folder follows.

The folder's name was chosen by a rank: it is never trusted with a path.
"""

from pathlib import Path

from sqlalchemy.orm import Session

from apt_jobs.artifacts.folders import try_to_delete_folder
from apt_jobs.artifacts.manifest import has_manifest
from apt_jobs.artifacts.paths import inside
from apt_jobs.db.checkpoints import delete_checkpoint_row, get_checkpoint, newest_of_job
from apt_jobs.db.events import append_service_event
from apt_jobs.db.jobs import get_job
from apt_jobs.db.models import Checkpoint
from apt_jobs.db.service_values import DEFAULT_MODEL, get_value, set_value
from apt_jobs.errors import Conflict
from apt_jobs.events.kinds import CheckpointRemoved
from apt_jobs.jobs.states import TERMINAL_STATES
from apt_jobs.settings import Settings


def checkpoint_dir(settings: Settings, filename: str) -> Path | None:
    """Return the folder of a row's `filename`, which may not exist; None: it is not below the checkpoints."""
    return inside(settings.checkpoints_dir, filename)


def complete_checkpoint_dir(settings: Settings, filename: str) -> Path | None:
    """Return the folder of a checkpoint that was written to its end and is on this machine; None: it is not."""
    folder = checkpoint_dir(settings, filename)
    return folder if folder is not None and has_manifest(folder) else None


def checkpoints_of_job(settings: Settings, job_id: str) -> Path:
    """Return the folder in which the checkpoints of a job appear.

    Raises:
        ValueError: the id is no name of a folder.
    """
    folder = inside(settings.checkpoints_dir, job_id)
    if folder is None:
        raise ValueError(f"{job_id!r} is no id of a job")
    return folder


def delete_checkpoint(session: Session, checkpoint_id: str) -> Checkpoint:
    """Unregister a checkpoint and note it in the job's log; `delete_checkpoint_files` comes after the commit.

    Raises:
        NotFound: there is no such checkpoint.
        Conflict: its job has not ended and would resume from it.
    """
    row = get_checkpoint(session, checkpoint_id)
    job = get_job(session, row.job_id)
    newest = newest_of_job(session, job.id)
    if job.state not in TERMINAL_STATES and newest is not None and newest.id == row.id:
        raise Conflict(f"job {job.id} is {job.state} and would resume from this checkpoint; cancel the job first")
    if get_value(session, DEFAULT_MODEL) == row.id:
        set_value(session, DEFAULT_MODEL, None)
    delete_checkpoint_row(session, checkpoint_id)
    append_service_event(session, job.id, CheckpointRemoved(checkpoint_id, "deleted by a user"))
    return row


def delete_checkpoint_files(settings: Settings, filename: str) -> None:
    """Delete the folder of a checkpoint that is registered no more, unless its name leads elsewhere."""
    folder = checkpoint_dir(settings, filename)
    if folder is not None:
        try_to_delete_folder(folder)
