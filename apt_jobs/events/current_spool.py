"""The spool of the job that this process trains for, so that a monitor in anybody's code finds it by itself.

A rank's entry sets it. Children of a rank, spawned processes and other virtual environments find it by the run file,
as `apt_jobs.current_run()` does; lines of several writers do not mix, as each is appended with one system call.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from apt_jobs.events.spool import SpoolWriter
from apt_jobs.jobs.handover import RUN_FILE_VARIABLE, rank_of_process, read_handover

_spools: list[SpoolWriter] = []
_found: dict[tuple[int, str], SpoolWriter | None] = {}  # by process and run file


def current_spool() -> SpoolWriter | None:
    """Return this rank's spool; None outside a job."""
    return _spools[-1] if _spools else _spool_of_run_file()


def _spool_of_run_file() -> SpoolWriter | None:
    name = os.environ.get(RUN_FILE_VARIABLE)
    if not name:
        return None
    key = os.getpid(), name
    if key not in _found:
        handover = read_handover()
        try:
            _found[key] = None if handover is None else SpoolWriter(handover.spool_path(rank_of_process()))
        except OSError:
            _found[key] = None  # a full disk: the training goes on without
    return _found[key]


@contextmanager
def spool_of_job(spool: SpoolWriter) -> Iterator[None]:
    """While it lasts, `current_spool` is this one."""
    _spools.append(spool)
    try:
        yield
    finally:
        _spools.pop()
