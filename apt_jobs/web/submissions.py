"""Group commit: generation requests that arrive within a few milliseconds are one transaction and one wake-up.

A request goes on when its row is durable, as if it had been alone. A request with an `Idempotency-Key` goes alone
(`web/api/jobs.py`).
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from apt_jobs.db.engine import Database
from apt_jobs.db.models import Job
from apt_jobs.db.workers import list_workers
from apt_jobs.errors import AptJobsError, Unavailable
from apt_jobs.job_queue import WakeUpPublisher
from apt_jobs.jobs.spec import GenerateSpec, queue_of
from apt_jobs.operations.liveness import alive_within_s
from apt_jobs.operations.submit import submit_generations
from apt_jobs.settings import Settings

logger = logging.getLogger(__name__)

MAX_GROUP = 256  # rows of one transaction
QUIET_S = 0.002  # a group is complete when nothing came for so long ...
MAX_WAIT_S = 0.012  # ... or after so long
NO_WORKER = "no generation worker is running; start one: apt-jobs worker generate"


@dataclass(slots=True, eq=False)
class _Submission:
    job_id: str
    spec: GenerateSpec
    needs_worker: bool  # somebody waits for the result
    done: asyncio.Future[Job]


class Submissions:
    """All of one event loop."""

    def __init__(
        self, settings: Settings, database: Database, wake_ups: WakeUpPublisher, wake_up_later: asyncio.Event
    ) -> None:
        self._settings, self._database, self._wake_ups = settings, database, wake_ups
        self._wake_up_later = wake_up_later
        self._waiting: list[_Submission] = []
        self._committing: asyncio.Task[None] | None = None
        self._waking: asyncio.Task[None] | None = None
        self._to_wake: set[str] = set()  # queues

    async def submit(self, job_id: str, spec: GenerateSpec, *, needs_worker: bool) -> Job:
        """Insert a job with this id; it is durable when this returns.

        Raises:
            InvalidReferences, OutOfSpace, Unavailable: as `submit_job`; Unavailable without a worker if needed.
        """
        done: asyncio.Future[Job] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Submission(job_id, spec, needs_worker, done))
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit_loop())
        return await done

    async def close(self) -> None:
        """Wait for what is being committed."""
        for task in (self._committing, self._waking):
            if task is not None:
                await asyncio.wait([task])

    async def _commit_loop(self) -> None:
        """Commit groups until nothing waits."""
        try:
            while self._waiting:
                await self._gather()
                group, self._waiting = self._waiting[:MAX_GROUP], self._waiting[MAX_GROUP:]
                await self._commit(group)
        finally:
            self._committing = None

    async def _gather(self) -> None:
        num_seen, waited_s = 0, 0.0
        while num_seen < len(self._waiting) < MAX_GROUP and waited_s < MAX_WAIT_S:
            num_seen = len(self._waiting)
            await asyncio.sleep(QUIET_S)
            waited_s += QUIET_S

    async def _commit(self, group: Sequence[_Submission]) -> None:
        try:
            outcomes = await asyncio.to_thread(self._insert, group)
        except AptJobsError as exc:
            if len(group) > 1 and not isinstance(exc, Unavailable):  # one of them holds what cannot be stored
                for one in group:
                    await self._commit([one])
                return
            outcomes = {one.job_id: exc for one in group}
        except Exception as exc:
            logger.exception("a group of submissions broke", extra={"num_jobs": len(group)})
            for one in group:
                if not one.done.done():
                    one.done.set_exception(exc)
            return
        for one in group:
            outcome = outcomes[one.job_id]
            if isinstance(outcome, AptJobsError):
                if not one.done.done():
                    one.done.set_exception(outcome)
                continue
            self._to_wake.add(outcome.queue)
            if not one.done.done():
                one.done.set_result(outcome)
        if self._to_wake and self._waking is None:
            self._waking = asyncio.create_task(self._wake())

    def _insert(self, group: Sequence[_Submission]) -> dict[str, Job | AptJobsError]:
        outcomes: dict[str, Job | AptJobsError] = {}
        with self._database.write() as session:
            if any(one.needs_worker for one in group):
                alive = list_workers(session, alive_within_s(self._settings))
                served = {queue for worker in alive for queue in worker.queues}
                for one in group:
                    if one.needs_worker and queue_of(one.spec) not in served:
                        outcomes[one.job_id] = Unavailable(NO_WORKER)
            specs = {one.job_id: one.spec for one in group if one.job_id not in outcomes}
            if specs:
                outcomes |= submit_generations(session, self._settings, specs)
        return outcomes

    async def _wake(self) -> None:
        """Wake workers. The broker may be slow: no submission waits for it."""
        try:
            while self._to_wake:
                queue = self._to_wake.pop()
                try:
                    await asyncio.to_thread(self._wake_ups.wake_up, queue)
                except Unavailable:
                    logger.warning("the wake-up waits for the broker", extra={"queue": queue})
                    self._wake_up_later.set()
        finally:
            self._waking = None
