"""Remove packed code that no job and no schedule names any more."""

from apt_jobs.artifacts.code import delete_code, stale_code
from apt_jobs.db.code import is_code_named
from apt_jobs.db.engine import Database
from apt_jobs.settings import Settings

UNUSED_S = 86_400.0  # since it was uploaded or asked for: a submission may be on its way


def prune_code(database: Database, settings: Settings) -> int:
    """Remove what nobody names and nobody asked for within a day; returns how much that was.

    Raises:
        Unavailable: the database does not answer.
    """
    num_removed = 0
    for sha256 in stale_code(settings.code_dir, UNUSED_S):
        with database.read() as session:
            if is_code_named(session, sha256):
                continue
        delete_code(settings.code_dir, sha256)
        num_removed += 1
    return num_removed
