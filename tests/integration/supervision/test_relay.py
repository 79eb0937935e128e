"""The relay against a database that is locked and a Redis that is dead: what could not be sent is sent later."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import orjson
import pytest
import redis
from sqlalchemy import select

from apt_jobs.backoff import Backoff
from apt_jobs.db.engine import Database
from apt_jobs.db.events import events_after
from apt_jobs.db.jobs import claim, get_job, insert_job
from apt_jobs.db.models import Checkpoint
from apt_jobs.events.kinds import CheckpointSaved, Event, GradientsRecorded, LayersNamed, LineLogged
from apt_jobs.events.live import LivePublisher, channel_of
from apt_jobs.events.spool import SpoolWriter
from apt_jobs.jobs.commands import read_commands
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.supervision.rank_logs import RankLogs
from apt_jobs.supervision.relay import Relay
from tests.integration.faulty_valkey import Valkey
from tests.integration.run_files import run_file_in
from tests.unit.diagnosis.steps import record

DEADLINE_S = 60.0
LEASE_S = 3600.0


POLICY = {"kinds": ["nan"], "action": "cut_lr", "factor": 0.5}
SPEC = TrainSpec.model_validate({"kind": "train", "monitor": {"on_anomaly": [POLICY]}})


class Attempt:
    """One rank's spool and the relay that follows it."""

    def __init__(self, folder: Path, database: Database, redis_url: str) -> None:
        self._database = database
        with database.write() as session:
            self.job_id = insert_job(session, TrainSpec(kind="train")).id
            claim(session, self.job_id, "test", LEASE_S)
            self.first_seq = get_job(session, self.job_id).last_seq + 1
        run_file = run_file_in(folder, SPEC, job_id=self.job_id, checkpoint_prefix=self.job_id)
        self.commands_path = run_file.commands_path
        self.publisher = LivePublisher(redis_url)
        self.relay = Relay(database, self.publisher, run_file, RankLogs(folder, 1), LEASE_S)
        self._spool = SpoolWriter(run_file.spool_path(0))

    def log(self, *messages: str) -> None:
        for message in messages:
            self._spool.append(LineLogged("info", "rank 0", message))

    def tell(self, event: Event) -> None:
        self._spool.append(event)

    def checkpoints(self) -> list[Checkpoint]:
        with self._database.read() as session:
            return list(session.scalars(select(Checkpoint)))

    def flush_until_moved(self) -> int:
        deadline = time.monotonic() + DEADLINE_S
        while not (moved := self.relay.flush()):
            assert time.monotonic() < deadline, "nothing moved"
            time.sleep(0.01)
        return moved

    def stored(self) -> list[tuple[int, str]]:
        """`seq`, counted from the first line, and message."""
        with self._database.read() as session:
            rows = events_after(session, self.job_id, self.first_seq - 1, 100)
        return [(row.seq - self.first_seq, orjson.loads(row.payload).get("message", row.kind)) for row in rows]

    def close(self) -> None:
        self._spool.close()
        self.publisher.close()


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Another process writes."""
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


@pytest.fixture
def attempt(tmp_path: Path, sqlite_url: str, valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> Iterator[Attempt]:
    monkeypatch.setattr("apt_jobs.db.engine.BUSY_TIMEOUT_S", 0)
    monkeypatch.setattr("apt_jobs.supervision.relay.RETRY", Backoff(0.01, 5.0))
    monkeypatch.setattr("apt_jobs.events.live.PUBLISH_PAUSE_S", 0.0)
    database = Database(sqlite_url)
    started = Attempt(tmp_path / "run", database, valkey.url)
    yield started
    started.close()
    database.dispose()


def test_what_a_rank_prints_is_a_sign_of_life(attempt: Attempt, tmp_path: Path) -> None:
    before = attempt.relay.last_sign_s
    folder = tmp_path / "run" / "torchrun" / "node-0" / "x" / "0"
    folder.mkdir(parents=True)
    attempt.relay.flush()
    assert attempt.relay.last_sign_s == before
    (folder / "stdout.log").write_text("half a line")
    attempt.relay.flush()
    assert attempt.relay.last_sign_s > before
    before = attempt.relay.last_sign_s
    (folder / "stdout.log").write_text("half a line and the rest\n")
    attempt.flush_until_moved()
    assert attempt.relay.last_sign_s > before


def test_commands_of_a_policy_wait_for_the_disk_and_end_no_attempt(attempt: Attempt) -> None:
    in_the_way = attempt.commands_path.with_suffix(".tmp")
    in_the_way.mkdir()
    nan = float("nan")
    for event in (LayersNamed(("a",)), GradientsRecorded(1, (nan,), (0,)), record(1, 0, (nan,))):
        attempt.tell(event)
    kinds: list[str] = []
    deadline = time.monotonic() + DEADLINE_S
    while "action" not in kinds:
        assert time.monotonic() < deadline
        attempt.relay.flush()
        kinds = [kind for _, kind in attempt.stored()]
    assert read_commands(attempt.commands_path) == []
    in_the_way.rmdir()
    attempt.log("a later event")
    attempt.flush_until_moved()
    assert [(command.action, command.factor) for command in read_commands(attempt.commands_path)] == [("cut_lr", 0.5)]


def test_what_a_locked_database_did_not_take_is_stored_later(attempt: Attempt, sqlite_url: str) -> None:
    attempt.log("a", "b")
    with locked(sqlite_url):
        assert attempt.relay.flush() == 0
        attempt.log("c")
        assert attempt.relay.flush() == 0
        assert attempt.stored() == []
    moved = 0
    while moved < 3:  # one flush or two: the retry may be due before or after "c" was read
        moved += attempt.flush_until_moved()
    assert attempt.stored() == [(0, "a"), (1, "b"), (2, "c")]


def test_a_dead_redis_keeps_nothing_from_the_database_and_is_fed_again(attempt: Attempt, valkey: Valkey) -> None:
    valkey.kill()
    attempt.log("a", "b")
    assert attempt.flush_until_moved() == 2
    assert attempt.stored() == [(0, "a"), (1, "b")]
    valkey.start()
    client = redis.Redis.from_url(valkey.url)
    with closing(client), client.pubsub() as pubsub:  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
        pubsub.subscribe(channel_of(attempt.job_id))
        assert (pubsub.get_message(timeout=DEADLINE_S) or {})["type"] == "subscribe"
        attempt.log("c")
        assert attempt.flush_until_moved() == 1
        frame = orjson.loads((pubsub.get_message(timeout=DEADLINE_S) or {})["data"])
    assert frame["first_seq"] - attempt.first_seq == 2
    assert [event["message"] for event in frame["events"]] == ["c"]
    assert attempt.stored() == [(0, "a"), (1, "b"), (2, "c")]


@pytest.mark.parametrize(
    "filename",
    ["../../outside", "{job}/../../outside", "/etc", "", "{job}", "{job}/", "job_other/step-1", "{job}/a\0b"],
)
def test_a_checkpoint_outside_of_its_jobs_folder_is_not_registered(attempt: Attempt, filename: str) -> None:
    attempt.tell(CheckpointSaved("ckpt_1", filename.format(job=attempt.job_id), 1, 0, 1.0, 1.0, 10, is_best=True))
    attempt.tell(CheckpointSaved("ckpt_2", f"{attempt.job_id}/step-2", 2, 0, 1.0, 1.0, 10, is_best=True))
    attempt.flush_until_moved()
    assert [row.id for row in attempt.checkpoints()] == ["ckpt_2"]
    assert "is no folder of this job" in attempt.stored()[0][1]
