"""The live wire against a real Valkey: frames arrive, and every loss is announced as "look in the database"."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import orjson
import pytest
import redis

from apt_jobs.events.kinds import LineLogged, StoredEvent
from apt_jobs.events.live import LivePublisher, LiveSubscriber, channel_of
from tests.integration.faulty_valkey import Valkey

DEADLINE_S = 90.0


def stored(seq: int) -> StoredEvent:
    return StoredEvent("job_a", seq, 1, datetime.now(UTC), LineLogged("info", "rank 0", f"line {seq}"))


@asynccontextmanager
async def watching(url: str) -> AsyncIterator[tuple[LiveSubscriber, "asyncio.Queue[tuple[str, bytes | None]]"]]:
    subscriber = LiveSubscriber(url)
    inbox: asyncio.Queue[tuple[str, bytes | None]] = asyncio.Queue()

    async def pump() -> None:
        async for message in subscriber.messages():
            inbox.put_nowait(message)

    task = asyncio.create_task(pump())
    try:
        yield subscriber, inbox
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def next_message(inbox: "asyncio.Queue[tuple[str, bytes | None]]") -> tuple[str, bytes | None]:
    return await asyncio.wait_for(inbox.get(), DEADLINE_S)


def test_a_frame_arrives_as_it_was_published(valkey: Valkey) -> None:
    async def scenario() -> None:
        publisher = LivePublisher(valkey.url)
        async with watching(valkey.url) as (subscriber, inbox):
            await subscriber.subscribe("job_a")
            assert await next_message(inbox) == ("job_a", None)
            assert await asyncio.to_thread(publisher.publish, "job_a", [stored(4), stored(5)])
            job_id, frame = await next_message(inbox)
        publisher.close()
        assert job_id == "job_a"
        assert frame is not None
        decoded = orjson.loads(frame)
        assert (decoded["first_seq"], decoded["count"]) == (4, 2)
        assert [event["message"] for event in decoded["events"]] == ["line 4", "line 5"]

    asyncio.run(scenario())


def test_nothing_arrives_after_unsubscribing(valkey: Valkey) -> None:
    async def scenario() -> None:
        publisher = LivePublisher(valkey.url)
        async with watching(valkey.url) as (subscriber, inbox):
            await subscriber.subscribe("job_a")
            await subscriber.subscribe("job_b")
            assert {await next_message(inbox), await next_message(inbox)} == {("job_a", None), ("job_b", None)}
            await subscriber.unsubscribe("job_a")
            client = redis.Redis.from_url(valkey.url)
            while client.pubsub_numsub(channel_of("job_a"))[0][1]:
                await asyncio.sleep(0.01)
            client.close()
            publisher.publish("job_a", [stored(1)])
            publisher.publish("job_b", [stored(1)])
            assert (await next_message(inbox))[0] == "job_b"
            assert inbox.empty()
        publisher.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("fault", ["kill", "freeze", "cut"])
def test_every_loss_of_the_connection_is_announced(valkey: Valkey, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt_jobs.events.live.HEALTH_CHECK_S", 1.0)

    async def scenario() -> None:
        publisher = LivePublisher(valkey.url)
        async with watching(valkey.url) as (subscriber, inbox):
            await subscriber.subscribe("job_a")
            assert await next_message(inbox) == ("job_a", None)
            if fault == "kill":
                await asyncio.to_thread(valkey.kill)
                assert not publisher.publish("job_a", [stored(1)])
                await asyncio.to_thread(valkey.start)
            elif fault == "freeze":
                valkey.send(signal.SIGSTOP)
                assert not await asyncio.to_thread(publisher.publish, "job_a", [stored(1)])
                await asyncio.sleep(3)  # two silent health checks: the subscriber must give the connection up
                valkey.send(signal.SIGCONT)
            else:
                client = redis.Redis.from_url(valkey.url)
                client.client_kill_filter(_type="pubsub")
                client.close()
            assert await next_message(inbox) == ("job_a", None)
            async with asyncio.timeout(DEADLINE_S):
                while not await asyncio.to_thread(publisher.publish, "job_a", [stored(2)]):
                    await asyncio.sleep(0.1)
            job_id, frame = await next_message(inbox)
            assert job_id == "job_a"
            assert frame is not None
        publisher.close()

    asyncio.run(scenario())


def test_publishing_without_redis_returns_false_at_once(tmp_path: Path) -> None:
    publisher = LivePublisher(f"unix://{tmp_path / 'nobody.sock'}")
    assert not publisher.publish("job_a", [stored(1)])
    assert not publisher.publish("job_a", [])
    publisher.close()
