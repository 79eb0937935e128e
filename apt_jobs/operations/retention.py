"""Apply a retention policy: what would go (`preview`), and its removal (`apply_retention`), in bounded steps.

Rows go first, in one transaction for some jobs, and files after the commit: no row ever names a file that is gone. What
a killed process leaves is files without rows, which operations/sweep_orphans.py removes after a grace.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from apt_jobs.artifacts.checkpoints import checkpoints_of_job, delete_checkpoint_files
from apt_jobs.artifacts.folders import try_to_delete_folder
from apt_jobs.artifacts.runs import runs_of_job
from apt_jobs.db import retention as rows
from apt_jobs.db.engine import Database
from apt_jobs.db.job_counts import num_in_states
from apt_jobs.db.retention import EndedJob, ended_jobs
from apt_jobs.db.retention_needs import Needed, needed_by_adapters, needed_now
from apt_jobs.db.service_values import get_value, set_value
from apt_jobs.errors import Conflict
from apt_jobs.folder_lock import FolderLock
from apt_jobs.jobs.states import TERMINAL_STATES
from apt_jobs.operations.data_directory import DATA_ID, why_wrong_directory
from apt_jobs.operations.sweep_orphans import sweep_orphans_if_due
from apt_jobs.retention_policy import RetentionPolicy
from apt_jobs.settings import Settings

logger = logging.getLogger(__name__)

MAX_JOBS = 1_000  # removed by one run, unless it is told otherwise
JOBS_AT_ONCE = 50  # in one transaction
EVENTS_AT_ONCE = 50_000  # of its jobs: a transaction on SQLite holds up all other writers
MAX_EXAMPLES = 20
CHECKPOINTS_UNTIL, RUNS_UNTIL, LOGS_UNTIL = "retention_checkpoints", "retention_runs", "retention_logs"


@dataclass(slots=True)
class Removed:
    """What a run removed, or a preview would."""

    num_jobs: int = 0
    num_checkpoints: int = 0
    num_bytes: int = 0  # of checkpoints
    num_run_folders: int = 0
    num_log_lines: int = 0
    num_workers: int = 0
    num_keys: int = 0
    num_sessions: int = 0
    num_orphans: int = 0  # folders without a row
    job_ids: list[str] = field(default_factory=list)  # the first ones
    kept: dict[str, int] = field(default_factory=dict)  # jobs that a rule meant, by why they stay
    is_complete: bool = True  # False: there is more than one run removes

    def keep(self, why: str) -> None:
        """Count a job that stays."""
        self.kept[why] = self.kept.get(why, 0) + 1

    def remove(self, job: EndedJob) -> None:
        """Count a job that goes."""
        self.num_jobs += 1
        self.num_bytes += job.num_bytes
        if len(self.job_ids) < MAX_EXAMPLES:
            self.job_ids.append(job.id)


def preview(database: Database, policy: RetentionPolicy) -> Removed:
    """Return what `apply_retention` would remove now in as many runs as it takes: jobs, checkpoints, run folders.

    Raises:
        Unavailable: the database does not answer.
    """
    found, needed = Removed(), _needed(database)
    gone: set[str] = set()
    for job in _jobs_to_remove(database, policy, needed, found):
        found.remove(job)
        gone.add(job.id)
    for page in _pages(database, policy.checkpoint_days, CHECKPOINTS_UNTIL):
        with database.read() as session:
            ids = [job.id for job in page if job.id not in gone]
            for extra in rows.superfluous_checkpoints(session, ids, needed).values():
                found.num_checkpoints += len(extra)
                found.num_bytes += sum(row.size_bytes for row in extra)
    for page in _pages(database, policy.run_days, RUNS_UNTIL):
        found.num_run_folders += len(page)
    return found


def apply_retention(
    database: Database, settings: Settings, policy: RetentionPolicy, max_jobs: int = MAX_JOBS
) -> Removed:
    """Remove what the policy says, of jobs at most `max_jobs`. What is needed stays, however it is set.

    Raises:
        Conflict: another process does so now, or the data directory is another database's.
        Unavailable: the database does not answer. What was removed until then stays so.
    """
    with database.read() as session:
        data_id = get_value(session, DATA_ID)
    if data_id is None or (wrong := why_wrong_directory(settings, data_id)) is not None:
        raise Conflict(f"nothing is removed: {'the database has no id yet' if data_id is None else wrong}")
    lock = FolderLock(settings.locks_dir / "retention.lock")
    try:
        if not lock.try_exclusive():
            raise Conflict("another process removes what is kept no longer; try again when it is done")
        return _apply(database, settings, policy, max_jobs)
    finally:
        lock.close()


def _apply(database: Database, settings: Settings, policy: RetentionPolicy, max_jobs: int) -> Removed:
    done, standing = Removed(), _standing(database)
    _remove_jobs(database, settings, policy, standing, done, max_jobs)
    for page in _pages(database, policy.checkpoint_days, CHECKPOINTS_UNTIL):
        _remove_checkpoints(database, settings, page, standing, done)
        _note(database, CHECKPOINTS_UNTIL, page)
    for page in _pages(database, policy.run_days, RUNS_UNTIL):
        for job in page:
            folder = runs_of_job(settings, job.id)
            if folder.exists() and _is_ended(database, job):
                try_to_delete_folder(folder)
                done.num_run_folders += 1
        _note(database, RUNS_UNTIL, page)
    for page in _pages(database, policy.log_days, LOGS_UNTIL):
        done.num_log_lines += sum(rows.empty_log(database, job.id) for job in page)
        _note(database, LOGS_UNTIL, page)
    with database.write() as session:
        if policy.worker_days is not None:
            done.num_workers = rows.forget_workers(session, policy.worker_days)
        if policy.key_days is not None:
            done.num_keys = rows.forget_keys(session, policy.key_days)
        done.num_sessions = rows.forget_expired(session)
    done.num_orphans = sweep_orphans_if_due(database, settings)
    return done


def _standing(database: Database) -> Needed:
    """Return what is needed as a run begins and is not looked up for each of its steps."""
    with database.read() as session:
        return needed_by_adapters(session)


def _needed(database: Database) -> Needed:
    with database.read() as session:
        return needed_now(session).merged_with(needed_by_adapters(session))


def _jobs_to_remove(database: Database, policy: RetentionPolicy, needed: Needed, found: Removed) -> Iterator[EndedJob]:
    """Yield the jobs that a rule means and nothing needs, the oldest first; count the others in `found.kept`."""
    if not policy.removes_jobs:
        return
    with database.read() as session:
        now = rows.database_now(session)
        num_ended, num_bytes = num_in_states(session, list(TERMINAL_STATES)), 0
        if policy.max_bytes is not None:
            num_bytes = rows.bytes_of_ended(session)
    excess_jobs = 0 if policy.max_jobs is None else num_ended - policy.max_jobs
    excess_bytes = 0 if policy.max_bytes is None else num_bytes - policy.max_bytes
    is_old = rows.older_than(now, policy.least_days)
    for job in ended_jobs(database):
        if excess_jobs <= 0 and excess_bytes <= 0 and not is_old(job):
            return  # all further ones are younger
        days = policy.days_of(job.labels)
        is_for_good = days is not None and math.isinf(days)
        is_due = days is not None and rows.older_than(now, days)(job)
        is_too_much = excess_jobs > 0 or (excess_bytes > 0 and job.num_bytes > 0)
        if is_for_good or not (is_due or is_too_much):
            continue
        if (why := needed.jobs.get(job.id)) is not None:
            found.keep(why)
            continue
        excess_jobs, excess_bytes = excess_jobs - 1, excess_bytes - job.num_bytes
        yield job


def _remove_jobs(
    database: Database, settings: Settings, policy: RetentionPolicy, standing: Needed, done: Removed, max_jobs: int
) -> None:
    with database.read() as session:
        needed = needed_now(session).merged_with(standing)
    batch: list[EndedJob] = []
    for number, job in enumerate(_jobs_to_remove(database, policy, needed, done)):
        if number == max_jobs:
            done.is_complete = False
            break
        batch.append(job)
        if len(batch) == JOBS_AT_ONCE or sum(each.num_events for each in batch) >= EVENTS_AT_ONCE:
            _remove_batch(database, settings, batch, standing, done)
            batch = []
    if batch:
        _remove_batch(database, settings, batch, standing, done)


def _remove_batch(
    database: Database, settings: Settings, batch: list[EndedJob], standing: Needed, done: Removed
) -> None:
    with database.write() as session:
        removed, kept = rows.remove_jobs(session, [job.id for job in batch], standing)
    for why in kept.values():
        done.keep(why)
    gone = set(removed)
    for job in batch:
        if job.id in gone:
            done.remove(job)
            for folder in (checkpoints_of_job(settings, job.id), runs_of_job(settings, job.id)):
                try_to_delete_folder(folder)


def _remove_checkpoints(
    database: Database, settings: Settings, page: list[EndedJob], standing: Needed, done: Removed
) -> None:
    with database.read() as session:
        needed = needed_now(session).merged_with(standing)
        found = rows.superfluous_checkpoints(session, [job.id for job in page], needed)
    for job_id in found:
        with database.write() as session:
            removed = rows.remove_checkpoints(session, job_id, standing)
        for row in removed:
            delete_checkpoint_files(settings, row.filename)
            done.num_checkpoints += 1
            done.num_bytes += row.size_bytes


def _pages(database: Database, days: float | None, key: str) -> Iterator[list[EndedJob]]:
    """Yield jobs that ended more than `days` ago and that no run has looked at for this, page by page."""
    if days is None:
        return
    with database.read() as session:
        is_old, until = rows.older_than(rows.database_now(session), days), get_value(session, key)
    page: list[EndedJob] = []
    for job in ended_jobs(database, None if until is None else datetime.fromisoformat(until)):
        if not is_old(job):
            break
        page.append(job)
        if len(page) == rows.PAGE:
            yield page
            page = []
    if page:
        yield page


def _note(database: Database, key: str, page: list[EndedJob]) -> None:
    """Note how far a run has looked: what ends later has a later end."""
    with database.write() as session:
        set_value(session, key, page[-1].finished_at.isoformat())


def _is_ended(database: Database, job: EndedJob) -> bool:
    """Return whether a job is still ended: somebody may have tried it again."""
    with database.read() as session:
        return rows.known_checkpoints(session, job.id) is not None
