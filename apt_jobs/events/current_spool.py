"""The spool of the job that this process trains for, so that a monitor in anybody's code finds it by itself."""

from collections.abc import Iterator
from contextlib import contextmanager

from apt_jobs.events.spool import SpoolWriter

_spools: list[SpoolWriter] = []


def current_spool() -> SpoolWriter | None:
    """Return this rank's spool; None outside a job."""
    return _spools[-1] if _spools else None


@contextmanager
def spool_of_job(spool: SpoolWriter) -> Iterator[None]:
    """While it lasts, `current_spool` is this one."""
    _spools.append(spool)
    try:
        yield
    finally:
        _spools.pop()
