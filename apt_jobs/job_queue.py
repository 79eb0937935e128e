"""The only place that knows Celery. A message is a wake-up of a queue: "claim from it now". It names no job.

Redelivery is off: Celery over Redis loses a message that was popped just before a kill and repeats a slow one, so the
database decides who works. A lost wake-up costs seconds: workers look for due jobs by themselves.
"""

import base64
import json
import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from celery import Celery, Task
from celery.worker import state
from kombu import Producer
from kombu.exceptions import OperationalError
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport.redis import Channel, Transport
from redis import RedisError

from apt_jobs.errors import Unavailable
from apt_jobs.settings import Settings

logger = logging.getLogger(__name__)

TASK_NAME = "apt_jobs.run"
_QUEUE_PREFIX = "jobs."  # users name queues, and kombu has keys of its own beside them, such as "unacked"
PUBLISH_TIMEOUT_S = 2.0
MAX_WAKE_UPS = 1  # of a queue, in the broker: who takes it and leaves due jobs behind sends the next one
_TRANSPORT = "wake-ups"
_REFUSALS = (OperationalError, RedisError, OSError)  # of a broker: kombu translates only some of redis-py's


class WakeUpChannel(Channel):
    """Drops what is not even JSON, on which Celery's worker would end, and again at each start."""

    def num_messages(self, queue: str) -> int:
        """Count the wake-ups that nobody has received yet."""
        num: int = self._size(queue)
        return num

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[misc]  # missing in celery-types
        except (ValueError, RecursionError):
            logger.warning("dropped a message that cannot be read")
            return True


class WakeUpTransport(Transport):
    """Redis, with every message that arrives replaced by one of our own: all that it can say is "claim"."""

    Channel = WakeUpChannel

    def _deliver(self, message: object, queue: str | None) -> None:
        assert queue is not None
        del message
        super()._deliver(_wake_up(queue), queue)


TRANSPORT_ALIASES[_TRANSPORT] = f"{__name__}:{WakeUpTransport.__name__}"


def make_celery(settings: Settings) -> Celery:
    """Return the Celery application of every process, publisher or worker."""
    app = Celery("apt_jobs", broker=broker_url(settings.redis), set_as_current=False)
    app.conf.update(
        broker_transport=_TRANSPORT,
        task_acks_late=False,
        task_ignore_result=True,
        result_backend=None,
        task_serializer="json",
        accept_content=["json"],
        task_default_queue=broker_queue("train"),
        task_create_missing_queues=True,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=PUBLISH_TIMEOUT_S,
        broker_transport_options={
            "socket_timeout": 10,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "retry_on_timeout": True,
            "health_check_interval": 5,
            "global_keyprefix": "apt:",
        },
    )
    return app


def broker_url(redis_url: str) -> str:
    """Return the URL that our transport wants for what redis-py calls `unix://PATH?db=N`; others are the same."""
    parts = urlsplit(redis_url)
    if parts.scheme != "unix":
        return redis_url
    database = parts.query.removeprefix("db=") or "0"
    return f"{_TRANSPORT}+socket://{parts.path}?virtual_host={database}"


def broker_queue(queue: str) -> str:
    """Return what the broker calls the queue that jobs call `queue`."""
    return _QUEUE_PREFIX + queue


class WakeUpPublisher:
    """Wakes one worker of a queue. Call from a thread: a frozen broker holds it for up to `PUBLISH_TIMEOUT_S` a try."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._producer: Producer | None = None  # of one connection of our own: Celery's pools do not survive a fault

    def wake_up(self, queue: str) -> None:
        """Send one wake-up, unless `MAX_WAKE_UPS` of the queue wait for a worker.

        Raises:
            Unavailable: the broker did not take it.
        """
        with self._lock:
            try:
                self._send(queue)
            except _REFUSALS:  # a broker that was restarted is known only by a broken connection
                self._disconnect()
                try:
                    self._send(queue)
                except _REFUSALS as exc:
                    self._disconnect()
                    raise Unavailable(f"the broker does not take messages: {exc}") from exc

    def close(self) -> None:
        self._disconnect()
        self._app.close()

    def _send(self, queue: str) -> None:
        if self._producer is None:
            self._producer = self._app.amqp.Producer(self._app.connection_for_write(), auto_declare=False)
        channel = self._producer.channel
        assert isinstance(channel, WakeUpChannel)
        if channel.num_messages(broker_queue(queue)) >= MAX_WAKE_UPS:
            return
        self._app.send_task(
            TASK_NAME,
            queue=broker_queue(queue),
            ignore_result=True,
            retry=False,
            producer=self._producer,
        )

    def _disconnect(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None and producer.connection is not None:
            producer.connection.collect()  # closes without a word to the broker, which may be gone


def serve_wake_ups(app: Celery, on_wake_up: Callable[[str], None]) -> None:
    """Register what a worker does when a wake-up arrives; it is told of which queue."""

    def run(task: Task[Any, Any], /) -> None:
        delivery: Any = task.request.delivery_info
        on_wake_up(delivery["routing_key"].removeprefix(_QUEUE_PREFIX))

    app.task(name=TASK_NAME, bind=True)(run)


@contextmanager
def celery_slot() -> Iterator[None]:
    """Occupy one of the Celery worker's slots with work that no message began: it takes no wake-up for it meanwhile."""
    token = _Token()
    state.reserved_requests.add(token)  # what `worker_disable_prefetch` counts
    try:
        yield
    finally:
        state.reserved_requests.discard(token)


class WakeUpGate:
    """Keeps a Celery worker from taking wake-ups while it can start nothing: another one may."""

    def __init__(self, num_slots: int) -> None:
        self._tokens = [_Token() for _ in range(num_slots)]

    def set_closed(self, *, is_closed: bool) -> None:
        """Occupy all slots, or free them."""
        change = state.reserved_requests.add if is_closed else state.reserved_requests.discard
        for token in self._tokens:
            change(token)


class _Token:
    """Stands for a request, also where Celery closes its connection; it can be held by a weak reference."""

    id = "token"


def _wake_up(queue: str) -> dict[str, Any]:
    """Return a message as Celery's protocol 2 has it (docs.celeryq.dev, internals/protocol), made where it arrives."""
    identity = str(uuid.uuid4())
    return {
        "body": base64.b64encode(json.dumps([[], {}, {}]).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": TASK_NAME, "id": identity, "root_id": identity, "ignore_result": True},
        "properties": {
            "body_encoding": "base64",
            "correlation_id": identity,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "delivery_tag": identity,
        },
    }
