"""The small loops of every web process: send hints of waiting jobs, end the attempts of dead workers, fire schedules.

All of it is compare-and-set in the database, so any number of processes may run them and none is the leader.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from apt_jobs.db.dispatch import jobs_to_dispatch, mark_dispatched
from apt_jobs.db.jobs import has_expired, reap_expired
from apt_jobs.db.schedules import fire_due, has_due
from apt_jobs.errors import AptJobsError, Unavailable
from apt_jobs.web.service import Service

logger = logging.getLogger(__name__)

DISPATCH_EVERY_S = 2.0
REAP_EVERY_OF_LEASE = 1 / 12
FIRE_EVERY_S = 1.0
REAP_GRACE_OF_LEASE = 0.5  # an attempt is reaped when its lease has been over for half of its length
BATCH = 100


async def dispatch_for_ever(service: Service) -> None:
    """Send the hints that are due. A submission whose own hint failed wakes it."""
    while True:
        await _tried("dispatch", lambda: asyncio.to_thread(_dispatch, service))
        try:
            await asyncio.wait_for(service.dispatch_now.wait(), DISPATCH_EVERY_S)
            service.dispatch_now.clear()
            await asyncio.sleep(DISPATCH_EVERY_S)  # a broker that is down is not asked at every submission
        except TimeoutError:
            continue


async def reap_for_ever(service: Service) -> None:
    """End the attempts whose lease is long over."""
    while True:
        await _tried("reap", lambda: asyncio.to_thread(_reap, service))
        await asyncio.sleep(REAP_EVERY_OF_LEASE * service.settings.lease_s)


async def fire_for_ever(service: Service) -> None:
    """Submit the jobs of schedules that are due."""
    while True:
        await _tried("fire", lambda: _fire(service))
        await asyncio.sleep(FIRE_EVERY_S)


def _dispatch(service: Service) -> None:
    with service.database.read() as session:
        due = jobs_to_dispatch(session, BATCH)
    sent = []
    try:
        for job_id, queue in due:
            service.hints.publish(job_id, queue)
            sent.append(job_id)
    except Unavailable as exc:
        logger.warning("hints wait for the broker", extra={"num_waiting": len(due) - len(sent), "why": str(exc)})
    if sent:
        with service.database.write() as session:
            mark_dispatched(session, sent)


def _reap(service: Service) -> None:
    with service.database.read() as session:  # most looks find nothing: no write transaction for them
        if not has_expired(session):
            return
    with service.database.write() as session:
        events = reap_expired(session, REAP_GRACE_OF_LEASE * service.settings.lease_s)
    for event in events:
        service.publisher.publish(event.job_id, [event])


async def _fire(service: Service) -> None:
    if not await service.read(has_due):
        return
    fired = await service.write(fire_due, service.settings.max_queued_jobs)
    for event in fired.events:
        await service.publish(event.job_id, [event])
    if fired.jobs:
        service.dispatch_now.set()


async def _tried(name: str, work: Callable[[], Awaitable[None]]) -> None:
    try:
        await work()
    except AptJobsError as exc:
        logger.warning("a loop will try again", extra={"loop": name, "why": str(exc)})
    except Exception:  # a loop that ended would end dispatch or reaping for good, unseen
        logger.exception("a loop broke and will try again", extra={"loop": name})
