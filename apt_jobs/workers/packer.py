"""What a worker offers, what its jobs hold of it, and which job it claims next.

One process decides for one worker, so nothing has to be asked of the database but the claim itself. A job holds its
share until its processes are gone, whatever its row says meanwhile.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy.orm import Session

from apt_jobs.db.engine import Database
from apt_jobs.db.gangs import Pool
from apt_jobs.db.jobs import Claimed
from apt_jobs.db.placements import Packing, choose, claim_fitting
from apt_jobs.jobs.needs import decode_needs
from apt_jobs.jobs.packing import Held, Offer, Room, RoomReport
from apt_jobs.jobs.resources import MIN_GPU_SHARE
from apt_jobs.operations.liveness import alive_within_s
from apt_jobs.settings import Settings

AttemptId = tuple[str, int]  # job id and attempt


class Packer:
    """The room of one worker."""

    def __init__(
        self,
        settings: Settings,
        offer: Offer,
        *,
        name: str,
        kind: str,
        pool: str | None = None,
        places_elsewhere: bool = False,
    ) -> None:
        """`places_elsewhere`: another scheduler finds room for each job; here only their number counts."""
        self._places_elsewhere = places_elsewhere
        self._settings, self._offer, self._name, self._kind = settings, offer, name, kind
        self._held: dict[AttemptId, Held] = {}  # in the order of the claims
        self._pool = None if pool is None else Pool(pool, alive_within_s(settings))
        self._kept_for: str | None = None  # job, as of the last look
        self._claiming = threading.Lock()  # one claim after another: each counts on what is free

    @property
    def max_jobs(self) -> int:
        """Most jobs that can run here at once: each needs a core or a part of a GPU."""
        if self._places_elsewhere:
            return self._offer.max_jobs
        return min(self._offer.max_jobs, max(1, self._offer.cpus + int(len(self._offer.gpus) / MIN_GPU_SHARE)))

    @property
    def is_full(self) -> bool:
        return self._room().is_full

    def claim(self, database: Database, queues: Sequence[str], lease_s: float) -> Claimed | None:
        """Claim the first job that fits, and hold its share until `release`."""
        with self._claiming:
            packing = self._packing()
            with database.write() as session:
                claimed = claim_fitting(session, queues, packing, lease_s)
                needs = None if claimed is None else decode_needs(claimed.job.needs)
            if claimed is None or needs is None:
                return None
            held = packing.room.place(needs, packing.now_s)
            assert held is not None  # it was chosen because it fits
            self._held[claimed.job.id, claimed.job.attempt] = Held() if self._places_elsewhere else held
            return claimed

    def hold(self, attempt: AttemptId) -> None:
        """Count an attempt that another process of this worker claimed, and that is placed elsewhere."""
        self._held[attempt] = Held()

    def offer_now(self, offer: Offer) -> None:
        """Offer something else from now on."""
        self._offer = offer

    def note_waiting(self, attempt: AttemptId, words: str | None) -> bool:
        """Note why an attempt that is placed elsewhere has not started; return whether that is news."""
        held = self._held.get(attempt)
        if held is None or held.waiting_for == words:
            return False
        self._held[attempt] = replace(held, waiting_for=words)
        return True

    def has_startable(self, session: Session, queues: Sequence[str]) -> bool:
        """Return whether `claim` would do anything: start a job, or keep room for one."""
        if self._pool is not None:
            self._offer = replace(self._offer, num_nodes=1 + self._pool.num_nodes(session))
        choice = choose(session, queues, self._packing())
        self._kept_for = choice.kept_for
        return bool(choice.startable) or choice.to_reserve is not None

    def held_by(self, attempt: AttemptId) -> Held:
        """Return the share of a claimed attempt."""
        return self._held[attempt]

    def release(self, attempt: AttemptId) -> None:
        """Give the share of an attempt whose processes are gone to the next one."""
        self._held.pop(attempt, None)

    def report(self) -> dict[str, Any]:
        """Return what the worker's row says of its room."""
        offer = self._offer
        jobs = tuple((job_id, held) for (job_id, _), held in self._held.copy().items())
        return RoomReport(
            cpus=offer.cpus,
            memory_gb=offer.memory_gb,
            max_jobs=offer.max_jobs,
            max_cpu_ranks=offer.max_cpu_ranks,
            num_nodes=offer.num_nodes,
            jobs=jobs,
            kept_for=self._kept_for,
        ).as_document()

    def _packing(self) -> Packing:
        return Packing(
            self._name, self._kind, self._room(), time.monotonic(), self._settings.reserve_after_s, self._pool
        )

    def _room(self) -> Room:
        return Room(self._offer, tuple(self._held.copy().values()))
