"""Promise 11: a live stream has no gap and no double. Every way to watch at once, under load, while Redis is killed,
flushed, frozen and cut off, the web process killed, frozen and restarted, and all sockets cut.
"""

import random
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
import redis

from apt_jobs.db.access import Role, create_key
from apt_jobs.db.events import append_events, events_after
from apt_jobs.db.jobs import claim, insert_job
from apt_jobs.errors import Unavailable
from apt_jobs.events.codec import decode_payload
from apt_jobs.events.kinds import Event, GradientsRecorded, LineLogged
from apt_jobs.events.live import LivePublisher
from apt_jobs.jobs.spec import TrainSpec
from tests.conftest import some_port
from tests.faults.cut_proxy import CutProxy
from tests.faults.forked import Forker
from tests.faults.record import FULL, Campaign, campaign, count
from tests.faults.service import Service, service, until
from tests.faults.watchers import (
    LAST,
    BinarySocket,
    EventSource,
    JobsSocket,
    JsonSocket,
    LazySocket,
    PythonClient,
    Watcher,
)

NUM_EVENTS = 20_000 if FULL else 2_000  # of one round, both jobs together
NUM_ROUNDS = count(1, 10)  # of each dialect
FREEZE_S = 12.0 if FULL else 2.0  # the longer one is longer than two health checks: the connection is given up
BURST = 500
REDIS_BUFFER_BYTES = 1 << 16  # for a subscriber; by default it is 32 MB, and a burst is lost only after longer
LEASE_S = 3600.0
Fault = Callable[[Service, CutProxy], None]


class Speaker(threading.Thread):
    """Stores events of several jobs and publishes them, as the relay does, with a burst now and then."""

    def __init__(self, running: Service, jobs: Sequence[str], chance: random.Random) -> None:
        super().__init__(name="speaker", daemon=True)
        self._running, self._chance = running, chance
        self._publisher = LivePublisher(running.redis_url)
        self._calm = threading.Event()
        self.heads = dict.fromkeys(jobs, 0)
        self.num_said = 0
        self.is_live = False  # Redis took the last batch

    def end(self) -> None:
        """Return when there were enough events and each job has its last one."""
        self._calm.set()
        self.join()
        self._publisher.close()

    def run(self) -> None:
        while not self._calm.is_set() or self.num_said < NUM_EVENTS:
            size = BURST if self._chance.random() < 0.02 else self._chance.randrange(1, 40)
            self._say(self._chance.choice(list(self.heads)), [self._event(number) for number in range(size)])
            if not self._calm.is_set():
                time.sleep(self._chance.uniform(0.0, 0.05))
        for job_id in self.heads:
            self._say(job_id, [LineLogged("info", "rank 0", LAST)])

    def _event(self, number: int) -> Event:
        if number % 4:
            return LineLogged("info", "rank 0", f"event {self.num_said + number}")
        return GradientsRecorded(self.num_said + number, (0.5, float("nan"), 1.5), (1,))

    def _say(self, job_id: str, events: Sequence[Event]) -> None:
        batch = [(datetime.now(UTC), event) for event in events]
        while True:
            try:
                with self._running.database.write() as session:
                    stored = append_events(session, job_id, 1, batch, LEASE_S).stored
                break
            except Unavailable:
                time.sleep(0.1)
        self.is_live = self._publisher.publish(job_id, stored)
        self.heads[job_id] = stored[-1].seq
        self.num_said += len(events)


@pytest.mark.timeout(7200 if FULL else 300)
def test_every_stream_is_whole_whatever_is_killed(tmp_path: Path, database_url: str, forker: Forker) -> None:
    with (
        campaign(11, "Redis, web process and sockets killed, five ways to watch") as found,
        service(tmp_path / "s", database_url, forker) as running,
        CutProxy(some_port(), running.port) as proxy,
    ):
        found.on(running.database.dialect)
        running.environment["APT_JOBS_ALLOWED_HOSTS"] = f'["127.0.0.1:{proxy.port}"]'
        running.start_web()
        with running.database.write() as session:
            key = create_key(session, "campaign", Role.VIEWER)
        chance = random.Random(found.seed)
        for _ in range(NUM_ROUNDS):
            jobs = [owned_job(running) for _ in range(2)]
            watchers = all_watchers(proxy.port, key, jobs)
            round_of(found, chance, running, proxy, jobs, watchers)
            found.violations += [fault for watcher in watchers for fault in judged(running, watcher)]


