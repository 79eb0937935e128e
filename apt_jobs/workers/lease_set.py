"""The leases of all jobs that a thread of a worker serves together: one transaction beats for all of them."""

import logging
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from apt_jobs.db.engine import Database
from apt_jobs.db.job_groups import cancel_requests
from apt_jobs.db.jobs import heartbeat
from apt_jobs.db.models import Job
from apt_jobs.errors import Fenced, OutOfSpace, Unavailable
from apt_jobs.supervision.lease import STOP_FRACTION, boot_clock_s

logger = logging.getLogger(__name__)

CANCEL_POLL_S = 0.4  # how soon a cancel is seen; a cheap read


class LeaseSet:
    """Beats for its jobs until closed. The rules are those of `LeaseKeeper`."""

    def __init__(self, database: Database, jobs: Iterable[Job], *, lease_s: float, heartbeat_s: float) -> None:
        self._database, self._lease_s, self._heartbeat_s = database, lease_s, heartbeat_s
        self._attempts = {job.id: job.attempt for job in jobs}
        self._cancelled: set[str] = set()
        self._fenced: set[str] = set()
        self._last_beat_s = boot_clock_s()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    def is_cancelled(self, job_id: str) -> bool:
        """Say whether someone asked to cancel the job."""
        return job_id in self._cancelled

    def must_stop(self, job_id: str) -> bool:
        """Say whether the attempt owns nothing any more, or soon will not: it writes nothing."""
        return job_id in self._fenced or boot_clock_s() - self._last_beat_s >= STOP_FRACTION * self._lease_s

    def drop(self, job_id: str) -> None:
        """Beat no more for a job that has ended."""
        self._attempts.pop(job_id, None)

    def beat(self) -> None:
        """Beat now. Failures to reach the database are logged, and count as silence."""
        asked_at_s = boot_clock_s()
        cancelled, fenced = set(), set()
        try:
            with self._database.write() as session:
                for job_id, attempt in list(self._attempts.items()):
                    try:
                        if heartbeat(session, job_id, attempt, self._lease_s).cancel:
                            cancelled.add(job_id)
                    except Fenced:
                        fenced.add(job_id)
        except (Unavailable, OutOfSpace) as exc:
            logger.warning("heartbeat failed", extra={"num_jobs": len(self._attempts), "why": str(exc)})
            return
        self._last_beat_s = asked_at_s
        self._cancelled |= cancelled
        self._fenced |= fenced & self._attempts.keys()  # a job that ended meanwhile is fenced as well

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()

    def _look_for_cancels(self) -> None:
        """Read whom somebody asked to cancel: a reader who left should not pay until the next heartbeat."""
        try:
            with self._database.read() as session:
                self._cancelled |= cancel_requests(session, list(self._attempts))
        except Unavailable as exc:
            logger.warning("cannot look for cancelled jobs", extra={"why": str(exc)})

    def _run(self) -> None:
        beat_at_s = boot_clock_s() + self._heartbeat_s
        while not self._closed.wait(min(CANCEL_POLL_S, self._heartbeat_s)):
            if boot_clock_s() >= beat_at_s:
                beat_at_s = boot_clock_s() + self._heartbeat_s
                self.beat()
            else:
                self._look_for_cancels()
