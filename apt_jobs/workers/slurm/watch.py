"""One look at Slurm every few seconds for all attempts of a worker."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from apt_jobs.errors import Unavailable
from apt_jobs.workers.slurm.client import SlurmClient, SlurmJob

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Look:
    """What Slurm answered last."""

    began_s: float  # CLOCK_MONOTONIC; -1: it has not answered yet
    jobs: tuple[SlurmJob, ...] = ()

    def named(self, name: str) -> list[SlurmJob]:
        """Return the jobs of an attempt: more than one if its submission was repeated."""
        return [job for job in self.jobs if job.name == name]


class SlurmWatch:
    """Looks, in a thread of its own, until closed."""

    def __init__(
        self, client: SlurmClient, owner: str, poll_s: float, on_look: Callable[[Sequence[SlurmJob]], None]
    ) -> None:
        self._client, self._owner, self._poll_s, self._on_look = client, owner, poll_s, on_look
        self._closed, self._soon = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="slurm", daemon=True)
        self.last = Look(-1.0)
        self.why_silent: str | None = None  # why Slurm did not answer the last time

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._soon.set()
        self._thread.join()

    def look_soon(self) -> None:
        """Look again without waiting for the next time."""
        self._soon.set()

    def look(self) -> Look:
        """Look now.

        Raises:
            Unavailable: Slurm does not answer.
        """
        began_s = time.monotonic()
        try:
            jobs = tuple(self._client.jobs(self._owner))
        except Unavailable as exc:
            if self.why_silent is None:
                logger.warning("Slurm does not answer", extra={"why": str(exc)})
            self.why_silent = str(exc)
            raise
        self.why_silent, self.last = None, Look(began_s, jobs)
        return self.last

    def _loop(self) -> None:
        while not self._closed.is_set():
            try:
                self._on_look(self.look().jobs)
            except Unavailable:
                pass  # noted above; the next look is soon
            self._soon.wait(self._poll_s)
            self._soon.clear()
