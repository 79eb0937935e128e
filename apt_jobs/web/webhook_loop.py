"""What every web process does for webhooks: makes due tries, looks for lost workers and long queues, prunes the log.

All of it is claimed in the database. A process that dies within a try leaves it to whoever looks when its lease is
over.
"""

import asyncio
import logging
from collections import Counter

from apt_jobs.db.webhook_conditions import apply_changes, find_changes
from apt_jobs.db.webhooks import (
    DeliveryRules,
    Try,
    TryResult,
    claim_deliveries,
    due_deliveries,
    prune_deliveries,
    record_try,
)
from apt_jobs.errors import AptJobsError
from apt_jobs.operations.liveness import alive_within_s
from apt_jobs.web.loops import tried
from apt_jobs.web.service import Service
from apt_jobs.web.webhook_sender import WebhookSender

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
CONDITIONS_EVERY_S = 5.0
PRUNE_EVERY_S = 3_600.0
PRUNE_AGAIN_S = 1.0  # while there is more
LEASE_OF_TIMEOUT = 2.0  # a try that was not recorded for so long was lost with its process
MAX_AT_ONCE = 4  # tries of one webhook in one process


async def webhook_loop(service: Service) -> None:
    """Make the tries that are due. A target that hangs holds up its own only."""
    sender = WebhookSender(service.settings)
    try:
        async with asyncio.TaskGroup() as group:
            await _deliver_loop(service, sender, group)
    finally:
        await sender.close()


async def condition_loop(service: Service) -> None:
    """Look for workers that are lost and queues that are long."""
    while True:
        await tried("webhook conditions", lambda: _look_for_conditions(service))
        await asyncio.sleep(CONDITIONS_EVERY_S)


async def log_prune_loop(service: Service) -> None:
    """Delete old deliveries, some at a time."""
    while True:
        num_pruned = 0

        async def prune() -> None:
            nonlocal num_pruned
            num_pruned = await service.write(prune_deliveries, service.settings.webhook_days * 86_400)

        await tried("webhook log", prune)
        await asyncio.sleep(PRUNE_AGAIN_S if num_pruned else PRUNE_EVERY_S)


async def _deliver_loop(service: Service, sender: WebhookSender, group: asyncio.TaskGroup) -> None:
    under_way: dict[asyncio.Task[None], str] = {}
    while True:

        async def begin_due() -> None:
            for attempt in await _claim(service, Counter(under_way.values())):
                task = group.create_task(_deliver(service, sender, attempt))
                under_way[task] = attempt.webhook.id
                task.add_done_callback(under_way.pop)

        await tried("webhooks", begin_due)
        if under_way:
            await asyncio.wait(set(under_way), timeout=LOOK_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
        else:
            await asyncio.sleep(LOOK_EVERY_S)


async def _claim(service: Service, num_taken: Counter[str]) -> list[Try]:
    due = await service.read(due_deliveries, num_taken, MAX_AT_ONCE)  # most looks find nothing: no write for them
    lease_s = LEASE_OF_TIMEOUT * service.settings.webhook_timeout_s
    return await service.write(claim_deliveries, due, lease_s) if due else []


async def _deliver(service: Service, sender: WebhookSender, attempt: Try) -> None:
    """Make a try and note what came of it. Nothing that goes wrong ends the loop."""
    settings = service.settings
    rules = DeliveryRules(settings.webhook_retry_wait_s, settings.webhook_disable_after_hours * 3_600)
    try:
        result = await _try(sender, attempt)
        state = await service.write(record_try, attempt, result, rules)
    except AptJobsError as exc:
        logger.warning("a try of a webhook will be repeated", extra={"delivery": attempt.delivery.id, "why": str(exc)})
        return
    except Exception:  # a task that ended so would end the loop, unseen
        logger.exception("what came of a webhook was not recorded", extra={"delivery": attempt.delivery.id})
        return
    if result.error is not None:
        extra = {"webhook": attempt.webhook.id, "delivery": attempt.delivery.id, "now": state, "why": result.error}
        logger.info("a webhook was not delivered", extra=extra)


async def _try(sender: WebhookSender, attempt: Try) -> TryResult:
    """Make a try; a fault that nobody thought of fails it as others do, so that it is not repeated without end."""
    try:
        return await sender.send(attempt)
    except AptJobsError:
        raise
    except Exception as exc:
        logger.exception("a try of a webhook broke", extra={"delivery": attempt.delivery.id})
        return TryResult(None, 0, f"the try broke: {type(exc).__name__}")


async def _look_for_conditions(service: Service) -> None:
    changes = await service.read(find_changes, alive_within_s(service.settings))
    if changes:
        await service.write(apply_changes, changes)
