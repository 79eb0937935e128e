"""The training loss of a job in a few numbers: what a row of a list draws. Read again only when there is more of it."""

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence

from sqlalchemy.orm import Session

from apt_jobs.db.models import Job
from apt_jobs.db.series.histories import shown_values
from apt_jobs.db.series.read import read_buckets
from apt_jobs.db.series.store import CURVES

NUM_POINTS = 24
MAX_KEPT = 5_000  # jobs
FRESH_S = 5.0  # a job that goes on is read again after so long
BUDGET_S = 0.15  # of one list: a page comes back for the rest in two seconds
_COLUMN = CURVES.index("train_loss")

Sparkline = tuple[float | None, ...]


class Sparklines:
    """Those of the jobs that were asked for last. Thread-safe."""

    def __init__(self, max_kept: int = MAX_KEPT) -> None:
        self._max_kept = max_kept
        self._kept: OrderedDict[str, tuple[int, float, Sparkline]] = OrderedDict()
        self._lock = threading.Lock()

    def of_jobs(self, session: Session, jobs: Sequence[Job]) -> dict[str, Sparkline]:
        """Return at most `NUM_POINTS` losses of each job, in order; None where one is not finite.

        Jobs that were not trained have none. Reading takes at most about `BUDGET_S`: further jobs are left out.
        """
        end_s = time.monotonic() + BUDGET_S
        found: dict[str, Sparkline] = {}
        num_read = 0
        for job in jobs:
            curve = self._known(job) if job.step is not None else ()
            if curve is None and (time.monotonic() < end_s or num_read == 0):
                curve = self._read(session, job)
                num_read += 1
            if curve is not None:
                found[job.id] = curve
        return found

    def _known(self, job: Job) -> Sparkline | None:
        with self._lock:
            known = self._kept.get(job.id)
        if known is None or (known[0] != job.last_seq and time.monotonic() - known[1] >= FRESH_S):
            return None
        return known[2]

    def _read(self, session: Session, job: Job) -> Sparkline:
        points = read_buckets(session, job.id, "metric", NUM_POINTS)
        found = tuple(_short(value) for value in shown_values(points, _COLUMN))
        with self._lock:
            self._kept[job.id] = (job.last_seq, time.monotonic(), found)
            self._kept.move_to_end(job.id)
            while len(self._kept) > self._max_kept:
                self._kept.popitem(last=False)
        return found


def _short(value: float) -> float | None:
    """Return a loss with the digits that somebody sees."""
    return float(f"{value:.4g}") if abs(value) < float("inf") else None
