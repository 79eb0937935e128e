"""Wake-ups in a real broker that no worker takes."""

from collections.abc import Iterator

import pytest
import redis
from pydantic import SecretStr

from apt_jobs.errors import Unavailable
from apt_jobs.job_queue import WakeUpPublisher, broker_queue, make_celery
from apt_jobs.settings import Settings
from tests.integration.faulty_valkey import Valkey


@pytest.fixture
def wake_ups(valkey: Valkey) -> Iterator[WakeUpPublisher]:
    publisher = WakeUpPublisher(make_celery(Settings(redis_url=SecretStr(valkey.url))))
    yield publisher
    publisher.close()


def num_waiting(valkey: Valkey, queue: str) -> int:
    with redis.Redis.from_url(valkey.url) as client:
        return int(client.llen(f"apt:{broker_queue(queue)}"))


def test_of_each_queue_one_wake_up_waits_in_the_broker(valkey: Valkey, wake_ups: WakeUpPublisher) -> None:
    for _ in range(5):
        wake_ups.wake_up("train")
    wake_ups.wake_up("other")
    assert (num_waiting(valkey, "train"), num_waiting(valkey, "other")) == (1, 1)
    with redis.Redis.from_url(valkey.url) as client:
        client.lpop(f"apt:{broker_queue('train')}")
    wake_ups.wake_up("train")
    wake_ups.wake_up("train")
    assert num_waiting(valkey, "train") == 1


def test_a_broker_that_is_gone_is_told_and_one_that_came_back_is_found(
    valkey: Valkey, wake_ups: WakeUpPublisher
) -> None:
    wake_ups.wake_up("train")
    valkey.kill()
    with pytest.raises(Unavailable, match="does not take messages"):
        wake_ups.wake_up("train")
    valkey.start()
    wake_ups.wake_up("train")
    assert num_waiting(valkey, "train") >= 1
