"""The small loops of every web process: wake workers, reap attempts, preempt jobs, fire schedules, advance sweeps.

All of it is compare-and-set in the database, so any number of processes may run them and none is the leader.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field

from apt_jobs.backoff import Backoff
from apt_jobs.db.job_counts import MAX_FOLDED, fold_counts, needs_fold
from apt_jobs.db.jobs import has_expired, reap_expired
from apt_jobs.db.preemptions import plan_preemptions, request_preemption
from apt_jobs.db.queues import queues_with_due_jobs
from apt_jobs.db.schedules import fire_due, has_due
from apt_jobs.db.sweeps import open_sweeps
from apt_jobs.errors import AptJobsError, Conflict, Unavailable
from apt_jobs.jobs.preemption import preemption_rules
from apt_jobs.jobs.retry import retry_rules
from apt_jobs.operations.liveness import alive_within_s
from apt_jobs.operations.prune_code import prune_code
from apt_jobs.operations.retention import apply_retention
from apt_jobs.operations.submit import checker
from apt_jobs.operations.sweeps import advance_sweep
from apt_jobs.retention_policy import RetentionPolicy
from apt_jobs.web.service import Service

logger = logging.getLogger(__name__)

WAKE_UP_EVERY_S = 2.0
WAKE_UP_MIN_PAUSE_S = 0.2
WAKE_UP_BACKOFF = Backoff(2.0, 60.0)  # of a queue with due jobs that nobody claims; workers look by themselves, too
REAP_EVERY_OF_LEASE = 1 / 12
FIRE_EVERY_S = 1.0
MAX_FOLDS = 100  # in a row
PREEMPT_EVERY_S = 1.0
ADVANCE_EVERY_S = 1.0
FOLD_EVERY_S = 5.0
PRUNE_EVERY_S = 3_600.0
RETENTION_EVERY_S = 3_600.0
RETENTION_MAX_JOBS = 200  # of one run: a process that ends waits for it
RETENTION_PAUSE_S = 1.0  # between two runs while there is more to remove
REAP_GRACE_OF_LEASE = 0.5  # an attempt is reaped when its lease has been over for half of its length


@dataclass(slots=True)
class WakeUps:
    """When which queue was woken. A queue whose jobs nobody claims is woken more and more rarely."""

    _sent: dict[str, tuple[int, float]] = field(default_factory=dict)  # queue: times in a row, when to send the next

    def due(self, queues: Sequence[str], now_s: float) -> list[str]:
        """Return those of the queues with due jobs that are to be woken now. Forgets the others."""
        self._sent = {queue: self._sent.get(queue, (0, now_s)) for queue in queues}
        return [queue for queue in queues if self._sent[queue][1] <= now_s]

    def note(self, queue: str, now_s: float) -> None:
        """Note that a queue was woken."""
        times = self._sent[queue][0] + 1
        self._sent[queue] = times, now_s + WAKE_UP_BACKOFF.wait_s(times)

    def clear(self) -> None:
        """Wake every queue with due jobs again: something changed."""
        self._sent.clear()


async def wake_up_loop(service: Service) -> None:
    """Send one wake-up to each queue with due jobs. A job that became due lets it look at once."""
    wake_ups = WakeUps()
    while True:
        await tried("wake-up", lambda: asyncio.to_thread(_wake_up, service, wake_ups))
        try:
            async with asyncio.timeout(WAKE_UP_EVERY_S):
                await service.wake_up_now.wait()
            service.wake_up_now.clear()
            wake_ups.clear()
            await asyncio.sleep(WAKE_UP_MIN_PAUSE_S)  # a broker that is down is not asked at every submission
        except TimeoutError:
            continue


async def reap_loop(service: Service) -> None:
    """End the attempts whose lease is long over."""
    while True:
        await tried("reap", lambda: asyncio.to_thread(_reap, service))
        await asyncio.sleep(REAP_EVERY_OF_LEASE * service.settings.lease_s)


async def preempt_loop(service: Service) -> None:
    """Let running jobs yield to waiting ones of higher priority."""
    while True:
        await tried("preempt", lambda: asyncio.to_thread(_preempt, service))
        await asyncio.sleep(PREEMPT_EVERY_S)


async def prune_loop(service: Service) -> None:
    """Remove packed code that nothing names any more."""
    while True:
        await tried("prune", lambda: asyncio.to_thread(_prune, service))
        await asyncio.sleep(PRUNE_EVERY_S)


async def retention_loop(service: Service) -> None:
    """Remove what is kept no longer. Without a policy there is nothing to do, ever."""
    policy = service.settings.retention
    if policy is None:
        return
    is_complete = True

    async def step() -> None:
        nonlocal is_complete
        is_complete = True  # also if it breaks: an hour later is soon enough
        is_complete = await asyncio.to_thread(_retain, service, policy)

    while True:
        await tried("retention", step)
        await asyncio.sleep(RETENTION_EVERY_S if is_complete else RETENTION_PAUSE_S)


async def fold_loop(service: Service) -> None:
    """Add up what the counts of jobs consist of, before that is more than a scrape should read."""
    while True:
        await tried("fold", lambda: asyncio.to_thread(_fold, service))
        await asyncio.sleep(FOLD_EVERY_S)


async def fire_loop(service: Service) -> None:
    """Submit the jobs of schedules that are due."""
    while True:
        await tried("fire", lambda: _fire(service))
        await asyncio.sleep(FIRE_EVERY_S)


async def advance_loop(service: Service) -> None:
    """Do the next steps of sweeps: release held jobs, compare those that reached a rung, end what is over."""
    while True:
        await tried("advance", lambda: _advance(service))
        await asyncio.sleep(ADVANCE_EVERY_S)


def _wake_up(service: Service, wake_ups: WakeUps) -> None:
    with service.database.read() as session:
        queues = queues_with_due_jobs(session)
    for queue in wake_ups.due(queues, time.monotonic()):
        try:
            service.wake_ups.wake_up(queue)
        except Unavailable as exc:
            logger.warning("wake-ups wait for the broker", extra={"num_queues": len(queues), "why": str(exc)})
            return
        wake_ups.note(queue, time.monotonic())


def _reap(service: Service) -> None:
    with service.database.read() as session:  # most looks find nothing: no write transaction for them
        if not has_expired(session):
            return
    with service.database.write() as session:
        grace_s = REAP_GRACE_OF_LEASE * service.settings.lease_s
        events = reap_expired(session, grace_s, retry_rules(service.settings))
    service.metrics.leases_lost.inc(len(events))
    for event in events:
        service.publisher.publish(event.job_id, [event])


def _preempt(service: Service) -> None:
    rules, alive_s = preemption_rules(service.settings), alive_within_s(service.settings)
    with service.database.read() as session:  # most looks find nothing: no write transaction for them
        plans = plan_preemptions(session, rules, alive_s)
    for plan in plans:
        with service.database.write() as session:
            is_first = request_preemption(session, plan, rules)
        if is_first:
            victims = [job_id for job_id, _ in plan.victims]
            logger.info("jobs yield to one of higher priority", extra={"job_id": plan.job_id, "victims": victims})


def _fold(service: Service) -> None:
    with service.database.read() as session:  # most looks find nothing: no write transaction for them
        if not needs_fold(session):
            return
    for _ in range(MAX_FOLDS):
        with service.database.write() as session:
            if fold_counts(session) < MAX_FOLDED:
                return


def _prune(service: Service) -> None:
    if num_removed := prune_code(service.database, service.settings):
        logger.info("removed code that no job names", extra={"count": num_removed})


def _retain(service: Service, policy: RetentionPolicy) -> bool:
    """Do one run; returns whether nothing is left to remove."""
    try:
        removed = apply_retention(service.database, service.settings, policy, RETENTION_MAX_JOBS)
    except Conflict as exc:  # another web process does so
        logger.info("nothing was removed", extra={"why": str(exc)})
        return True
    logger.info("removed what is kept no longer", extra=asdict(removed))
    return removed.is_complete


async def _fire(service: Service) -> None:
    if not await service.read(has_due):
        return
    settings = service.settings
    fired = await service.write(fire_due, settings.max_queued_jobs, checker(settings))
    for event in fired.events:
        await service.publish(event.job_id, [event])
    service.metrics.jobs_fired.inc(len(fired.jobs))
    if fired.jobs:
        service.wake_up_now.set()


async def _advance(service: Service) -> None:
    for sweep_id in await service.read(open_sweeps):
        events, is_changed = await asyncio.to_thread(advance_sweep, service.database, sweep_id)
        for event in events:
            await service.publish(event.job_id, [event])
        if is_changed:
            service.wake_up_now.set()


async def tried(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Do one round of a loop. What goes wrong is logged, and the next round may go better."""
    try:
        await work()
    except AptJobsError as exc:
        logger.warning("a loop will try again", extra={"loop": name, "why": str(exc)})
    except Exception:  # a loop that ended would end dispatch or reaping for good, unseen
        logger.exception("a loop broke and will try again", extra={"loop": name})
