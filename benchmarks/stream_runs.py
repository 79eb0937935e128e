"""One run of the stream benchmark: connect clients, publish, wait until each has the last event."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import redis

from apt_jobs.db.engine import Database
from apt_jobs.db.events import append_events
from apt_jobs.db.jobs import claim, get_job, insert_job
from apt_jobs.events.codec import encode_frame, encode_stored
from apt_jobs.events.kinds import Event, GradientsRecorded, LineLogged, StoredEvent
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.settings import Settings
from benchmarks.stream_servers import Server

NUM_LAYERS = 150
BURST = 50  # messages of one write to Redis at saturation
NUM_PROBES = 5  # clients whose delays are measured
BUSY = 0.9  # of its core: a server that uses less was not the limit
LATE = 1.1  # times the planned duration: a server that needs longer does not keep up
LAST = "the-last-event"
LEASE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Load:
    """`rate` in events/s; None: as fast as it goes. Stalled clients come on top and read nothing."""

    num_clients: int
    num_events: int
    rate: float | None = None
    num_stalled: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    deliveries_per_s: float
    p50_ms: float  # from publication to arrival
    p99_ms: float
    server_busy: float  # share of its core that the server used
    server_rss_bytes: int  # at the end
    kept_up: bool


class Clients:
    """Connected clients in a process of their own."""

    def __init__(self, server: Server, url: str, number: int, manner: str) -> None:
        command = [sys.executable, "-m", "benchmarks.stream_load", url, server.key, str(number), LAST, manner]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._received("ready")

    def _received(self, word: str) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == word, f"no clients: {self._process.args!r}"

    def result(self) -> dict[str, Any]:
        """Wait for their end; silent ones leave now."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        with self._process:
            line = self._process.stdout.readline()
        assert line, f"these clients did not get everything: {self._process.args!r}"
        result: dict[str, Any] = json.loads(line)
        return result


def measure(server: Server, load: Load) -> Outcome:
    job_id, first_seq = new_job(server.settings)
    url = server.url(job_id, first_seq - 1)
    num_probes = min(NUM_PROBES, load.num_clients)
    manners = {"crowd": load.num_clients - num_probes, "probes": num_probes}  # the last in every fan-out
    if load.rate is None:
        manners = {"eager": load.num_clients}
    stalled = [Clients(server, url, load.num_stalled, "silent")] if load.num_stalled else []
    clients = [Clients(server, url, number, manner) for manner, number in manners.items() if number]
    cpu_s, began_s = server.cpu_s(), time.monotonic()
    began_us = _publish(server, job_id, first_seq, load)
    results = [each.result() for each in clients]
    busy = (server.cpu_s() - cpu_s) / (time.monotonic() - began_s)
    rss_bytes = server.rss_bytes()
    for each in stalled:
        each.result()
    seconds = (max(max(result["ended_us"]) for result in results) - began_us) / 1e6
    delays_ms = sorted(delay / 1000.0 for result in results for delay in result["delays_us"]) or [0.0]
    return Outcome(
        load.num_clients * load.num_events / seconds,
        delays_ms[len(delays_ms) // 2],
        delays_ms[int(0.99 * (len(delays_ms) - 1))],
        busy,
        rss_bytes,
        load.rate is None or seconds < LATE * load.num_events / load.rate + 0.1,
    )


def new_job(settings: Settings, num_events: int = 0) -> tuple[str, int]:
    """Return a job with stored gradient events, the last of them marked, and the `seq` of its next event."""
    database = Database(settings.database)
    with database.write() as session:
        job_id = insert_job(session, TrainSpec(kind="train")).id
        claim(session, job_id, "benchmark", LEASE_S)
        if num_events:
            events: list[Event] = [*map(_gradients, range(num_events - 1)), LineLogged("info", "rank 0", LAST)]
            append_events(session, job_id, 1, [(datetime.now(UTC), event) for event in events], LEASE_S)
        first_seq = get_job(session, job_id).last_seq + 1
    database.dispose()
    return job_id, first_seq


def _gradients(step: int) -> GradientsRecorded:
    return GradientsRecorded(step, tuple(0.001234567 * (index + 1) for index in range(NUM_LAYERS)), ())


def _publish(server: Server, job_id: str, first_seq: int, load: Load) -> int:
    """Publish, paced or not; the microsecond of the first one."""
    client, channel = redis.Redis.from_url(server.settings.redis), server.channel(job_id)
    num_subscriptions = load.num_clients + load.num_stalled if server.name == "naive" else 1
    while client.pubsub_numsub(channel)[0][1] < num_subscriptions:
        time.sleep(0.01)  # what comes earlier would have to come from the database, which has none of this
    rest = encode_stored(StoredEvent(job_id, 0, 1, datetime.now(UTC), _gradients(0))).partition(b',"kind"')[2]
    began = time.monotonic()
    began_us = time.time_ns() // 1000
    number = 0
    while number < load.num_events:
        burst = min(BURST if load.rate is None else 1, load.num_events - number)
        with client.pipeline(transaction=False) as pipeline:
            for _ in range(burst):
                seq = first_seq + number
                mark = b',"note":"%b"' % LAST.encode() if number == load.num_events - 1 else b""
                head = b'{"seq":%d,"sent_us":%d%b,"kind"' % (seq, time.time_ns() // 1000, mark)
                pipeline.publish(channel, encode_frame(seq, [head + rest]))
                number += 1
            pipeline.execute()
        if load.rate is not None:
            time.sleep(max(0.0, began + number / load.rate - time.monotonic()))
    client.close()
    return began_us
