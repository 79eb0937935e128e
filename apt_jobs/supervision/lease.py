"""The lease of an attempt, kept by a thread: beat, learn of a cancel, and stop in time when beats fail.

An attempt that cannot beat must be gone before others may take its job: it counts on CLOCK_BOOTTIME (which runs while a
machine sleeps) from before the last request that succeeded.
"""

import logging
import os
import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import heartbeat
from apt_jobs.errors import Fenced, OutOfSpace, Unavailable
from apt_jobs.settings import Settings

logger = logging.getLogger(__name__)

STOP_FRACTION = 40 / 60  # of the lease without a beat: SIGTERM to the tree
KILL_FRACTION = 50 / 60  # SIGKILL
MAX_START_LEASES = 5


def boot_clock_s() -> float:
    """Return seconds since boot, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaseKeeper:
    """Beats for one attempt until closed. The events may be waited for from any thread."""

    def __init__(
        self,
        database: Database,
        job_id: str,
        attempt: int,
        *,
        lease_s: float,
        heartbeat_s: float,
        beating_fd: int | None = None,
    ) -> None:
        """`beating_fd`: closed with the first beat, see `kept_until_first_beat`."""
        self._beating_fd = beating_fd
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

    def beat(self) -> bool:
        """Beat now; whether it succeeded. Failures to reach the database are logged, and count as silence."""
        asked_at_s = boot_clock_s()
        try:
            with self._database.write() as session:
                stop_requests = heartbeat(session, self._job_id, self._attempt, self._lease_s)
        except Fenced:
            self.fenced.set()
            return False
        except (Unavailable, OutOfSpace) as exc:
            logger.warning("heartbeat failed", extra={"job_id": self._job_id, "why": str(exc)})
            return False
        self._last_beat_s = asked_at_s
        if stop_requests.cancel:
            self.cancelled.set()
        if stop_requests.pause:
            self.pausing.set()
        return True

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
        while not self.fenced.is_set():
            if self.beat() and self._beating_fd is not None:
                os.close(self._beating_fd)
                self._beating_fd = None
            if self._closed.wait(self._heartbeat_s):
                return


@contextmanager
def kept_until_first_beat(database: Database, settings: Settings, job_id: str, attempt: int) -> Iterator[int]:
    """Beat for an attempt until its supervisor does: on a loaded machine that takes longer to start than a lease lasts.

    Yields the file descriptor that the supervisor inherits and closes with its first beat; start it in this context.
    Beats go on after the context, in a thread. They end also when the supervisor ends, when the attempt is fenced, and
    after `MAX_START_LEASES` leases: what has not begun by then hangs.
    """
    reader, writer = os.pipe()
    keeper = LeaseKeeper(database, job_id, attempt, lease_s=settings.lease_s, heartbeat_s=settings.heartbeat_s)
    name = f"lease of starting {job_id}"
    threading.Thread(target=_beat_until_closed, args=(keeper, settings, reader), name=name, daemon=True).start()
    try:
        yield writer
    finally:
        os.close(writer)


def _beat_until_closed(keeper: LeaseKeeper, settings: Settings, reader: int) -> None:
    give_up_at_s = time.monotonic() + MAX_START_LEASES * settings.lease_s
    try:
        while time.monotonic() < give_up_at_s and not keeper.fenced.is_set():
            if select.select([reader], [], [], settings.heartbeat_s)[0]:
                return
            keeper.beat()
        if not keeper.fenced.is_set():
            logger.warning("the supervisor did not start in time; its lease runs out")
    finally:
        os.close(reader)
