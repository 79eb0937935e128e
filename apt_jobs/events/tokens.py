"""The token wire: what a generation adds to its texts, and how it ended, from the worker to every web process.

Redis pub/sub on `apt:tokens:{job}`. Like the live wire it makes things fast, never correct: messages of one attempt
have contiguous numbers, so that a listener knows when it has lost one, and the job's row has the whole text in the end.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable
from typing import Literal

import orjson
import redis
import redis.asyncio
from pydantic import BaseModel, ConfigDict, ValidationError
from redis.exceptions import RedisError
from typing_extensions import TypedDict

from apt_jobs.backoff import Backoff
from apt_jobs.events.live import HEALTH_CHECK_S, PUBLISH_PAUSE_S, PUBLISH_TIMEOUT_S

logger = logging.getLogger(__name__)

CHANNEL_PREFIX = "apt:tokens:"
MAX_MESSAGE_BYTES = 1 << 20  # a longer result is read from the row
_RECONNECT = Backoff(0.1, 2.0)


class LikelyToken(TypedDict):
    """A token that might have been chosen."""

    token: str
    logprob: float  # natural logarithm
    bytes: list[int]


class TokenLogprob(LikelyToken):
    """A token of a text, and the likeliest ones in its place, in falling order."""

    top_logprobs: list[LikelyToken]


class GenerationResult(BaseModel):
    """The result of a generation job, as its row has it."""

    model_config = ConfigDict(strict=True, frozen=True)

    outputs: list[str]  # the draws of the first text, then those of the next
    model: str
    generation_time_ms: float
    num_tokens: list[int]  # of each output
    finish_reasons: list[Literal["stop", "length"]]
    truncated: list[bool]  # of each text
    usage: dict[str, int]
    logprobs: list[list[TokenLogprob]] | None = None  # of each output


class End(BaseModel):
    """How an attempt ended, as its row has it. `result` is left out where it is long."""

    model_config = ConfigDict(strict=True, frozen=True)

    state: str  # of jobs/states.py
    result: GenerationResult | None = None


class TokenMessage(BaseModel):
    """What one attempt of a job added. `number` counts the messages of the attempt, from 0; the last one has `end`."""

    model_config = ConfigDict(strict=True, frozen=True)

    attempt: int
    number: int
    deltas: list[tuple[int, str]] = []  # (index of the output, what was added to it)
    logprobs: list[list[TokenLogprob]] = []  # of each delta; empty where nobody asked
    end: End | None = None


def encode_message(message: TokenMessage) -> bytes:
    """Return a message as bytes; without its result where that is too long for the wire."""
    encoded = orjson.dumps(message.model_dump())
    if len(encoded) <= MAX_MESSAGE_BYTES or message.end is None:
        return encoded
    return orjson.dumps({**message.model_dump(), "end": {"state": message.end.state, "result": None}})


def decode_message(raw: bytes) -> TokenMessage | None:
    """Return the message, or None: it is none of ours."""
    try:
        return TokenMessage.model_validate_json(raw)
    except ValidationError:
        logger.warning("dropped a message of the token wire that cannot be read")
        return None


class TokenPublisher:
    """Publish messages. Bounded in time, never raises; one thread at a time or many."""

    def __init__(self, redis_url: str) -> None:
        self._redis = redis.Redis.from_url(
            redis_url, socket_timeout=PUBLISH_TIMEOUT_S, socket_connect_timeout=PUBLISH_TIMEOUT_S, retry=None
        )
        self._silent_until = 0.0  # CLOCK_MONOTONIC seconds

    def publish(self, messages: Iterable[tuple[str, TokenMessage]]) -> None:
        """Send messages of jobs, given as `(job_id, message)`, in one go."""
        if time.monotonic() < self._silent_until:
            return
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                for job_id, message in messages:
                    pipeline.publish(CHANNEL_PREFIX + job_id, encode_message(message))
                pipeline.execute()
        except (RedisError, OSError) as exc:
            self._silent_until = time.monotonic() + PUBLISH_PAUSE_S
            logger.warning("the token wire is down; results are in the database", extra={"why": repr(exc)})

    def close(self) -> None:
        self._redis.close()


async def token_messages(redis_url: str) -> AsyncIterator[tuple[str, bytes]]:
    """Yield `(job_id, raw message)` of all jobs as they are published. Reconnects without end, after a back-off."""
    num_failures = 0
    while True:
        client = redis.asyncio.Redis.from_url(
            redis_url, socket_timeout=None, socket_connect_timeout=HEALTH_CHECK_S, retry=None
        )
        pubsub = client.pubsub()
        try:
            await pubsub.psubscribe(CHANNEL_PREFIX + "*")
            unanswered = False
            while True:
                message = await pubsub.get_message(timeout=HEALTH_CHECK_S)
                if message is None:
                    if unanswered:
                        raise TimeoutError(f"no answer to a ping for {HEALTH_CHECK_S} s")
                    unanswered = True
                    await pubsub.ping()
                    continue
                unanswered, num_failures = False, 0
                if message["type"] == "pmessage":
                    yield message["channel"].decode().removeprefix(CHANNEL_PREFIX), message["data"]
        except (RedisError, OSError, TimeoutError) as exc:
            logger.warning("token wire lost, reconnecting", extra={"why": repr(exc)})
        finally:
            await pubsub.aclose()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
            await client.aclose()
        num_failures += 1
        await asyncio.sleep(_RECONNECT.wait_s(num_failures))
