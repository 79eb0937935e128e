"""The live wire: Redis pub/sub from the process that stored an event to every web process.

Pub/sub makes things fast, never correct: it may lose and repeat. Publishers drop what Redis does not take at once,
because the database has it already; subscribers say "look in the database" whenever frames may have been lost.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence

import redis
import redis.asyncio
from redis.exceptions import RedisError

from apt_jobs.backoff import Backoff
from apt_jobs.events.codec import encode_stored, frames_of
from apt_jobs.events.kinds import StoredEvent

logger = logging.getLogger(__name__)

CHANNEL_PREFIX = "apt:job:"
PUBLISH_TIMEOUT_S = 1.0  # one try; a frozen Redis must not hold the relay
PUBLISH_PAUSE_S = 2.0  # after a failed try nothing is sent for so long
RECONNECT = Backoff(0.1, 2.0)
HEALTH_CHECK_S = 5.0  # a half-open connection is found within two of these
WAKE_CHANNEL = "apt:wake"  # every subscriber listens here, so that a connection without jobs is watched too


def channel_of(job_id: str) -> str:
    """Name the pub/sub channel of one job."""
    return f"{CHANNEL_PREFIX}{job_id}"


class LivePublisher:
    """Publish frames of stored events. Thread-safe, bounded in time, never raises."""

    def __init__(self, redis_url: str) -> None:
        self._redis = redis.Redis.from_url(
            redis_url,
            socket_timeout=PUBLISH_TIMEOUT_S,
            socket_connect_timeout=PUBLISH_TIMEOUT_S,
            retry=None,
        )
        self._silent_until = 0.0  # CLOCK_MONOTONIC seconds

    def publish(self, job_id: str, stored: Sequence[StoredEvent]) -> bool:
        """Send frames; False when something was dropped. `stored` is contiguous in `seq` and already committed."""
        return self.publish_all({job_id: stored})

    def publish_all(self, stored_of: Mapping[str, Sequence[StoredEvent]]) -> bool:
        """Send frames of many jobs in one go, as `publish` does."""
        jobs = {job_id: stored for job_id, stored in stored_of.items() if stored}
        if not jobs or time.monotonic() < self._silent_until:
            return False
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                for job_id, stored in jobs.items():
                    for frame in frames_of(stored[0].seq, map(encode_stored, stored)):
                        pipeline.publish(channel_of(job_id), frame)
                pipeline.execute()
        except (RedisError, OSError) as exc:
            self._silent_until = time.monotonic() + PUBLISH_PAUSE_S
            logger.warning(
                "live wire is down, events stay in the database", extra={"job_ids": list(jobs), "why": repr(exc)}
            )
            return False
        return True

    def close(self) -> None:
        self._redis.close()


class LiveSubscriber:
    """One Redis connection for all jobs that a web process watches.

    Iterate `messages()` in exactly one task; call `subscribe` and `unsubscribe` from the same event loop.
    """

    def __init__(self, redis_url: str) -> None:
        self._redis_url = redis_url
        self._wanted: set[str] = set()  # job ids
        self._pubsub: redis.asyncio.client.PubSub | None = None

    async def subscribe(self, job_id: str) -> None:
        """Watch one job. `messages()` yields `(job_id, None)` once Redis has confirmed it."""
        self._wanted.add(job_id)
        await self._send(job_id, watch=True)

    async def unsubscribe(self, job_id: str) -> None:
        """Stop watching; frames already on their way may still arrive."""
        self._wanted.discard(job_id)
        await self._send(job_id, watch=False)

    async def messages(self) -> AsyncIterator[tuple[str, bytes | None]]:
        """Yield `(job_id, frame)` as published, and `(job_id, None)` after each (re)subscription: read the database.

        Reconnects without end, after a back-off.
        """
        num_failures = 0
        while True:
            client = redis.asyncio.Redis.from_url(
                self._redis_url,
                socket_timeout=None,  # the default of redis-py 8 ends every silence of 5 s
                socket_connect_timeout=HEALTH_CHECK_S,
                retry=None,  # a silent reconnect would lose frames without a word
            )
            pubsub = client.pubsub()
            try:
                await pubsub.subscribe(WAKE_CHANNEL, *map(channel_of, self._wanted))
                self._pubsub = pubsub
                async for message in self._watched(pubsub):
                    num_failures = 0
                    yield message
            except (RedisError, OSError, TimeoutError) as exc:
                logger.warning("live wire lost, reconnecting", extra={"why": repr(exc)})
            finally:
                self._pubsub = None
                await pubsub.aclose()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
                await client.aclose()
            num_failures += 1
            await asyncio.sleep(RECONNECT.wait_s(num_failures))

    async def _watched(self, pubsub: redis.asyncio.client.PubSub) -> AsyncIterator[tuple[str, bytes | None]]:
        unanswered = False
        while True:
            message = await pubsub.get_message(timeout=HEALTH_CHECK_S)
            if message is None:
                if unanswered:
                    raise TimeoutError(f"no answer to a ping for {HEALTH_CHECK_S} s")
                unanswered = True
                await pubsub.ping()
                continue
            unanswered = False
            channel = message["channel"].decode() if message["channel"] else ""
            if not channel.startswith(CHANNEL_PREFIX):
                continue
            job_id = channel.removeprefix(CHANNEL_PREFIX)
            if message["type"] == "message":
                yield job_id, message["data"]
            elif message["type"] == "subscribe":
                yield job_id, None

    async def _send(self, job_id: str, *, watch: bool) -> None:
        pubsub = self._pubsub
        if pubsub is None:
            return  # between connections: the next one subscribes to all that is wanted
        try:
            await (pubsub.subscribe(channel_of(job_id)) if watch else pubsub.unsubscribe(channel_of(job_id)))
        except (RedisError, OSError) as exc:
            logger.warning("live wire refused a subscription", extra={"job_id": job_id, "why": repr(exc)})
