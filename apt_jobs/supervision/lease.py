"""The lease of an attempt, kept by a thread: beat, learn of a cancel, and stop in time when beats fail.

An attempt that cannot beat must be gone before others may take its job: it counts on CLOCK_BOOTTIME (which runs while a
machine sleeps) from before the last request that succeeded.
"""

import logging
import threading
import time
from types import TracebackType
from typing import Self

from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import heartbeat
from apt_jobs.errors import Fenced, OutOfSpace, Unavailable

logger = logging.getLogger(__name__)

STOP_FRACTION = 40 / 60  # of the lease without a beat: SIGTERM to the tree
KILL_FRACTION = 50 / 60  # SIGKILL


def boot_clock_s() -> float:
    """Seconds since boot, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaseKeeper:
    """Beats for one attempt until closed. The events may be waited for from any thread."""

    def __init__(self, database: Database, job_id: str, attempt: int, *, lease_s: float, heartbeat_s: float) -> None:
        self._database = database
        self._job_id, self._attempt = job_id, attempt
        self._lease_s, self._heartbeat_s = lease_s, heartbeat_s
        self._last_beat_s = boot_clock_s()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"lease of {job_id}", daemon=True)
        self.cancelled = threading.Event()  # someone asked to cancel the job
        self.pausing = threading.Event()  # someone asked to pause it
        self.fenced = threading.Event()  # the attempt owns nothing any more: write nothing

    @property
    def silent_s(self) -> float:
        """Seconds since before the last beat that succeeded."""
        return boot_clock_s() - self._last_beat_s

    @property
    def must_stop(self) -> bool:
        """The tree has to be told to end."""
        return self.fenced.is_set() or self.silent_s >= STOP_FRACTION * self._lease_s

    @property
    def must_kill(self) -> bool:
        """The tree has to be gone at once."""
        return self.silent_s >= KILL_FRACTION * self._lease_s

    def beat(self) -> None:
        """One heartbeat now. Failures to reach the database are logged, and count as silence."""
        asked_at_s = boot_clock_s()
        try:
            with self._database.write() as session:
                orders = heartbeat(session, self._job_id, self._attempt, self._lease_s)
        except Fenced:
            self.fenced.set()
            return
        except (Unavailable, OutOfSpace) as exc:
            logger.warning("heartbeat failed", extra={"job_id": self._job_id, "why": str(exc)})
            return
        self._last_beat_s = asked_at_s
        if orders.cancel:
            self.cancelled.set()
        if orders.pause:
            self.pausing.set()

    def close(self) -> None:
        """Stop beating; the lease then runs out by itself unless the job was finished."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closed.wait(self._heartbeat_s) and not self.fenced.is_set():
            self.beat()
