"""Delete an ended job: its rows in one transaction, then its checkpoints and run folders."""

from apt_jobs.artifacts.checkpoints import checkpoints_of_job
from apt_jobs.artifacts.folders import try_to_delete_folder
from apt_jobs.artifacts.runs import runs_of_job
from apt_jobs.db.engine import Database
from apt_jobs.db.steering import delete_job as delete_job_rows
from apt_jobs.settings import Settings


def delete_job(database: Database, settings: Settings, job_id: str) -> None:
    """Delete a job with its log, its checkpoints and its files.

    Raises:
        NotFound: there is no such job.
        Conflict: it has not ended.
    """
    with database.write() as session:
        delete_job_rows(session, job_id)
    for folder in (checkpoints_of_job(settings, job_id), runs_of_job(settings, job_id)):
        try_to_delete_folder(folder)
