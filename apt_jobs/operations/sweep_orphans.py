"""Remove files that no row names: what a process left that was killed between the rows and the files of a deletion.

A folder is only looked at when nothing was written to it for a day. Whoever calls this has checked that the data
directory is this database's: another one's knows none of its jobs.
"""

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from apt_jobs.artifacts.folders import sweep, try_to_delete_folder
from apt_jobs.db.engine import Database
from apt_jobs.db.retention import known_checkpoints, known_jobs
from apt_jobs.db.service_values import get_value, set_value
from apt_jobs.jobs.spec import JOB_ID_PATTERN
from apt_jobs.settings import Settings

GRACE_S = 86_400.0  # younger folders may belong to a row that is on its way
SWEEP_EVERY_S = 86_400.0
SWEPT_AT = "orphans_swept_at"
_AT_ONCE = 500


def sweep_orphans_if_due(database: Database, settings: Settings) -> int:
    """Sweep once a day, whoever calls it; returns how many folders were removed."""
    now = datetime.now(UTC)
    with database.read() as session:
        swept_at = get_value(session, SWEPT_AT)
    if swept_at is not None and now - datetime.fromisoformat(swept_at) < timedelta(seconds=SWEEP_EVERY_S):
        return 0
    num_removed = sweep_orphans(database, settings, GRACE_S)
    with database.write() as session:
        set_value(session, SWEPT_AT, now.isoformat())
    return num_removed


def sweep_orphans(database: Database, settings: Settings, grace_s: float) -> int:
    """Remove folders of jobs without a row, and checkpoints without one of jobs that have ended."""
    num_removed = 0
    for root in (settings.checkpoints_dir, settings.runs_dir):
        sweep(root, older_than_s=grace_s)  # deletions that broke in the middle
        for names in _old_names(root, grace_s):
            ids = [name for name in names if JOB_ID_PATTERN.match(name)]
            with database.read() as session:
                known = known_jobs(session, ids)
            num_removed += sum(_deleted(root / name) for name in ids if name not in known)
            if root == settings.checkpoints_dir:
                num_removed += sum(_sweep_job(database, root / name, grace_s) for name in sorted(known))
    return num_removed


def _sweep_job(database: Database, folder: Path, grace_s: float) -> int:
    """Remove checkpoints of an ended job that are not registered."""
    names = [name for some in _old_names(folder, grace_s) for name in some]
    with database.read() as session:
        known = known_checkpoints(session, folder.name)
    if known is None:
        return 0
    return sum(_deleted(folder / name) for name in names if f"{folder.name}/{name}" not in known)


def _deleted(folder: Path) -> int:
    try_to_delete_folder(folder)
    return int(not folder.exists())


def _old_names(folder: Path, grace_s: float) -> Iterator[list[str]]:
    """Yield names of folders that nobody wrote to for `grace_s` seconds, some at a time."""
    limit_s = time.time() - grace_s
    names: list[str] = []
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                is_old = entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_mtime < limit_s
            except FileNotFoundError:
                continue
            if is_old:
                names.append(entry.name)
            if len(names) == _AT_ONCE:
                yield names
                names = []
    if names:
        yield names
