"""Hints in a real broker that no worker takes."""

from collections.abc import Iterator

import pytest
import redis
from pydantic import SecretStr

from apt_jobs import job_queue
from apt_jobs.errors import Unavailable
from apt_jobs.job_queue import HintPublisher, broker_queue, make_celery
from apt_jobs.settings import Settings
from tests.integration.faulty_valkey import Valkey


@pytest.fixture
def hints(valkey: Valkey) -> Iterator[HintPublisher]:
    publisher = HintPublisher(make_celery(Settings(redis_url=SecretStr(valkey.url))))
    yield publisher
    publisher.close()


def num_waiting(valkey: Valkey, queue: str) -> int:
    with redis.Redis.from_url(valkey.url) as client:
        return int(client.llen(f"apt:{broker_queue(queue)}"))


def test_hints_that_nobody_takes_are_bounded_queue_by_queue(
    valkey: Valkey, hints: HintPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_queue, "MAX_HINTS", 3)
    for number in range(5):
        hints.publish(f"job_{number}", "train")
    hints.publish("job_5", "other")
    assert (num_waiting(valkey, "train"), num_waiting(valkey, "other")) == (3, 1)
    with redis.Redis.from_url(valkey.url) as client:
        client.lpop(f"apt:{broker_queue('train')}")
    hints.publish("job_6", "train")
    hints.publish("job_7", "train")
    assert num_waiting(valkey, "train") == 3


def test_a_broker_that_is_gone_is_told_and_one_that_came_back_is_found(valkey: Valkey, hints: HintPublisher) -> None:
    hints.publish("job_0", "train")
    valkey.kill()
    with pytest.raises(Unavailable, match="does not take messages"):
        hints.publish("job_1", "train")
    valkey.start()
    hints.publish("job_2", "train")
    assert num_waiting(valkey, "train") >= 1