def round_of(
    found: Campaign,
    chance: random.Random,
    running: Service,
    proxy: CutProxy,
    jobs: Sequence[str],
    watchers: Sequence[Watcher],
) -> None:
    """Each fault once, in any order, while events flow; the next one when all are up to date and fed by Redis again."""
    speaker = Speaker(running, jobs, chance)
    speaker.start()
    for watcher in watchers:
        watcher.start()
    until(lambda: all(all(watcher.heard.values()) for watcher in watchers))  # a fault is to find all of them there
    eager = [watcher for watcher in watchers if not isinstance(watcher, LazySocket)]
    half = FAULTS[::2] if running.database.dialect == "sqlite" else FAULTS[1::2]
    faults = FAULTS if FULL else half
    for fault in chance.sample(faults, len(faults)):
        began = time.monotonic()
        fault(running, proxy)
        heads = dict(speaker.heads)
        until(lambda heads=heads: all(has_heard(watcher, heads) for watcher in eager))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        found.recovered(time.monotonic() - began)
        found.fault(fault.__name__)
        until(lambda: speaker.is_live)
        time.sleep(chance.uniform(0.2, 0.8))
    speaker.end()
    until(lambda: all(watcher.is_over for watcher in watchers))
    for watcher in watchers:
        watcher.join()
    found.trials += speaker.num_said
    found.violations += [f"{watcher.name}: was never cut" for watcher in watchers if watcher.num_connections == 1]


def has_heard(watcher: Watcher, heads: dict[str, int]) -> bool:
    return bool(watcher.violations) or all(len(heard) >= heads[job_id] for job_id, heard in watcher.heard.items())


def all_watchers(port: int, key: str, jobs: Sequence[str]) -> list[Watcher]:
    of_one = [JsonSocket, BinarySocket, EventSource, PythonClient, LazySocket]
    return [*(kind(port, key, jobs[:1]) for kind in of_one), JobsSocket(port, key, jobs)]


def judged(running: Service, watcher: Watcher) -> list[str]:
    """What a watcher heard against what is stored."""
    violations = list(watcher.violations)
    for job_id, heard in watcher.heard.items():
        with running.database.read() as session:
            rows = events_after(session, job_id, 0, len(heard) + 1)
        stored = [decode_payload(row.kind, row.payload) for row in rows]
        if heard != [event.message if isinstance(event, LineLogged) else event.kind for event in stored]:
            violations.append(f"{watcher.name}: heard {len(heard)} events of {job_id}, which are not the stored ones")
    return violations


def owned_job(running: Service) -> str:
    """A running job of the test's own."""
    with running.database.write() as session:
        job_id = insert_job(session, TrainSpec(kind="train")).id
        claim(session, job_id, "speaker", LEASE_S)
    return job_id


def kill_redis(running: Service, proxy: CutProxy) -> None:
    running.restart("valkey")


def keep_redis_away(running: Service, proxy: CutProxy) -> None:
    running.kill("valkey")
    time.sleep(2.0)
    running.start_valkey()


def flush_redis(running: Service, proxy: CutProxy) -> None:
    with redis.Redis.from_url(running.redis_url) as client:
        client.flushall()


def cut_redis(running: Service, proxy: CutProxy) -> None:
    with redis.Redis.from_url(running.redis_url) as client:
        client.client_kill_filter(_type="pubsub")


def freeze_redis(running: Service, proxy: CutProxy) -> None:
    """Half-open: the peer is there, and says nothing."""
    running.freeze("valkey")
    time.sleep(FREEZE_S)
    running.thaw("valkey")


def kill_web(running: Service, proxy: CutProxy) -> None:
    running.restart("web")


def freeze_web(running: Service, proxy: CutProxy) -> None:
    """It falls behind so far that Redis gives it up: what was published meanwhile is lost without a word."""
    with redis.Redis.from_url(running.redis_url) as client:
        client.config_set("client-output-buffer-limit", f"pubsub {REDIS_BUFFER_BYTES} {REDIS_BUFFER_BYTES} 1")
    running.freeze("web")
    time.sleep(2.0)
    running.thaw("web")


def stop_web(running: Service, proxy: CutProxy) -> None:
    """A deployment: SIGTERM, then the next process."""
    running.processes["web"].terminate()
    running.processes["web"].wait()
    running.restart("web")


def cut_sockets(running: Service, proxy: CutProxy) -> None:
    proxy.cut()


FAULTS: tuple[Fault, ...] = (
    *(kill_redis, keep_redis_away, flush_redis, cut_redis, freeze_redis),
    *(kill_web, freeze_web, stop_web, cut_sockets),
)
