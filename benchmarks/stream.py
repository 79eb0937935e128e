"""How many WebSocket deliveries a second one web process makes, and how late they are, against other servers.

Every server gets the same messages through Redis, one gradient event of 150 layers each, and runs on a core of its
own; publisher and clients share the others. A row whose clients were the limit says so in its peer's name: there the
ratio is too small, never too large.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import redis

from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import claim, get_job, insert_job
from apt_jobs.events.codec import encode_frame, encode_stored
from apt_jobs.events.kinds import GradientsRecorded, StoredEvent
from apt_jobs.events.live import channel_of
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.settings import Settings
from apt_jobs.workers.embedded import free_port
from benchmarks.rows import Row, paired_row
from benchmarks.stream_peers import PEERS, command_of
from benchmarks.submit import service

NUM_LAYERS = 150
NUM_ROUNDS = 3
BURST = 50  # messages of one write to Redis at saturation
SATURATION_EVENTS = {"ours": 3000, "ws": 3000, "socket.io": 2000, "broadcast": 2000, "naive": 200}
PACED_S = 6.0
BUSY_LIMIT = 0.9  # of a core: a load that uses more may have been the limit
NUM_PROBES = 5  # clients whose delays are measured
LAST = "the-last-event"


@dataclass(frozen=True, slots=True)
class Load:
    """`rate` None: as fast as it goes."""

    num_clients: int
    num_events: int
    rate: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    deliveries_per_s: float
    p50_ms: float
    p99_ms: float
    busy: float  # share of a core that the clients used


@dataclass(frozen=True, slots=True)
class Target:
    """A running server."""

    name: str
    settings: Settings
    key: str
    port: int

    def measure(self, load: Load) -> Outcome:
        """Connect the clients, publish, wait until each has the last event."""
        job_id, first_seq = _new_job(self.settings)
        if self.name == "ours":
            url, channel = f"ws://127.0.0.1:{self.port}/ws/jobs/{job_id}?after={first_seq - 1}", channel_of(job_id)
        else:
            path = "/socket.io/?EIO=4&transport=websocket" if self.name == "socket.io" else "/"
            url, channel = f"ws://127.0.0.1:{self.port}{path}", "bench"
        manners = {"eager": load.num_clients}
        if load.rate is not None:
            manners = {"crowd": load.num_clients - NUM_PROBES, "probes": NUM_PROBES}  # the last in every fan-out
        clients = [_clients(url, self.key, number, manner) for manner, number in manners.items()]
        began_us = _publish(self.settings, channel, job_id, first_seq, load)
        return _outcome([_result(process) for process in clients], began_us, load)


def rows() -> Iterator[Row]:
    """`stream/saturation-100/*` in deliveries/s; `stream/p99-*/*` in milliseconds from publication to arrival."""
    with tempfile.TemporaryDirectory() as folder, service(Path(folder)) as (settings, key):
        [web] = [child for child in psutil.Process().children() if "apt_jobs" in child.cmdline()]
        os.sched_setaffinity(web.pid, sorted(_ALL_CORES)[:1])
        ours = Target("ours", settings, key, settings.port)
        with _on_the_other_cores():
            for name in PEERS:
                with _peer(name, settings, key) as peer:
                    yield _saturation(ours, peer)
                    if name == "ws":
                        yield _lateness(ours, peer, "p99-100x1000", 100, 1000.0)
                        yield _lateness(ours, peer, "p99-500x100", 500, 100.0)


def _saturation(ours: Target, peer: Target) -> Row:
    mine, others = [], []
    for _ in range(NUM_ROUNDS):
        mine.append(ours.measure(Load(100, SATURATION_EVENTS["ours"])))
        others.append(peer.measure(Load(100, SATURATION_EVENTS[peer.name])))
    name = PEERS[peer.name] + _limited(mine)
    rates = [outcome.deliveries_per_s for outcome in mine], [outcome.deliveries_per_s for outcome in others]
    return paired_row(f"stream/saturation-100/{peer.name}", *rates, name, "deliveries/s")


def _lateness(ours: Target, peer: Target, what: str, num_clients: int, rate: float) -> Row:
    load = Load(num_clients, int(rate * PACED_S), rate)
    mine, others = [], []
    for _ in range(NUM_ROUNDS):
        mine.append(ours.measure(load))
        others.append(peer.measure(load))
    name = PEERS[peer.name] + _limited(mine)
    late = [outcome.p99_ms for outcome in mine], [outcome.p99_ms for outcome in others]
    return paired_row(f"stream/{what}/{peer.name}", *late, name, "ms")


def _limited(outcomes: list[Outcome]) -> str:
    busy = statistics.median(outcome.busy for outcome in outcomes)
    return f" (the clients were the limit: {busy:.0%} of a core)" if busy > BUSY_LIMIT else ""


def _clients(url: str, key: str, number: int, manner: str) -> "subprocess.Popen[str]":
    """Connected clients in a process of their own."""
    command = [sys.executable, "-m", "benchmarks.stream_load", url, key, str(number), LAST, manner]
    clients = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert clients.stdout is not None
    assert clients.stdout.readline().strip() == "ready", f"no clients for {url}"
    return clients


def _result(clients: "subprocess.Popen[str]") -> dict[str, Any]:
    with clients:
        assert clients.stdout is not None
        result: dict[str, Any] = json.loads(clients.stdout.readline())
    return result


def _outcome(results: list[dict[str, Any]], began_us: int, load: Load) -> Outcome:
    seconds = (max(max(result["ended_us"]) for result in results) - began_us) / 1e6
    delays_ms = sorted(delay / 1000.0 for result in results for delay in result["delays_us"]) or [0.0]
    return Outcome(
        load.num_clients * load.num_events / seconds,
        delays_ms[len(delays_ms) // 2],
        delays_ms[int(0.99 * (len(delays_ms) - 1))],
        sum(result["busy"] for result in results),
    )


def _new_job(settings: Settings) -> tuple[str, int]:
    """A job, and the `seq` that its next event would have."""
    database = Database(settings.database)
    with database.write() as session:
        job_id = insert_job(session, TrainSpec(kind="train")).id
        claim(session, job_id, "benchmark", 3600.0)
        first_seq = get_job(session, job_id).last_seq + 1
    database.dispose()
    return job_id, first_seq


def _publish(settings: Settings, channel: str, job_id: str, first_seq: int, load: Load) -> int:
    """Publish, paced or not; the microsecond of the first one."""
    client = redis.Redis.from_url(settings.redis)
    while not client.pubsub_numsub(channel)[0][1]:
        time.sleep(0.01)  # what comes earlier would have to come from the database, which has none of this
    norms = tuple(0.001234567 * (index + 1) for index in range(NUM_LAYERS))
    event = StoredEvent(job_id, 0, 1, datetime.now(UTC), GradientsRecorded(0, norms, ()))
    rest = encode_stored(event).partition(b',"kind"')[2]
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


@contextmanager
def _peer(name: str, settings: Settings, key: str) -> Iterator[Target]:
    port = free_port("127.0.0.1", settings.port + 1)
    socket_path = settings.redis.removeprefix("unix://").partition("?")[0]
    environment = {"BENCH_SOCKET": socket_path, "BENCH_PORT": str(port), "BENCH_CHANNEL": "bench"}
    command = command_of(name)
    with _core_of_its_own():
        process = subprocess.Popen(command, env={**os.environ, **environment})
    try:
        _wait_for_port(port)
        yield Target(name, settings, key, port)
    finally:
        process.kill()  # its sockets never see that their browsers left: it would not stop by itself
        process.wait()


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 30.0
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline, "the peer did not start"
        time.sleep(0.1)


@contextmanager
def _core_of_its_own() -> Iterator[None]:
    """Processes started meanwhile run on the first core only."""
    with _cores(lambda cores: cores[:1]):
        yield


@contextmanager
def _on_the_other_cores() -> Iterator[None]:
    with _cores(lambda cores: cores[1:]):
        yield


@contextmanager
def _cores(choose: Any) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    allowed = sorted(_ALL_CORES)
    if len(allowed) > 1:
        os.sched_setaffinity(0, choose(allowed))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


_ALL_CORES = os.sched_getaffinity(0)
